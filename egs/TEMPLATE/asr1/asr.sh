#!/usr/bin/env bash
# The staged driver that every recipe shares, run from the recipe's folder:
#   asr.sh --confs "a b" --default-conf a -- USER_OPTIONS
# Stages only say what runs; the work is Python's.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
stage_names=(data dump train decode score pack)

usage() {
  cat <<HELP
Usage: ./run.sh [OPTIONS]

  --conf NAME        configuration in conf/: $confs (default: $default_conf)
  --stage N          first stage (default: 1)
  --stop-stage N     last stage (default: ${#stage_names[@]}); --stop_stage too
  --nj N             processes for data and features (default: number of cores)
  --ngpu N           GPUs to train on, at most train.accumulate of the configuration; 0 for the CPU even where
                     there is a GPU (default: 1, where there is one)
  --beam N           hypotheses kept while decoding (default: as configured)
  --launcher NAME    local, or slurm: stages 2 to 4 run as jobs of the cluster that slurm.yaml beside run.sh describes, or
                     egs/TEMPLATE/asr1/slurm.yaml where there is none (docs/cluster.md)
  --exp NAME         name of the experiment (default: the configuration's)
  --seed N           seed in place of the configured one; the experiment is then CONF_seedN
  --baseline N:CKPT  this system alone, nothing of ours: whisper, nue-asr, reazonspeech-espnet or reazonspeech-nemo
                     with a checkpoint (whisper:openai/whisper-large-v3); stage 1 then prepares the test set's corpus
  --sets A,B,C       your own data/A to train on, data/B to validate and data/C to test on (with --stage 2)
  --list             list the stages and stop
  --help             this text

A finished stage does nothing when run again; an interrupted one goes on. Stages:
$(list)
HELP
}

list() {
  local n
  for n in "${!stage_names[@]}"; do echo "  $((n + 1)) ${stage_names[n]}"; done
}

fail() { echo "error: run.sh: $1; $2" >&2; exit 2; }

number() {
  [[ $2 =~ ^[0-9]{1,4}$ ]] || fail "$1 needs a number, got '$2'" "see --help"
  printf -v "$3" '%d' "$((10#$2))"
}

confs='' default_conf='' conf='' exp='' own_sets='' beam='' seed='' baseline_alone='' launcher=local ngpu=1
stage=1 stop_stage=${#stage_names[@]} nj=$(nproc) asked=run
while (($#)); do
  case $1 in
    --) shift; continue ;;
    --list) asked=list; shift; continue ;;
    --help) asked=usage; shift; continue ;;
  esac
  (($# > 1)) || [[ $1 != --* ]] || fail "$1 is unknown or needs a value" "see --help"
  case $1 in
    --confs) confs=$2 ;;
    --default-conf) default_conf=$2 ;;
    --conf) conf=$2 ;;
    --stage) number "$1" "$2" stage ;;
    --stop-stage | --stop_stage) number "$1" "$2" stop_stage ;;
    --nj) number "$1" "$2" nj ;;
    --ngpu) number "$1" "$2" ngpu ;;
    --launcher) launcher=$2 ;;
    --exp) exp=$2 ;;
    --sets) own_sets=$2 ;;
    --beam) number "$1" "$2" beam ;;
    --seed) number "$1" "$2" seed ;;
    --baseline) baseline_alone=$2 ;;
    *) fail "unknown option $1" "see --help" ;;
  esac
  shift 2
done
if [[ $asked != run ]]; then "$asked"; exit 0; fi
conf=${conf:-$default_conf}
exp=${exp:-$conf${seed:+_seed$seed}}
[[ " $confs " == *" $conf "* ]] || fail "no configuration $conf" "choose one of: $confs"
[[ $exp =~ ^[A-Za-z0-9_-][A-Za-z0-9._-]*$ ]] || fail "--exp '$exp' is no plain name" "use letters, digits, '.', '_', '-'"
case $launcher in
  local) engine=(speechllm) ;;
  slurm)
    ((ngpu <= 1)) || fail "--ngpu goes with --launcher local" "set gpus of train in slurm.yaml"
    cluster=slurm.yaml
    [[ -f $cluster ]] || cluster=$top/egs/TEMPLATE/asr1/slurm.yaml
    engine=(speechllm slurm --conf "$cluster" --)
    ;;
  *) fail "no launcher $launcher" "use local or slurm" ;;
esac
[[ -z $beam ]] || ((beam > 0)) || fail "--beam must be at least 1" "see --help"
((nj > 0)) || fail "--nj must be at least 1" "see --help"
((1 <= stage && stage <= ${#stage_names[@]} && 1 <= stop_stage && stop_stage <= ${#stage_names[@]})) || fail "stages go from 1 to ${#stage_names[@]}" "see --list"
((stage <= stop_stage)) || fail "--stage $stage comes after --stop-stage $stop_stage" "see --list"

"$top/tools/setup.sh"
export PATH="$top/.venv/bin:$PATH"
if ((ngpu == 0)); then export CUDA_VISIBLE_DEVICES=''; fi

yaml=conf/$conf.yaml
# corpora to prepare (the last holds the test set), the sets of this configuration, its table, and the baselines to run
# beside it as NAME:CHECKPOINT
corpora=() train_set='' valid_set='' eval_set='' table='' baselines=()
# shellcheck source=/dev/null
. ./local/corpus.sh "$conf"
if [[ -n $baseline_alone ]]; then
  [[ $baseline_alone =~ ^[a-z-]+:[A-Za-z0-9/._-]+$ ]] || fail "--baseline '$baseline_alone' is not NAME:CHECKPOINT" "see --help"
  baselines=("$baseline_alone") corpora=("${corpora[-1]}")
fi
if [[ -n $own_sets ]]; then
  [[ $own_sets =~ ^[A-Za-z0-9_.-]+,[A-Za-z0-9_.-]+,[A-Za-z0-9_.-]+$ ]] || fail "--sets '$own_sets' is not A,B,C" "see --help"
  [[ $exp != "$conf${seed:+_seed$seed}" ]] || fail "--sets needs a name for the experiment" "add --exp NAME"
  ((stage > 1)) || fail "stage 1 makes the data of $conf, not yours" "add --stage 2"
  IFS=, read -r train_set valid_set eval_set <<<"$own_sets"
fi
feature_tag=$(speechllm tag --conf "$yaml")
dump=data # where the encoder reads the sounds in every step
if [[ -n $feature_tag ]]; then dump=dump/$feature_tag; fi
train_options=() decode_options=()
if [[ -n $seed ]]; then train_options=(--set "seed=$seed"); fi
if ((ngpu > 1)); then train_options+=(--ngpu "$ngpu"); fi
tag=greedy
if [[ -n $beam ]]; then decode_options=(--beam "$beam") tag=beam$beam; fi
if [[ ! -f tables/$table.yaml || $exp != "$conf" || -n $own_sets || -n $beam ]]; then table=''; fi
decoded=decode_$tag/$eval_set baseline=decode_greedy/$eval_set
mapfile -t sets < <(printf '%s\n' "$train_set" "$valid_set" "$eval_set" | sort -u)
if [[ -n $baseline_alone ]]; then sets=("$eval_set"); fi

# each command runs in the background, so that a signal reaches it at once and not when it is over
child=''
stop() {
  if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null && wait "$child" || true; fi
  echo "stopped: run the same command again to go on" >&2
  exit 75
}
trap stop INT TERM
go() {
  local status=0
  "$@" &
  child=$!
  wait "$child" || status=$?
  child=''
  return "$status"
}

stage_data() {
  local corpus
  for corpus in "${corpora[@]}"; do go python local/data.py --corpus "$corpus" --out data --nj "$nj"; done
  for set in "${sets[@]}"; do go speechllm validate "data/$set"; done
}

stage_dump() {
  if [[ -n $baseline_alone ]]; then echo "nothing to do for a baseline"; return; fi
  if [[ $dump == data ]]; then echo "nothing to store: the encoder reads the sounds in every step"; return; fi
  for set in "${sets[@]}"; do
    go "${engine[@]}" dump --conf "$yaml" --data "data/$set" --out "$dump/$set" --nj "$nj"
  done
}

stage_train() {
  if [[ -n $baseline_alone ]]; then echo "nothing to do for a baseline"; return; fi
  go "${engine[@]}" train --conf "$yaml" --train "$dump/$train_set" --valid "$dump/$valid_set" --exp "exp/$exp" \
    "${train_options[@]}"
}

stage_decode() {
  if [[ -z $baseline_alone ]]; then
    go "${engine[@]}" decode --exp "exp/$exp" --data "$dump/$eval_set" --out "exp/$exp/$decoded" "${decode_options[@]}"
  fi
  local name model
  for entry in "${baselines[@]}"; do
    name=${entry%%:*} model=${entry#*:}
    go "${engine[@]}" baseline "$name" --model "$model" --data "data/$eval_set" --out "exp/${model##*/}/$baseline"
  done
}

score() {
  local options=(--audio "data/$eval_set/wav.scp")
  if [[ -f data/$eval_set/utt2group ]]; then options+=(--groups "data/$eval_set/utt2group"); fi
  echo "$1:"
  go speechllm score --ref "data/$eval_set/text" --hyp "$1/text" --out "$1" "${options[@]}"
}

stage_score() {
  if [[ -z $baseline_alone ]]; then score "exp/$exp/$decoded"; fi
  for entry in "${baselines[@]}"; do score "exp/${entry##*/}/$baseline"; done
  if [[ -n $table ]]; then go speechllm table "tables/$table.yaml" --out "exp/$exp/RESULTS.md"; fi
  if [[ -n $baseline_alone ]]; then return; fi
  cat <<NEXT

Where to look next, in $PWD:
  exp/$exp/$decoded/report.html   every utterance, aligned (open it in a browser)
  exp/$exp/metrics.jsonl, tensorboard   loss and dev CER as they went
  $top/.venv/bin/speechllm trace UTT_ID --exp exp/$exp   one utterance's way through everything (ids: data/$eval_set/text)
NEXT
}

stage_pack() {
  if [[ -n $baseline_alone ]]; then echo "nothing to do for a baseline"; return; fi
  local options=()
  if [[ -f exp/$exp/$decoded/score.json ]]; then options+=(--scores "exp/$exp/$decoded/score.json"); fi
  # of the data and their licence, for the card; of your own sets we know nothing
  if [[ -f conf/$conf.md && -z $own_sets ]]; then options+=(--notes "conf/$conf.md"); fi
  go speechllm pack --exp "exp/$exp" --out "exp/$exp/packed" --name "$exp" "${options[@]}"
}

for ((index = stage; index <= stop_stage; index++)); do
  name=${stage_names[index - 1]} began=$SECONDS
  echo "== stage $index: $name (conf $conf)"
  "stage_$name"
  echo "== stage $index: $name done in $((SECONDS - began)) s"
done

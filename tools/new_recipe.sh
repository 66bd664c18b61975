#!/usr/bin/env bash
# Makes the recipe of a new corpus, egs/NAME/asr1: the files of the template, and the configurations of the JSUT recipe.
set -euo pipefail
export LC_ALL=C # a-z means a to z

usage() {
  cat <<'HELP'
Usage: tools/new_recipe.sh NAME

Makes egs/NAME/asr1, a recipe that works once utterances() in its local/data_prep.py is filled in.
NAME begins with a letter; letters, digits, '_', '-' follow. docs/add_a_recipe.md walks through it.
HELP
}

fail() { echo "error: tools/new_recipe.sh: $1; $2" >&2; exit 2; }

for option in "$@"; do
  case $option in
    --help) usage; exit 0 ;;
    -*) fail "unknown option ${option@Q}" "see --help" ;;
  esac
done
(($# == 1)) || fail "needs one name, got $#" "see --help"
name=$1
[[ $name =~ ^[A-Za-z][A-Za-z0-9_-]{0,63}$ ]] || fail "${name@Q} is no plain name" "begin with a letter, go on with letters, digits, '_', '-'"

cd "$(dirname "${BASH_SOURCE[0]}")/../egs"
[[ ! -e $name && ! -L $name ]] || fail "egs/$name is there already" "choose another name"

# made in a folder aside and renamed last, so that an interrupted run leaves no half recipe
aside=$(mktemp -d ".$name.XXXXXX")
trap 'rm -rf "$aside"' EXIT
made=$aside/$name
mkdir -p "$made/asr1/conf"
cp -R TEMPLATE/asr1/skeleton/recipe/. "$made/asr1/"
sed -i "s/@NAME@/$name/g" "$made"/asr1/{run.sh,README.md,tables/*.yaml}
while read -r conf source about; do
  source=jsut/asr1/conf/$source.yaml
  [[ -f $source ]] || fail "no egs/$source" "get the whole repository again"
  { echo "# ./run.sh --conf $conf : $about"; sed '/^#/d' "$source"; } >"$made/asr1/conf/$conf.yaml"
done <<'CONFS'
debug debug random tiny models on the first utterances of the corpus, every stage in about a minute on a CPU
mini mini Whisper-base encoder, CTC bridge (Japanese) and Gemma-3-270M, all from packages: for two cores and some hours of speech
published jsut the published architecture, WavLM-Large and youri-7b; needs their weights, a GPU and hundreds of hours of speech
CONFS
mv -T "$made" "$name"

cat <<NEXT
made egs/$name/asr1; what to do next:
  fill in utterances() in egs/$name/asr1/local/data_prep.py
  cd egs/$name/asr1 && ./run.sh --conf debug     # a minute: does every stage work on the first utterances?
docs/add_a_recipe.md has the rest.
NEXT

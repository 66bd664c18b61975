# shellcheck shell=bash disable=SC2034 # sourced by asr.sh, which uses these names
# What configuration $1 runs on: the part of the corpus, its sets, the baselines and the table.
corpora=(whole) train_set=train valid_set=dev eval_set=eval
baselines=() table=results
case $1 in
  debug) corpora=(debug) train_set=debug valid_set=debug eval_set=debug table=debug ;;
  mini) baselines=(whisper:openai/whisper-base) ;;
  published) baselines=(whisper:openai/whisper-large-v3) ;;
  *) ;; # a configuration of yours: the whole corpus, no baseline
esac

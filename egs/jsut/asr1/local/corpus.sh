# shellcheck shell=bash disable=SC2034 # sourced by asr.sh, which uses these names
# What configuration $1 runs on: the corpora and its sets, the baselines beside it and the table.
corpora=(mini) train_set=mini_train valid_set=mini_dev eval_set=mini_eval
baselines=(whisper:openai/whisper-base) table=$1
case $1 in
  mini) ;;
  mini_conv | mini_long) table=mini ;;
  mini_open) corpora=(mini_open) train_set=mini_open_train valid_set=mini_open_dev eval_set=mini_open_eval ;;
  jsut | jsut_*)
    # trained on ReazonSpeech, the public stand-in for the private 1,000 h; JSUT is not seen before the test
    size=${REAZONSPEECH_SIZE:-medium}
    corpora=("reazonspeech-$size" jsut)
    train_set=reazonspeech_${size}_train valid_set=reazonspeech_${size}_dev eval_set=jsut_basic5000
    table=paper baselines=() # each other system is a row of its own: --baseline
    ;;
  debug)
    corpora=(debug) train_set=debug_train valid_set=debug_train eval_set=debug_train baselines=()
    ;;
  *) ;; # a configuration of yours runs on the mini corpus, or on your --sets
esac

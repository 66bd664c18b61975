# shellcheck shell=bash disable=SC2034 # sourced by asr.sh, which uses these names
# What configuration $1 runs on: the corpus and its sets, the folder of its features, the baselines and the table.
corpus=mini train_set=mini_train valid_set=mini_dev eval_set=mini_eval
encoder_tag=whisper-base baselines=(openai/whisper-base) table=$1
case $1 in
  mini) ;;
  mini_conv) table=mini ;;
  mini_open) corpus=mini_open train_set=mini_open_train valid_set=mini_open_dev eval_set=mini_open_eval ;;
  jsut)
    corpus=jsut train_set=jsut_train valid_set=jsut_dev eval_set=jsut_eval1 encoder_tag=wavlm-large
    baselines=(openai/whisper-large-v3)
    ;;
  debug)
    corpus=debug train_set=debug_train valid_set=debug_train eval_set=debug_train encoder_tag=debug baselines=()
    ;;
  *) encoder_tag=$1 ;; # a configuration of yours: the mini corpus, and a folder of its own for its features
esac

# shellcheck shell=bash disable=SC2034 # sourced by asr.sh, which uses these names
# What configuration $1 runs on: the corpora and its sets, the folder of its features, the baselines and the table.
corpora=(mini) train_set=mini_train valid_set=mini_dev eval_set=mini_eval
encoder_tag=whisper-base baselines=(whisper:openai/whisper-base) table=$1
case $1 in
  mini) ;;
  mini_conv) table=mini ;;
  mini_open) corpora=(mini_open) train_set=mini_open_train valid_set=mini_open_dev eval_set=mini_open_eval ;;
  jsut | jsut_*)
    # trained on ReazonSpeech, the public stand-in for the private 1,000 h; JSUT is not seen before the test
    size=${REAZONSPEECH_SIZE:-medium}
    corpora=("reazonspeech-$size" jsut)
    train_set=reazonspeech_${size}_train valid_set=reazonspeech_${size}_dev eval_set=jsut_basic5000
    encoder_tag=wavlm-large table=paper baselines=(whisper:openai/whisper-large-v3)
    case $1 in
      jsut_hubert) encoder_tag=japanese-hubert-large ;;
      jsut_nue) encoder_tag='' baselines+=(nue-asr:rinna/nue-asr) ;;
    esac
    ;;
  debug)
    corpora=(debug) train_set=debug_train valid_set=debug_train eval_set=debug_train encoder_tag=debug baselines=()
    ;;
  *) encoder_tag=$1 ;; # a configuration of yours: the mini corpus, and a folder of its own for its features
esac

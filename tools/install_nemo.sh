#!/usr/bin/env bash
# Makes .venv-nemo: NeMo in an environment of its own, for `speechllm baseline reazonspeech-nemo`.
# Safe to run again: a finished one returns at once, an interrupted one goes on.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: tools/install_nemo.sh [--help]

Installs nemo_toolkit[asr] 3.0.0 with torch and torchaudio, apart from our own packages, which ask for other versions.
No model is downloaded. Environment:
  PYTHON            interpreter to use, 3.11 or newer (default: python3)
  SPEECHLLM_NEMO    folder to make (default: .venv-nemo at the top of the repository)
  SPEECHLLM_TORCH   torch requirement (default: torch==2.13.0)
HELP
}

given=${SPEECHLLM_NEMO:+$(realpath -m "$SPEECHLLM_NEMO")}
cd "$(dirname "$0")/.."
# shellcheck source=tools/foreign.sh
source tools/foreign.sh
begin tools/install_nemo.sh "${given:-$PWD/.venv-nemo}" "$@"

say "NeMo"
pip install --prefer-binary "$torch" "nemo_toolkit[asr]==3.0.0"
finish nemo.collections.asr.models

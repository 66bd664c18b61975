#!/usr/bin/env bash
# Makes .venv-espnet: ESPnet in an environment of its own, for `speechllm baseline reazonspeech-espnet`.
# Safe to run again: a finished one returns at once, an interrupted one goes on.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: tools/install_espnet.sh [--help]

Installs ESPnet 202511 with torch and torchaudio, apart from our own packages, which ask for other versions.
About 1.7 GB where pip offers a CPU build of torch, about 6 GB with CUDA. Two to seven minutes, most of it downloading.
No model is downloaded. Environment:
  PYTHON             interpreter to use, 3.11 or newer (default: python3)
  SPEECHLLM_ESPNET   folder to make (default: .venv-espnet at the top of the repository)
  SPEECHLLM_TORCH    torch requirement (default: torch==2.13.0)
HELP
}

given=${SPEECHLLM_ESPNET:+$(realpath -m "$SPEECHLLM_ESPNET")}
cd "$(dirname "$0")/.."
# shellcheck source=tools/foreign.sh
source tools/foreign.sh
begin tools/install_espnet.sh "${given:-$PWD/.venv-espnet}" "$@"

say "what ESPnet needs"
pip install --prefer-binary "$torch" -r tools/espnet.txt
say "ESPnet"
pip install --no-deps espnet==202511
finish espnet2.bin.asr_inference

#!/usr/bin/env bash
# Hands over to the JSUT recipe: ./run.sh [OPTIONS], see ./run.sh --help. First use sets up .venv.
set -euo pipefail
exec "$(dirname "$0")/egs/jsut/asr1/run.sh" "$@"

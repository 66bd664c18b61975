#!/usr/bin/env bash
# The JSUT recipe: see --help. What is special to it is in conf/, local/ and tables/.
set -euo pipefail
cd "$(dirname "$0")"
exec ../../TEMPLATE/asr1/asr.sh --confs "mini mini_conv mini_open jsut debug" --default-conf mini -- "$@"

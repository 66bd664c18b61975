#!/usr/bin/env bash
# The @NAME@ recipe: see --help. What is special to it is in conf/, local/ and tables/.
set -euo pipefail
cd "$(dirname "$0")"
confs=$(basename -s .yaml -a conf/*.yaml | tr '\n' ' ')
exec ../../TEMPLATE/asr1/asr.sh --confs "$confs" --default-conf mini -- "$@"

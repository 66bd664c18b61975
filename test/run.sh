#!/usr/bin/env bash
# The test command of the README: makes the environment where there is none, then runs the gate.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh --dev
exec tools/check.sh "$@"

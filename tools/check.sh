#!/usr/bin/env bash
# The one gate: format, lint, types, shell, tests. Options go to pytest, such as -k dump; --unit in the first place
# leaves out the tests of whole commands, recipes and faults.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

mapfile -t scripts < <(git ls-files '*.sh' .ci/run)
ruff format --check --quiet .
ruff check --quiet .
mypy speechllm egs/jsut/asr1/local tools test egs/TEMPLATE/asr1/skeleton/from_utterances.py
shellcheck "${scripts[@]}"
if [[ ${1:-} == --unit ]]; then
  shift
  set -- -m "not slow" "$@"
fi
pytest --numprocesses 2 --dist loadfile "$@"

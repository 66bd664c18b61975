"""tools/random_killer.py kills a recipe until it completes, and tells whether it holds what an undisturbed one does."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from copied import TIME_LIMIT_S, TOP

if TYPE_CHECKING:
    from pathlib import Path

RUN = """#!/usr/bin/env bash
while (($#)); do [[ $1 != --stage ]] || first=$2; shift; done
cd "$(dirname "$0")/egs/jsut/asr1"
for n in 1 2 3; do
  ((n >= ${first:-1})) || continue
  echo "== stage $n: part$n (conf x)"
  text=exp/x/decode_greedy/$n/text
  [[ ! -f $text ]] || continue
  mkdir -p "${text%/*}"
  BEGIN
  for i in 1 2 3 4; do echo "u$i" >>"$text.tmp"; sleep 0.1; done
  mv "$text.tmp" "$text"
done
"""


def kill(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOP / "tools/random_killer.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S)


def tree_with(folder: Path, begin: str) -> Path:
    """Return a tree whose recipe does `begin` before it writes a text."""
    (folder / "egs/jsut/asr1").mkdir(parents=True)
    (folder / "tools").mkdir()
    (folder / "egs/jsut/asr1/README.md").write_text("", encoding="utf-8")
    (folder / "tools/setup.sh").write_text("", encoding="utf-8")
    (folder / "run.sh").write_text(RUN.replace("BEGIN", begin), encoding="utf-8")
    (folder / "run.sh").chmod(0o755)
    (folder / ".venv").mkdir()
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder


def test_a_recipe_that_begins_anew_is_equal_after_any_kills(tmp_path: Path) -> None:
    done = kill("--tree", tree_with(tmp_path / "tree", ': >"$text.tmp"'), "--kills", 6, "--seed", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "seed 3"
    assert lines[-1] == "all 3 files equal to the bit"
    summary = re.fullmatch(r"(\d+) kills in (\d+) runs: (.+)", lines[-2])
    assert summary
    assert int(summary[1]) == sum(line.startswith("kill ") for line in lines) >= 6
    assert sum(int(one.split()[1]) for one in summary[3].split(", ")) == int(summary[1])


def test_a_recipe_that_goes_on_behind_a_torn_line_is_found_out(tmp_path: Path) -> None:
    done = kill("--tree", tree_with(tmp_path / "tree", ":"), "--kills", 4, "--seed", 3)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^  run 1: exp/x/decode_greedy/\d/text$", done.stdout, re.MULTILINE)


def test_a_recipe_that_fails_by_itself_ends_the_run(tmp_path: Path) -> None:
    done = kill("--tree", tree_with(tmp_path / "tree", "exit 3"), "--work", tmp_path / "runs")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"the command ended with 3, see {tmp_path}/runs/undisturbed/log"


@pytest.mark.recipe
def test_data_that_were_prepared_through_kills_are_the_same() -> None:
    done = kill("--stop-stage", 1, "--kills", 3)
    assert done.returncode == 0, done.stdout + done.stderr

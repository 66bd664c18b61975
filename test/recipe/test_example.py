"""The model that comes along and its recording, as the README has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from speechllm.pack.remote_files import CODE_FILES

TOP = Path(__file__).parents[2]
TEXT = "明日の午後3時に会議室を4人で予約したいのですが。新宿のホテルを4月10日から2泊予約します。"
LARGEST_BYTES = 15_000_000
CODE = TOP / "speechllm" / "pack" / "remote"


@pytest.mark.recipe
def test_the_shipped_model_transcribes_the_example() -> None:
    command = [sys.executable, "-m", "speechllm", "transcribe", "examples/hello.wav"]
    found = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=True, timeout=600)
    assert found.stdout.replace("\n", "") == TEXT


def test_the_shipped_model_has_the_code_that_pack_writes() -> None:
    shipped = {path.name: path.read_bytes() for path in (TOP / "examples" / "mini").glob("*.py")}
    assert shipped == {name: (CODE / name).read_bytes() for name in CODE_FILES}


def test_the_shipped_model_tells_no_command_line_with_paths_of_a_machine() -> None:
    made = (TOP / "examples" / "mini" / "provenance.json").read_text(encoding="utf-8")
    assert '"packed"' in made
    assert '"argv"' not in made


def test_the_shipped_model_is_small() -> None:
    files = [path for path in (TOP / "examples" / "mini").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert sum(path.stat().st_size for path in files) <= LARGEST_BYTES

"""tools/fuzz.py: its readers take the input that it begins with, and refuse others in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import fuzz

from speechllm.errors import UserError

BAD = {"command": b"rm x |"}
NAMES = ("text", "segments", "header", "yaml", "command", "hotwords")


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_takes_its_first_input_and_refuses_another(name: str, tmp_path: Path) -> None:
    reader = fuzz.readers(tmp_path)[name]
    bad = BAD.get(name, b"\xff\x00|")
    assert all(reader.read(seed) is not None for seed in reader.seeds)
    with pytest.raises(UserError):
        reader.read(bad)
    fuzz.refuses_well(reader.read, bad)


def test_a_fault_of_two_lines_is_found() -> None:
    def read(_: bytes) -> None:
        fault = UserError("here", "is wrong", "mend it")
        fault.args = ("two\nlines",)
        raise fault

    with pytest.raises(AssertionError, match="is not one line"):
        fuzz.refuses_well(read, b"")


def test_another_fault_goes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        fuzz.refuses_well(lambda data: 1 // len(data), b"")


def test_all_readers_can_be_asked_for() -> None:
    shown = subprocess.run([sys.executable, fuzz.__file__, "--help"], capture_output=True, text=True, check=True).stdout
    assert f"{{{','.join(NAMES)}}}" in shown

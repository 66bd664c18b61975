"""Every case of docs/reliability.md has its tests in the files that the table names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "docs/reliability.md"
ROW = re.compile(r"^\| (\d+) \| .*$", re.MULTILINE)
SECTION = re.compile(r"^## (Data|Dump|Load and decode|Server)$", re.MULTILINE)
FILE_OF = {
    "Data": "test_data_faults.py",
    "Dump": "test_dump_faults.py",
    "Load and decode": "test_load_faults.py",
    "Server": "test_server_faults.py",
}
CASES = list(range(1, 51))


def rows() -> list[tuple[int, set[str]]]:
    """Return case and files of each row; a row that names no file is of its section's."""
    found = []
    text = TABLE.read_text(encoding="utf-8").partition("## What others do")[0]
    for row in ROW.finditer(text):
        sections = SECTION.findall(text[: row.start()])
        found.append((int(row[1]), set(re.findall(r"test_\w+\.py", row[0])) or {FILE_OF[sections[-1]]}))
    return found


@pytest.mark.parametrize(("case", "files"), rows())
def test_a_case_has_its_tests_where_the_table_says(case: int, files: set[str]) -> None:
    name = re.compile(rf"^def test_{case:02d}_\w+\(", re.MULTILINE)
    holding = {path.name for path in HERE.glob("test_*.py") if name.search(path.read_text(encoding="utf-8"))}
    assert holding == files


def test_no_case_stands_there_twice_or_is_left_out() -> None:
    assert [case for case, _ in rows()] == CASES
    tested = {
        int(one)
        for path in HERE.glob("test_*.py")
        for one in re.findall(r"^def test_(\d\d)_", path.read_text("utf-8"), re.MULTILINE)
    }
    assert tested == set(CASES)

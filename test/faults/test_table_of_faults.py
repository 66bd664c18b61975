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


def rows() -> list[tuple[int, set[str], int]]:
    """Return case, files and number of tests of each row; one that names no file is of its section's."""
    found = []
    text = TABLE.read_text(encoding="utf-8").partition("## What others do")[0]
    for row in ROW.finditer(text):
        sections = SECTION.findall(text[: row.start()])
        tests = row[0].split(" | ")[3]
        counts = [int(count or 1) for count in re.findall(r"`test_\d\d_\*`(?: \((\d+)\))?", tests)]
        files = set(re.findall(r"test_\w+\.py", tests)) or {FILE_OF[sections[-1]]}
        found.append((int(row[1]), files, sum(counts)))
    return found


@pytest.mark.parametrize(("case", "files", "count"), rows())
def test_a_case_has_its_tests_where_the_table_says(case: int, files: set[str], count: int) -> None:
    name = re.compile(rf"^def test_{case:02d}_\w+\(", re.MULTILINE)
    tests = {path.name: len(name.findall(path.read_text(encoding="utf-8"))) for path in HERE.glob("test_*.py")}
    holding = {name: number for name, number in tests.items() if number}
    assert set(holding) == files
    assert sum(holding.values()) == count


def test_no_case_stands_there_twice_or_is_left_out() -> None:
    assert [case for case, _, _ in rows()] == CASES
    tested = {
        int(one)
        for path in HERE.glob("test_*.py")
        for one in re.findall(r"^def test_(\d\d)_", path.read_text("utf-8"), re.MULTILINE)
    }
    assert tested == set(CASES)

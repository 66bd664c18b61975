"""The join by id: every odd line has one outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from speechllm.errors import DataError
from speechllm.score.texts import join_texts, read_joined

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def joined(tmp_path: Path, ref: str | bytes, hyp: str | bytes, *, lenient: bool = False) -> list[tuple[str, str, str]]:
    pairs = read_joined(write(tmp_path / "ref", ref), write(tmp_path / "hyp", hyp), missing_as_deletions=lenient)
    return [(one.utt_id, one.ref, one.hyp) for one in pairs]


def test_lines_are_joined_by_id_in_the_order_of_bytes(tmp_path: Path) -> None:
    assert joined(tmp_path, "b 川\na 水\n", "a みず\nb かわ\n") == [("a", "水", "みず"), ("b", "川", "かわ")]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("u 一 二\n", "一 二"),
        ("u\t一 二\n", "一 二"),
        ("u\n", ""),
        ("u \n", ""),
        ("u 水\r\n", "水"),
        ("u 水\u2028買う\n", "水\u2028買う"),
        ("u 　水　\n", "　水　"),
        ("u か\u3099\n", "か\u3099"),
        ("u え\n", "え"),
        ("u え", "え"),
    ],
    ids=[
        "blank",
        "tab",
        "id-only",
        "id-blank",
        "crlf",
        "u2028",
        "wide-blanks",
        "nfd",
        "one-character",
        "no-last-line-feed",
    ],
)
def test_every_line_has_a_defined_text(tmp_path: Path, line: str, text: str) -> None:
    assert joined(tmp_path, "u 水\n", line) == [("u", "水", text)]


def test_a_wide_blank_is_text_and_no_separator(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hyp:1: the id 'u\\\\u3000水' cannot be part of a file name"):
        joined(tmp_path, "u 水\n", "u　水\n")


@pytest.mark.parametrize(
    ("hyp", "message"),
    [
        (b"\xef\xbb\xbfu \xe6\xb0\xb4\n", "hyp:1: begins with a byte order mark"),
        (b"u \xe6\xb0\xb4\nv \xff\n", "hyp:2: is not UTF-8"),
        ("u 水\nu 川\n", "hyp:2: u stands here twice"),
        (" u 水\n", "hyp:1: the line begins with a blank, so it has no id"),
        ("v 水\n", r"hyp: no reference for 1 utterance \(v\); score against"),
        ("", r"hyp: no hypothesis for 1 utterance \(u\) of 1 references; finish decoding, or pass --missing-as-del"),
    ],
)
def test_faults_name_file_line_and_utterance(tmp_path: Path, hyp: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        joined(tmp_path, "u 水\n", hyp)


def test_a_missing_hypothesis_can_count_as_deleted() -> None:
    pairs = join_texts({"u": "水", "v": "川"}, {"u": "水"}, "hyp", missing_as_deletions=True)
    assert [(one.hyp, one.is_missing) for one in pairs] == [("水", False), ("", True)]


def test_many_missing_ids_are_counted_and_a_few_named() -> None:
    with pytest.raises(DataError, match=r"5 utterances \(u0, u1, u2, \.\.\.\)"):
        join_texts({f"u{at}": "水" for at in range(5)}, {}, "hyp")


def test_an_empty_reference_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ref: no utterance in it"):
        joined(tmp_path, "", "")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_joined(tmp_path / "none", tmp_path / "none")

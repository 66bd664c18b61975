"""How much of a test set was trained on: whole sentences, near copies, shared runs of characters."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from local_scripts import LOCAL, load

from speechllm.data.kaldi import write_table
from speechllm.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

download, overlap = [load(name) for name in ("download", "overlap")]

TEST = {
    "t1": "明日の午前十時に駅前で会いましょう。",
    "t2": "この川の水はとても冷たくて気持ちがいい。",
    "t3": "猫が三匹、日なたで眠っている。",
    "t4": "はい。",
    "t5": "経済の専門家が来年の見通しを語った。",
    "t6": "♪♪",
}
TRAIN = {
    "a": "それでは、明日の午前10時に駅前で会いましょう！",
    "b": "この川の水はとても冷たくて気持ちが悪い",
    "c": "猫が三匹、日なたで歌っていたそうです",
    "d": "いいえ",
}


def _dir(folder: Path, texts: dict[str, str]) -> Path:
    write_table(folder / "text", texts)
    return folder


def _sets(tmp_path: Path, train: dict[str, str]) -> dict[str, dict[str, object]]:
    """Return what is reported of two test sets, one of them a part of the other."""
    tests = [_dir(tmp_path / "test", TEST), _dir(tmp_path / "part", {key: TEST[key] for key in ("t1", "t5")})]
    folder = _dir(tmp_path / "train", train)
    overlap.measure(folder, tests)
    sets: dict[str, dict[str, object]] = json.loads((folder / "overlap.json").read_text(encoding="utf-8"))["sets"]
    return sets


def test_copies_and_near_copies_are_told_apart(tmp_path: Path) -> None:
    found = _sets(tmp_path, TRAIN)["test"]
    assert found["examples"] == [
        {"test": "t1", "train": "a", "whole": True},  # punctuation and the numeral are written another way
        {"test": "t2", "train": "b", "whole": False},
    ]
    assert (found["sentences"], found["empty"]) == (5, 1)
    assert (found["whole"], found["near"], found["mostly_seen"]) == (1, 2, 2)


def test_the_share_of_grams_is_counted_by_hand(tmp_path: Path) -> None:
    # t1 has 17 characters, t2 19, t3 13, t4 2 and t5 17: 10 + 12 + 6 + 1 + 10 runs of eight
    found = _sets(tmp_path, TRAIN)
    assert found["test"]["grams"] == 39
    # all of t1; of t2 the ten before いい; of t3 those of 猫が三匹日なたで; nothing of t4 and t5
    assert found["test"]["grams_seen"] == 10 + 10 + 1
    assert (found["part"]["grams"], found["part"]["grams_seen"], found["part"]["whole"]) == (20, 10, 1)


def test_pieces_of_many_texts_are_no_copy_but_are_seen(tmp_path: Path) -> None:
    sentence = TEST["t5"].rstrip("。")
    pieces = {"a": sentence[:12], "b": sentence[5:]}
    found = _sets(tmp_path, pieces)["part"]
    assert (found["whole"], found["near"], found["mostly_seen"]) == (0, 0, 1)
    assert found["grams_seen"] == 10


def test_a_short_sentence_is_found_whole_only(tmp_path: Path) -> None:
    assert _sets(tmp_path, {"a": "は。い"})["test"]["whole"] == 1  # marks do not count
    assert _sets(tmp_path, {"a": "「はい」と言った"})["test"]["whole"] == 1
    assert _sets(tmp_path, {"a": "はあ、いい"})["test"]["grams_seen"] == 0


def test_nothing_in_common_is_nothing(tmp_path: Path) -> None:
    found = _sets(tmp_path, {"a": "全然違う文", "b": ""})["test"]
    assert [found[key] for key in ("whole", "near", "mostly_seen", "grams_seen", "examples")] == [0, 0, 0, 0, []]


def test_a_report_of_the_same_texts_stays_and_another_is_made_anew(tmp_path: Path) -> None:
    train, test = _dir(tmp_path / "train", TRAIN), _dir(tmp_path / "test", TEST)
    line = overlap.measure(train, [test])
    assert line == (
        "overlap of train with test: 1 of 5 sentences whole, 2 near copies, 53.8% of the 8-grams seen"  # 21 of 39
    )
    before = (train / "overlap.json").stat().st_mtime_ns
    assert overlap.measure(train, [test]) == line
    assert (train / "overlap.json").stat().st_mtime_ns == before
    _dir(train, TRAIN | {"e": TEST["t5"]})
    assert "2 of 5 sentences whole, 3 near copies" in overlap.measure(train, [test])


def test_a_directory_without_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train/text: no such file; make the data directory first"):
        overlap.measure(tmp_path / "train", [_dir(tmp_path / "test", TEST)])


def test_the_script_prints_one_line(tmp_path: Path) -> None:
    train, test = _dir(tmp_path / "train", TRAIN), _dir(tmp_path / "test", TEST)
    command = [sys.executable, str(LOCAL / "overlap.py"), "--train", str(train), "--test", str(test)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == overlap.measure(train, [test]) + "\n"
    refused = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True, check=False, timeout=120)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {tmp_path}/no/text: no such file; ")

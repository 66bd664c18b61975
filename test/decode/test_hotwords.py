"""Lists of hotwords: what is read, and what is refused, with file and line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from speechllm.decode import hotwords
from speechllm.decode.hotwords import Hotword, parse_hotwords, read_hotwords
from speechllm.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_hotwords(path)
    return str(caught.value)


def test_a_reading_may_be_hiragana_or_katakana_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text("二階堂\tにかいどう\r\n東京\tトーキョー\n\n東京駅\nGPU\t\n", encoding="utf-8")
    assert read_hotwords(path).words == (
        Hotword("二階堂", "ニカイドー"),
        Hotword("東京", "トーキョー"),
        Hotword("東京駅", "トーキョーエキ"),
        Hotword("GPU", "ジーピーユー"),
    )


def test_a_word_may_have_two_readings() -> None:
    words = parse_hotwords(["日本\tにほん", "日本\tにっぽん"])
    assert [word.reading for word in words.words] == ["ニホン", "ニッポン"]
    assert len(words) == 2


def test_blanks_around_the_fields_and_decomposed_kana_do_not_matter() -> None:
    assert parse_hotwords([" 賀茂\u3000\t カ\u3099モ "]).words == (Hotword("賀茂", "ガモ"),)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("二階堂\tニカイドウ\n二階堂\tにかいどう\n".encode(), ":2: 二階堂 stands here twice, first at {path}:1; "),
        ("東京\n東京\n".encode(), ":2: 東京 stands here twice, first at {path}:1; "),
        ("東京\t東京\n".encode(), ":1: the reading '東京' is not kana; write it in hiragana or katakana"),
        ("東京\ttokyo\n".encode(), ":1: the reading 'tokyo' is not kana; "),
        ("東京\tトウキョウ\t首都\n".encode(), ":1: has 3 columns; write the word, a tab, and its reading"),
        ("\tトウキョウ\n".encode(), ":1: has no word before the tab; "),
        ("東\0京\n".encode(), ":1: holds a NUL character; delete it"),
        ("東\u202e京\n".encode(), ":1: the word '東\\u202e京' holds a character that cannot be printed; delete it"),
        ("\ufeff東京\n".encode(), ":1: begins with a byte order mark; save it as UTF-8 without byte order mark"),
        ("大阪\n東京\n".encode("cp932"), ":1: is not UTF-8 (byte 1); save it as UTF-8 without byte order mark"),
        (("東" * 41 + "\n").encode(), ":1: the word is longer than 40 characters; give a word, not a sentence"),
        (("東\t" + "ア" * 81 + "\n").encode(), ":1: the reading is longer than 80 characters; "),
        ("☃\n".encode(), ":1: how '☃' is read is not known; add its reading in kana after a tab"),
        (b"\n \n\t\n", ": holds no word; write one word a line, its reading after a tab"),
        (b"", ": holds no word; "),
    ],
)
def test_a_faulty_list_is_refused_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "words"
    message = refusal(path, content)
    assert message.startswith(f"{path}{says.format(path=path)}")
    assert "\n" not in message


def test_a_list_that_is_not_there_or_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"none: no such file; check the path of the hotwords"):
        read_hotwords(tmp_path / "none")
    monkeypatch.setattr(hotwords, "MAX_WORDS", 2)
    assert refusal(tmp_path / "words", "あ\nい\nう\n".encode()).endswith(
        "words:3: is word 3, and 2 are read; keep the words that matter"
    )
    assert ": is larger than 1024 KiB; " in refusal(tmp_path / "words", b"a\n" * (1 << 20))


def test_lines_that_are_not_from_a_file_name_their_source() -> None:
    with pytest.raises(DataError, match=r"^form:2: has no word before the tab; "):
        parse_hotwords(["東京", "\tトウキョウ"], "form")

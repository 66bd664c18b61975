"""Readings: katakana as pronounced, one key per sound, morphemes that cover their text."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.text.reading import katakana_reading, loanword_key, plain_kana, short_units, sound_key, words

if TYPE_CHECKING:
    from pathlib import Path

TEXT = st.text(st.sampled_from("水を買う東京へ行くデーターaｂ 　、。12ｶﾞ々\u2028🎉"), max_size=20)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "2026年4月1日に3,980円を払った。",
            "ニセンニジューロクネンシガツツイタチニサンゼンキューヒャクハチジューエンオハラッタ",
        ),
        ("14:30に25％引き", "ジューヨジサンジュップンニニジューゴパーセントビキ"),
        ("3.5倍", "サンテンゴバイ"),
        ("$5と-3度", "ゴドルトマイナスサンド"),
        ("１つ、２つ！", "ヒトツフタツ"),
        ("ﾊﾟﾝを\u2028買う\n", "パンオカウ"),
        ("a", "エイ"),
        ("「…」🎉", ""),
        ("", ""),
    ],
)
def test_a_text_is_read_as_it_is_spoken(text: str, expected: str) -> None:
    assert katakana_reading(text) == expected


def test_a_reading_holds_kana_only_and_is_the_same_every_time() -> None:
    text = "ヂーゼル車は〆切までに、Ａ社へ着く〜！？♪"
    assert set(katakana_reading(text)) <= {chr(code) for code in range(0x30A1, 0x30F5)} | {"ー"}
    assert katakana_reading(text) == katakana_reading(text)
    assert not set("ヲヂヅヰヱヵヶ") & set(katakana_reading("を鼻血続く気づくヶ所"))


def test_a_reading_sends_nothing_and_leaves_no_files(tmp_path: Path) -> None:
    code = "import speechllm.text.reading as reading; assert reading.katakana_reading('水') == 'ミズ'"
    places = {name: tmp_path / name for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    for place in places.values():
        place.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment = {**kept, **{name: str(place) for name, place in places.items()}}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_very_long_text_is_read_to_its_end() -> None:
    assert katakana_reading("水を買う。" * 500) == "ミズオカウ" * 500
    assert len(katakana_reading("か" * 1000)) == 1000


def test_given_kana_become_plain_katakana() -> None:
    assert plain_kana("みず を、カウ。ゔ ヺ") == "ミズオカウヴヴォ"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("トウキョウ", "トーキョー"),
        ("セイト", "セート"),
        ("ヴァイオリン", "バイオリン"),
        ("オカアサン", "オカーサン"),
        ("アーーー", "アア"),
    ],
)
def test_spellings_of_one_sound_share_a_key(one: str, other: str) -> None:
    assert sound_key(one) == sound_key(other)


@pytest.mark.parametrize(("one", "other"), [("ビル", "ビール"), ("キテ", "キッテ"), ("イオ", "イー"), ("カン", "ガン")])
def test_different_sounds_have_different_keys(one: str, other: str) -> None:
    assert sound_key(one) != sound_key(other)


@given(st.text(st.sampled_from("アイウエオカキクケコーンッヴァ")))
def test_a_sound_key_is_its_own_key(kana: str) -> None:
    assert sound_key(sound_key(kana)) == sound_key(kana)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("サーバー", "サーバ"),
        ("ダイアモンド", "ダイヤモンド"),
        ("ウィスキー", "ウイスキー"),
        ("プラスティック", "プラスチック"),
    ],
)
def test_loanword_variants_share_a_key(one: str, other: str) -> None:
    assert loanword_key(one) == loanword_key(other)


def test_short_words_keep_their_long_vowel() -> None:
    assert loanword_key("スキー") != loanword_key("スキ")
    assert loanword_key("水") == ""


@settings(deadline=None)
@given(TEXT)
def test_short_units_join_to_their_text(text: str) -> None:
    assert "".join(unit.surface for unit in short_units(text)) == text


def test_short_units_have_readings_and_lemmas() -> None:
    units = short_units("私はわたくしと言う xyz")
    assert [unit.reading for unit in units] == ["ワタシ", "ワ", "ワタクシ", "ト", "イウ", "", ""]
    assert units[4].lemma == "言う"


def test_words_are_the_surfaces_without_blanks() -> None:
    assert words("水を 買った") == ["水", "を", "買っ", "た"]
    assert words("") == []

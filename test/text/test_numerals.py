"""Numbers and signs as they are spoken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from num2words import num2words

from speechllm.text.numerals import join_positional, kanji_number, speak_signs, spell_numbers


@given(st.integers(min_value=0, max_value=10**20 - 1))
def test_whole_numbers_read_as_num2words_reads_them(number: int) -> None:
    assert kanji_number(str(number)) == num2words(number, lang="ja")


@pytest.mark.parametrize(
    ("digits", "expected"),
    [("0", "零"), ("00", "〇〇"), ("007", "〇〇七"), ("10000000", "千万"), ("110000", "十一万"), ("1" * 21, "一" * 21)],
)
def test_zeros_and_very_long_numbers(digits: str, expected: str) -> None:
    assert kanji_number(digits) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.05と3.140", "零点〇五と三点一四〇"),
        ("1.2.3版", "一点二点三版"),
        ("1,23", "一,二十三"),
        ("1,234,567", "百二十三万四千五百六十七"),
        ("1⁄3", "三分の一"),
        ("03-1234-5678", "〇三一二三四五六七八"),
        ("2億3000万", "二億三千万"),
    ],
)
def test_numbers_in_text(text: str, expected: str) -> None:
    assert spell_numbers(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9:05と23:00と3:2", "9時5分と23時と3:2"),
        ("¥1,000と$2.5と€3", "1,000円と2.5ドルと3ユーロ"),
        ("GPT-4と-4度", "GPT-4とマイナス4度"),
        ("3×4と5÷2=2.5", "3かける4と5わる2イコール2.5"),
        ("100kmと60kgとkm", "100キロメートルと60キログラムとkm"),
        ("二・二六事件とジョン・スミス", "二点二六事件とジョン・スミス"),
    ],
)
def test_signs_that_are_spoken(text: str, expected: str) -> None:
    assert speak_signs(text) == expected


@pytest.mark.parametrize("word", ["七五三", "二三人", "四五日", "〇三", "〇〇さん", "一日一善", "千葉", "二十三"])
def test_kanji_digits_that_may_be_words_stay(word: str) -> None:
    assert join_positional(word) == word


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一九九五年", "千九百九十五年"),
        ("二〇人", "二十人"),
        ("三〇万円", "三十万円"),
        ("〇時", "零時"),
        ("一千万", "千万"),
    ],
)
def test_kanji_digits_by_position_are_read_as_numbers(text: str, expected: str) -> None:
    assert join_positional(text) == expected

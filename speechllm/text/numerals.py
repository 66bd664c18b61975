"""Numbers and symbols as they are spoken: digits to kanji numerals, signs to words.

Everything here expects NFKC text (half-width digits and signs) and leaves punctuation alone, so that the same
functions serve scoring, which strips punctuation afterwards, and reading, which needs it.

The direction is digits to kanji and never back: kanji digits are also parts of words (千葉, 三重, 一人), so a map from
kanji to digits destroys names, while 25 has one spoken form.
"""

from __future__ import annotations

import re

KANJI_DIGITS = "〇一二三四五六七八九"
SMALL_UNITS = ("", "十", "百", "千")
LARGE_UNITS = ("", "万", "億", "兆", "京")
MAX_SPOKEN_DIGITS = 4 * len(LARGE_UNITS)
"""A longer run of digits is read one by one."""

_TO_KANJI_DIGIT = str.maketrans("0123456789", KANJI_DIGITS)
_KANJI_DIGIT = f"[{KANJI_DIGITS}]"
_COUNTED = "年月日時分秒円人番号歳階回度名個本枚台冊件匹頁丁倍点位条項部巻章問行列目"
"""Counters that make a run of three or more kanji digits a number (一一九番), not a word (七五三)."""

_THOUSANDS = re.compile(r"(?<![0-9.,、])[0-9]{1,3}(?:[,、][0-9]{3})+(?![0-9]|[,、][0-9])")
_TELEPHONE = re.compile(r"(?<![0-9-])0[0-9]{1,4}-[0-9]{1,4}-[0-9]{3,4}(?![0-9-])")
_CLOCK = re.compile(r"(?<![0-9:.])([01]?[0-9]|2[0-4]):([0-5][0-9])(?![0-9:])")
_FRACTION = re.compile(r"([0-9]+)⁄([0-9]+)")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_AMOUNT = r"[0-9][0-9,.]*(?:[十百千万億兆])*"
_CURRENCY = re.compile(rf"([¥$€£]) ?({_AMOUNT})")
_CURRENCY_WORDS = {"¥": "円", "$": "ドル", "€": "ユーロ", "£": "ポンド"}
_UNIT = re.compile(r"(?:(?<=[0-9])|(?<=[0-9][十百千万億兆])) ?(km|cm|mm|kg|mg|ml)(?![a-zA-Z])")
_UNIT_WORDS = {
    "km": "キロメートル",
    "cm": "センチメートル",
    "mm": "ミリメートル",
    "kg": "キログラム",
    "mg": "ミリグラム",
    "ml": "ミリリットル",
}
_SIGNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?:(?<=^)|(?<=[^0-9a-zA-Zァ-ヺー\-]))-(?=[0-9])"), "マイナス"),
    (re.compile(rf"(?<=[0-9{KANJI_DIGITS}十百千万億兆])〜(?=[0-9{KANJI_DIGITS}十百千])"), "から"),
    (re.compile(rf"(?<={_KANJI_DIGIT})・(?={_KANJI_DIGIT})"), "点"),
    (re.compile(r"(?<=[0-9]) ?[×✕] ?(?=[0-9])"), "かける"),
    (re.compile(r"(?<=[0-9]) ?÷ ?(?=[0-9])"), "わる"),
    (re.compile(r"(?<=[0-9]) ?= ?(?=[0-9])"), "イコール"),
)
_SPOKEN = {
    "%": "パーセント",
    "‰": "パーミル",
    "°c": "度",
    "°C": "度",
    "°F": "度",
    "°f": "度",
    "°": "度",
    "&": "アンド",
    "+": "プラス",
    "@": "アットマーク",
    "¥": "円",
    "$": "ドル",
    "€": "ユーロ",
    "£": "ポンド",
}
_SPOKEN_SIGN = re.compile("|".join(re.escape(sign) for sign in _SPOKEN))

_POSITIONAL = re.compile(rf"(?<![十百千万億兆点]){_KANJI_DIGIT}{{2,}}(?![十百千点{KANJI_DIGITS}])")
_ZERO_ALONE = re.compile(rf"(?<![{KANJI_DIGITS}十百千])〇(?=[点時度分秒円対歳]|パーセント)")
_ONE_THOUSAND = re.compile(r"(?<![一-九〇十百千点])一千(?=[万億兆])")


def kanji_number(digits: str) -> str:
    """Kanji numeral of a run of half-width digits, as it is spoken.

    A leading zero means that the digits are read one by one (telephone and part numbers), and so does a run that
    is longer than the units reach.

    >>> kanji_number("2024"), kanji_number("0120"), kanji_number("10000"), kanji_number("0")
    ('二千二十四', '〇一二〇', '一万', '零')
    """
    if not digits.strip("0") and len(digits) == 1:
        return "零"
    if digits.startswith("0") or len(digits) > MAX_SPOKEN_DIGITS:
        return digits.translate(_TO_KANJI_DIGIT)
    words = []
    for place, unit in enumerate(LARGE_UNITS):
        end = max(0, len(digits) - 4 * place)
        spoken = _below_ten_thousand(digits[max(0, end - 4) : end])
        if spoken:
            words.append(spoken + unit)
    return "".join(reversed(words))


def _below_ten_thousand(digits: str) -> str:
    """Kanji numeral of up to four digits; empty for zero."""
    words = []
    for place, digit in enumerate(reversed(digits)):
        if digit == "0":
            continue
        one_is_silent = digit == "1" and place > 0
        words.append(("" if one_is_silent else KANJI_DIGITS[int(digit)]) + SMALL_UNITS[place])
    return "".join(reversed(words))


def spell_numbers(text: str) -> str:
    """NFKC text with every number in half-width digits turned into kanji numerals.

    Decimals are read digit by digit after 点, leading zeros are kept, thousands separators go.

    >>> spell_numbers("1,234円と3.50倍と0120-123-456")
    '千二百三十四円と三点五〇倍と〇一二〇一二三四五六'
    """
    if not _NUMBER.search(text):
        return text
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", "").replace("、", ""), text)
    text = _TELEPHONE.sub(lambda match: match[0].replace("-", "").translate(_TO_KANJI_DIGIT), text)
    text = _FRACTION.sub(lambda match: f"{match[2]}分の{match[1]}", text)
    return _NUMBER.sub(lambda match: _decimal(match[0]), text)


def _decimal(number: str) -> str:
    """Kanji numeral of digits with any number of points: 3.14 is 三点一四, 1.2.3 is 一点二点三."""
    whole, *parts = number.split(".")
    return "点".join([kanji_number(whole), *(part.translate(_TO_KANJI_DIGIT) for part in parts)])


def speak_signs(text: str) -> str:
    """NFKC text with the signs that are spoken turned into words; other symbols stay.

    >>> speak_signs("気温は-5°Cで湿度10%"), speak_signs("14:30に$5")
    ('気温はマイナス5度で湿度10パーセント', '14時30分に5ドル')
    """
    text = _CURRENCY.sub(lambda match: match[2] + _CURRENCY_WORDS[match[1]], text)
    text = _CLOCK.sub(_clock, text)
    text = _UNIT.sub(lambda match: _UNIT_WORDS[match[1]], text)
    for pattern, word in _SIGNS:
        text = pattern.sub(word, text)
    return _SPOKEN_SIGN.sub(lambda match: _SPOKEN[match[0]], text)


def _clock(match: re.Match[str]) -> str:
    """Hours and minutes as spoken; full hours have no minutes."""
    hour, minute = int(match[1]), int(match[2])
    return f"{hour}時" + (f"{minute}分" if minute else "")


def join_positional(text: str) -> str:
    """Text with kanji digits written by position turned into spoken numerals: 二〇二四年 is 二千二十四年.

    Only where it is certain: a 〇 inside, or at least three digits before a counter. So 七五三, 二三人 (two or three
    people) and 〇三 stay. Isolated 〇 before a unit becomes 零, and 一千万 becomes 千万, as digits would give.

    >>> join_positional("二〇二四年に一一九番と七五三と一千万")
    '二千二十四年に百十九番と七五三と千万'
    """
    text = _POSITIONAL.sub(lambda match: _positional(match, text), text)
    return _ONE_THOUSAND.sub("千", _ZERO_ALONE.sub("零", text))


def _positional(match: re.Match[str], text: str) -> str:
    """The spoken form of a run of kanji digits, or the run as it is where its sense is open."""
    run = match[0]
    follower = text[match.end() : match.end() + 1]
    is_number = "〇" in run or (len(run) >= 3 and follower != "" and follower in _COUNTED)  # noqa: PLR2004
    if run.startswith("〇") or not is_number or len(run) > MAX_SPOKEN_DIGITS:
        return run
    return kanji_number("".join(str(KANJI_DIGITS.index(kanji)) for kanji in run))

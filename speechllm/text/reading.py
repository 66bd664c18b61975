"""How a Japanese text is read: katakana as pronounced, and morphemes with their readings.

Two analysers, because each is wrong elsewhere: Open JTalk (``pyopenjtalk``) reads whole sentences, numbers and
letters included; UniDic's short units (``fugashi`` with ``unidic-lite``) are the words of the WER and know lemmas.
Both are loaded on first use.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import shlex
import warnings
from dataclasses import dataclass
from typing import Any

from speechllm.runtime import without_telemetry
from speechllm.text import numerals
from speechllm.text.normalize import compatibility_form

_NOT_KANA = re.compile("[^ァ-ヴー]")
_RARE_KANA = str.maketrans(
    {"ヲ": "オ", "ヂ": "ジ", "ヅ": "ズ", "ヰ": "イ", "ヱ": "エ", "ヵ": "カ", "ヶ": "ケ", "ヮ": "ワ"}
)
_VOICED_W = {"ヷ": "ヴァ", "ヸ": "ヴィ", "ヹ": "ヴェ", "ヺ": "ヴォ"}
_HIRAGANA_TO_KATAKANA = {code: code + 0x60 for code in (*range(0x3041, 0x3097), 0x309D, 0x309E)}
_CONTROL = re.compile(r"[\u0000-\u001f\u007f-\u009f\u2028\u2029]")
_SENTENCE_END = re.compile("(?<=[。！？!?])")
_MAX_ANALYSED_CHARS = 400
"""Open JTalk's buffers are fixed; a longer stretch is read in pieces."""


@dataclass(frozen=True, slots=True)
class Morpheme:
    """A piece of text and how it is read; surfaces of a text's morphemes join to the text."""

    surface: str
    reading: str
    """Katakana as pronounced (は the particle is ワ, long vowels are ー); empty where nothing is known."""
    lemma: str = ""
    """UniDic's lemma, the same for all spellings of a word; empty where nothing is known."""


def katakana_reading(text: str) -> str:
    """Katakana and ー of a text as it is pronounced; everything else is dropped.

    Numbers, dates, prices and signs are read out; ヲ ヂ ヅ are written as they sound. Deterministic.

    >>> katakana_reading("10％と1,234円。")
    'ジュッパーセントトセンニヒャクサンジューヨエン'
    """
    spoken = _CONTROL.sub(" ", numerals.speak_signs(compatibility_form(text)))
    return "".join(map(_read_aloud, _pieces(spoken)))


def plain_kana(text: str) -> str:
    """Katakana and ー of a text that is already kana: hiragana turned, all else dropped, spelled as it sounds.

    >>> plain_kana("みず を、カウ")
    'ミズオカウ'
    """
    katakana = compatibility_form(text).translate(_HIRAGANA_TO_KATAKANA)
    for old, new in _VOICED_W.items():
        katakana = katakana.replace(old, new)
    return _NOT_KANA.sub("", katakana).translate(_RARE_KANA)


def short_units(text: str) -> list[Morpheme]:
    """UniDic short units with readings and lemmas; their surfaces join to ``text``.

    Blanks are units without reading. So are unknown words, unless they are kana, which read as they are written.
    """
    units: list[Morpheme] = []
    start = 0
    for line in _unidic().parse(text).splitlines():
        surface, _, rest = line.partition("\t")
        pronunciation, _, lemma = rest.partition("\t")
        if (found := text.index(surface, start)) > start:
            units.append(Morpheme(text[start:found], ""))
        known = pronunciation not in {"", "*"}
        reading = _spelled_as_it_sounds(pronunciation if known else surface)
        if _spelled_as_it_sounds(surface) != reading:
            reading = _SETTLED.get((lemma, reading), reading)
        units.append(Morpheme(surface, reading, lemma if known else ""))
        start = found + len(surface)
    if start < len(text):
        units.append(Morpheme(text[start:], ""))
    return units


_SETTLED = {
    ("言う", "ユー"): "イウ",
    ("言う", "ユウ"): "イウ",
    ("私-代名詞", "ワタクシ"): "ワタシ",
}
"""Readings between which UniDic's choice says nothing about the sound: (lemma, reading) to the reading we use."""


@functools.lru_cache(maxsize=1 << 16)
def _spelled_as_it_sounds(kana: str) -> str:
    """`plain_kana`, remembered: the same words come again and again."""
    return plain_kana(kana)


def words(text: str) -> list[str]:
    """UniDic short units of a text, the tokens of the WER."""
    return [line.partition("\t")[0] for line in _unidic().parse(text).splitlines()]


_LONG_AFTER = {
    **dict.fromkeys("アカサタナハマヤラワガザダバパァャヮ", "ア"),
    **dict.fromkeys("イキシチニヒミリギジビピィ", "イ"),
    **dict.fromkeys("ウクスツヌフムユルグズブプゥュヴ", "ウ"),
    **dict.fromkeys("エケセテネヘメレゲゼデベペェ", "イエ"),
    **dict.fromkeys("オコソトノホモヨロヲゴゾドボポォョ", "ウオ"),
}
_V_SOUNDS = re.compile("ヴ([ァィェォュ]?)")
_V_TO_B = {"ァ": "バ", "ィ": "ビ", "ェ": "ベ", "ォ": "ボ", "ュ": "ビュ", "": "ブ"}


@functools.lru_cache(maxsize=1 << 18)
def sound_key(kana: str) -> str:
    """Katakana in one spelling per sound: two readings sound alike exactly when their keys are equal.

    Written-out long vowels become ー (トウキョウ, セイ), repeated ー one, ヴァ is バ.

    >>> sound_key("トウキョウ") == sound_key("トーキョー"), sound_key("ヴァイオリン")
    (True, 'バイオリン')
    """
    kana = _V_SOUNDS.sub(lambda match: _V_TO_B[match[1]], kana)
    sounds: list[str] = []
    vowel_source = ""
    for sound in kana:
        if vowel_source and (sound == "ー" or sound in _LONG_AFTER.get(vowel_source, "")):
            if sounds[-1] != "ー":
                sounds.append("ー")
            continue
        sounds.append(sound)
        vowel_source = sound
    return "".join(sounds)


_KATAKANA_WORD = re.compile("[ァ-ヴー]+")
_LOAN_VARIANTS = (
    ("イア", "イヤ"),
    ("ウィ", "ウイ"),
    ("ウェ", "ウエ"),
    ("ウォ", "ウオ"),
    ("ティ", "チ"),
    ("ディ", "デ"),
)
_SHORTEST_STEM = 3


def loanword_key(surface: str) -> str:
    """A katakana word in one of its accepted spellings; empty for anything else.

    A final ー of a longer word goes (サーバー, サーバ), ダイアモンド is ダイヤモンド, プラスティック is プラスチック.

    >>> loanword_key("コンピューター") == loanword_key("コンピュータ"), loanword_key("計算")
    (True, '')
    """
    if not _KATAKANA_WORD.fullmatch(surface):
        return ""
    key = sound_key(plain_kana(surface))
    for one, other in _LOAN_VARIANTS:
        key = key.replace(one, other)
    return key[:-1] if key.endswith("ー") and len(key) > _SHORTEST_STEM else key


def dictionaries() -> dict[str, str]:
    """Names and versions of the two analysers' dictionaries, for signatures."""
    return {
        "unidic-lite": importlib.metadata.version("unidic-lite"),
        "pyopenjtalk-plus": importlib.metadata.version("pyopenjtalk-plus"),
    }


@functools.cache
def _unidic() -> Any:
    """MeCab with unidic-lite, one line a unit: surface, pronunciation, lemma."""
    import fugashi
    import unidic_lite

    folder = shlex.quote(unidic_lite.DICDIR)
    # unidic-lite's own dicrc names an output type, which would win over -F; -O '' switches it off
    layout = r"-O '' '-F%m\t%f[9]\t%f[7]\n' '-U%m\t\t\n' '-E\n'"
    return fugashi.GenericTagger(f"-r /dev/null -d {folder} {layout}")


@functools.lru_cache(maxsize=1 << 14)
def _read_aloud(text: str) -> str:
    """Open JTalk's pronunciation of a text that its buffers can hold."""
    without_telemetry()
    import pyopenjtalk

    with warnings.catch_warnings():
        # pyopenjtalk-plus calls Sudachi by an old name
        warnings.filterwarnings("ignore", message=r"Dictionary\.create\(\)", category=DeprecationWarning)
        return plain_kana("".join(word["pron"] for word in pyopenjtalk.run_frontend(text)))


def _pieces(text: str) -> list[str]:
    """The text in stretches that Open JTalk can hold, cut at sentence ends where there are any."""
    pieces: list[str] = []
    for sentence in _SENTENCE_END.split(text) if len(text) > _MAX_ANALYSED_CHARS else [text]:
        pieces += [sentence[at : at + _MAX_ANALYSED_CHARS] for at in range(0, len(sentence), _MAX_ANALYSED_CHARS)]
    return [piece for piece in pieces if piece]

"""Named, versioned text profiles: what a text is compared as, and what a model is trained to write.

A profile never changes under its name: a change makes a new version. ``default`` is ours; ``espnet``, ``reazon``,
``kotoba`` and ``raw`` do what other projects' scorers do, so that their published figures come out to the digit.
``train`` keeps what the model should write.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.errors import ConfigError, UserError
from speechllm.text import numerals

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_PROFILE = "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A way to make two texts comparable."""

    name: str
    """Short name, as typed."""
    version: int
    """Grows whenever the result changes for any text."""
    summary: str
    """One sentence for help texts and reports."""
    apply: Callable[[str], str]
    """The whole pipeline, pure."""
    drops_empty_references: bool = False
    """Whether the original leaves out utterances whose reference is empty after normalisation."""

    @property
    def tag(self) -> str:
        """Name and version, as written in signatures: ``default_v1``."""
        return f"{self.name}_v{self.version}"


_DASHES = "-‐‑‒–—―−－﹣─ｰ"
_WAVE_DASHES = "~～〜∼∽˜⁓"
_KANA = "ぁ-ゖァ-ヺーｦ-ﾟ"
_DASH_IN_KANA = re.compile(rf"(?<=[{_KANA}])[{_DASHES}{_WAVE_DASHES}](?=[{_KANA}])")
_ANY_DASH = re.compile(f"[{_DASHES}]")
_ANY_WAVE_DASH = re.compile(f"[{_WAVE_DASHES}]")
_SPACING_MARKS = str.maketrans({"゛": "\u3099", "゜": "\u309a"})
"""NFKC would turn a spacing (semi-)voiced mark into a blank and a combining one, so that か゛ never becomes が."""
_SQUARES = re.compile(r"([kc]?)m([²³])|([㎟㎠㎡㎢㎣㎤㎥㎦])")
_SQUARE_WORDS = {
    "㎟": "平方ミリメートル",
    "㎠": "平方センチメートル",
    "㎡": "平方メートル",
    "㎢": "平方キロメートル",
    "㎣": "立方ミリメートル",
    "㎤": "立方センチメートル",
    "㎥": "立方メートル",
    "㎦": "立方キロメートル",
}


def normalize(text: str, profile: str = DEFAULT_PROFILE) -> str:
    """The text as ``profile`` compares or writes it.

    >>> normalize("Ｗｉｆｉは、10％！")
    'wifiは十パーセント'

    Raises:
        UserError: no profile of that name or version.
    """
    return get_profile(profile).apply(text)


def get_profile(name: str) -> Profile:
    """The profile called ``default`` or, with its version, ``default_v1``.

    Raises:
        UserError: no profile of that name or version.
    """
    found = PROFILES.get(name) or _BY_TAG.get(name)
    if found is None:
        names = ", ".join(one.tag for one in PROFILES.values())
        raise UserError(f"profile {name!r}", "no such text profile", f"choose one of {names}")
    return found


def unify_dashes(text: str) -> str:
    """Text with one dash and one wave dash; either of them between kana is the long-vowel sign ー.

    Comes before NFKC, which maps ～ to ~ but leaves 〜, and － to - but leaves −.
    """
    text = _DASH_IN_KANA.sub("ー", text)
    return _ANY_WAVE_DASH.sub("〜", _ANY_DASH.sub("-", text))


def compatibility_form(text: str) -> str:
    """NFKC text, dashes unified, with voiced marks joined and squared units spelled out."""
    text = _SQUARES.sub(_square_word, unify_dashes(text)).translate(_SPACING_MARKS)
    return unicodedata.normalize("NFKC", text)


def _square_word(match: re.Match[str]) -> str:
    """平方キロメートル for km² and ㎢, and so on."""
    if match[3]:
        return _SQUARE_WORDS[match[3]]
    scale = {"": "", "k": "キロ", "c": "センチ"}[match[1]]
    return {"²": "平方", "³": "立方"}[match[2]] + scale + "メートル"


class _StripTable(dict[int, "int | None"]):
    """For ``str.translate``: letters and numbers stay (ー 々 〆 〇 are among them), all else goes.

    Combining marks go too: after NFKC the only ones left have no letter to join. Filled on demand, because the
    full table of Unicode would take longer to build than a scoring run.
    """

    def __missing__(self, code: int) -> int | None:
        kept = code if unicodedata.category(chr(code))[0] in "LN" else None
        self[code] = kept
        return kept


_STRIP_TABLE = _StripTable()


def _default(text: str) -> str:
    """Dashes, NFKC, lower case, spoken signs, numerals, then everything but letters and numbers dropped.

    The order is fixed: ten per cent would lose its sign, and 3.5 its point, if symbols were dropped first.
    """
    text = compatibility_form(text).lower()
    text = numerals.spell_numbers(numerals.speak_signs(text))
    text = unicodedata.normalize("NFKC", text.translate(_STRIP_TABLE))
    return numerals.join_positional(text)


def _espnet(text: str) -> str:
    """The text as it is: ESPnet counts punctuation."""
    return text


_BLANKS = re.compile(r"\s+")


def _raw(text: str) -> str:
    """Runs of blanks folded, ends stripped."""
    return _BLANKS.sub(" ", text).strip()


_REAZON_DROPPED = str.maketrans("", "", "、。「」『』，,？！!?")
_REAZON_WIDTH = str.maketrans(
    {wide: wide - 0xFEE0 for wide in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}
)
_REAZON_NUMBER = re.compile(r"\d+\.?\d*")


def _reazon(text: str) -> str:
    """As ReazonSpeech's evaluation: some punctuation dropped, letters and digits narrow, num2words' numerals."""
    text = text.translate(_REAZON_DROPPED).translate(_REAZON_WIDTH)
    return _REAZON_NUMBER.sub(_reazon_number, text)


def _reazon_number(match: re.Match[str]) -> str:
    """num2words' Japanese reading of a number; its digits as they are where num2words gives up."""
    try:
        from num2words import num2words
    except ModuleNotFoundError as error:
        raise ConfigError("profile reazon", "needs the package num2words", "pip install num2words") from error
    try:
        return str(num2words(match[0], lang="ja"))
    except (ValueError, OverflowError, IndexError, NotImplementedError):
        return match[0]


_KOTOBA_TAGS = re.compile(r"[<\[][^>\]]*[>\]]")
_KOTOBA_ASIDES = re.compile(r"\(([^)]+?)\)")


def _kotoba(text: str) -> str:
    """As kotoba-whisper's evaluation: Whisper's basic normaliser, then blanks and full stops removed."""
    text = _KOTOBA_ASIDES.sub("", _KOTOBA_TAGS.sub("", text.lower()))
    text = unicodedata.normalize("NFKC", text)
    kept = "".join(" " if unicodedata.category(letter)[0] in "MSP" else letter for letter in text)
    return _BLANKS.sub("", kept.lower()).replace("。", "").replace(".", "")


_WRITTEN_WIDE = re.compile("([！？（）：；…〜])")
_JAPANESE = r"\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff60"
_BLANK_IN_JAPANESE = re.compile(rf"(?<=[{_JAPANESE}]) | (?=[{_JAPANESE}])")
_UNWRITABLE = re.compile(
    r"[\u0000-\u0008\u000e-\u001f\u007f-\u0084\u0086-\u009f\u00ad\u200b-\u200f\u2060-\u206f\ufeff\ufe00-\ufe0f]"
)
_MAX_ROUNDS = 8
_TO_WIDE = str.maketrans("!?", "！？")


def _train(text: str) -> str:
    """What the model should write: punctuation, digits and case kept, widths and blanks made uniform.

    Letters, digits and half-width kana as in NFKC, Japanese punctuation wide, no blank beside Japanese text. Taking out
    a blank can bring a dash between kana, or a mark behind its letter, so the steps are repeated until all is settled.
    """
    for _ in range(_MAX_ROUNDS):
        settled = _train_round(text)
        if settled == text:
            break
        text = settled
    return text


def _train_round(text: str) -> str:
    """One round of the training profile."""
    text = unify_dashes(_UNWRITABLE.sub("", text).replace("...", "…")).translate(_SPACING_MARKS)
    parts = _WRITTEN_WIDE.split(unicodedata.normalize("NFC", text))
    text = "".join(p if _WRITTEN_WIDE.fullmatch(p) else unicodedata.normalize("NFKC", p) for p in parts)
    text = _raw(unicodedata.normalize("NFC", text).translate(_TO_WIDE))
    return _BLANK_IN_JAPANESE.sub("", text)


PROFILES: dict[str, Profile] = {
    one.name: one
    for one in (
        Profile(
            name="default",
            version=1,
            summary="NFKC, lower case, numerals and spoken signs in one form, punctuation and blanks dropped",
            apply=_default,
        ),
        Profile(name="espnet", version=1, summary="text as it is, punctuation counted", apply=_espnet),
        Profile(name="reazon", version=1, summary="as ReazonSpeech's evaluation", apply=_reazon),
        Profile(
            name="kotoba",
            version=1,
            summary="as kotoba-whisper's evaluation (Whisper's basic normaliser)",
            apply=_kotoba,
            drops_empty_references=True,
        ),
        Profile(name="raw", version=1, summary="text as it is, runs of blanks folded", apply=_raw),
        Profile(
            name="train",
            version=1,
            summary="what the model should write; for training texts",
            apply=_train,
        ),
    )
}
_BY_TAG = {one.tag: one for one in PROFILES.values()}

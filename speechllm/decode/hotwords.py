"""Reads a list of hotwords: words that a recording is likely to hold, and how each is read.

One word a line, ``surface<TAB>reading``, UTF-8. The reading is hiragana or katakana and may be left out; then the
analyser's is taken. A word that is read in two ways has two lines.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.data.kaldi import lines_of
from speechllm.errors import DataError
from speechllm.text.reading import katakana_reading, plain_kana, sound_key

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MAX_FILE_BYTES = 1 << 20
MAX_WORDS = 5000
MAX_SURFACE_CHARS = 40
MAX_READING_CHARS = 80
_MARKS = frozenset("ー・゛゜ \u3000")  # may stand in a reading beside kana


@dataclass(frozen=True, slots=True)
class Hotword:
    """A word as it shall be written, and as it sounds."""

    surface: str
    reading: str
    """Katakana in one spelling per sound, see `sound_key`: トーキョー."""


@dataclass(frozen=True, slots=True)
class Hotwords:
    """The words of a list, in its order; a surface comes once for each of its readings."""

    words: tuple[Hotword, ...]

    def __len__(self) -> int:
        """Return the number of words."""
        return len(self.words)


def read_hotwords(path: Path) -> Hotwords:
    """Return the words of a file; empty lines are passed over.

    Raises:
        DataError: the file is missing, too large, not UTF-8, has a byte order mark or a NUL, or holds no word; a word
            is too long, stands there twice, or has a reading that is not kana. File and line are named.
    """
    if not path.is_file():
        raise DataError(path, "no such file", "check the path of the hotwords")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(path, f"is larger than {MAX_FILE_BYTES >> 10} KiB", "keep the words that matter")
    return _collect(((f"{path}:{number}", line) for number, line in lines_of(path)), str(path))


def parse_hotwords(lines: Iterable[str], source: str = "hotwords") -> Hotwords:
    """Return the words of lines as a file has them; `source` stands for the file in messages.

    Raises:
        DataError: as `read_hotwords`.
    """
    filled = ((f"{source}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    return _collect(filled, source)


def _collect(lines: Iterable[tuple[str, str]], source: str) -> Hotwords:
    """Return the words of (place, line) pairs."""
    first_at: dict[Hotword, str] = {}
    for where, line in lines:
        word = _parse(where, line)
        if word in first_at:
            what = f"{word.surface} stands here twice, first at {first_at[word]}"
            raise DataError(where, what, "delete one of its lines, or give it another reading")
        if len(first_at) == MAX_WORDS:
            raise DataError(where, f"is word {MAX_WORDS + 1}, and {MAX_WORDS} are read", "keep the words that matter")
        first_at[word] = where
    if not first_at:
        raise DataError(source, "holds no word", "write one word a line, its reading after a tab")
    return Hotwords(tuple(first_at))


def _parse(where: str, line: str) -> Hotword:
    """Return the word of a line."""
    fields = [unicodedata.normalize("NFC", field.strip(" \u3000")) for field in line.split("\t")]
    if len(fields) > 2:  # noqa: PLR2004 - a surface and a reading
        raise DataError(where, f"has {len(fields)} columns", "write the word, a tab, and its reading")
    surface, given = fields[0], fields[1] if len(fields) > 1 else ""
    if not surface:
        raise DataError(where, "has no word before the tab", "write the word, a tab, and its reading")
    if not surface.isprintable():
        raise DataError(where, f"the word {surface!r} holds a character that cannot be printed", "delete it")
    for what, text, most in (("word", surface, MAX_SURFACE_CHARS), ("reading", given, MAX_READING_CHARS)):
        if len(text) > most:
            raise DataError(where, f"the {what} is longer than {most} characters", "give a word, not a sentence")
    return Hotword(surface, _reading(where, surface, given))


def _reading(where: str, surface: str, given: str) -> str:
    """Return how a word sounds: as given, or as the analyser reads it."""
    if given and not all(_is_kana(char) for char in unicodedata.normalize("NFKC", given)):
        raise DataError(where, f"the reading {given!r} is not kana", "write it in hiragana or katakana")
    kana = plain_kana(given) if given else katakana_reading(surface)
    if not kana:
        raise DataError(where, f"how {surface!r} is read is not known", "add its reading in kana after a tab")
    return sound_key(kana)


def _is_kana(char: str) -> bool:
    return char in _MARKS or "ぁ" <= char <= "ゖ" or "ァ" <= char <= "ヺ"

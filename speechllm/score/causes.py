"""Why an utterance has errors: every edit of the plain alignment under one cause.

A forgiven pair explains the edits inside it: spelling, homophone, numeral, katakana. The rest is judged by its shape:
an empty hypothesis, a lost end, a loop, a long insertion, and otherwise by the characters of the differing stretch.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.text.reading import loanword_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from speechllm.score.errors import Step
    from speechllm.score.lenient import Morphemes

CAUSES = {
    "spelling": "same word, other writing: kanji or kana, okurigana, variant kanji",
    "homophone": "another word that sounds the same, written in kanji",
    "numeral": "a number in another form, or another number",
    "katakana": "katakana and long vowels",
    "phonetic": "another sound",
    "dropped": "words left out",
    "added": "words put in",
    "symbol": "punctuation and symbols",
    "truncation": "the beginning or the end is missing",
    "loop": "the same text again and again",
    "hallucination": "a long stretch that was not said",
    "empty": "nothing was written",
}
"""Every cause, in the order of reports."""

LONG_INSERTION_CHARS = 10
"""An insertion of so many characters is not a slip."""
TRUNCATED_CHARS = 5
TRUNCATED_SHARE = 0.2
"""A lost end has at least so many characters and at least so large a share of the reference."""
_LOOP = re.compile(r"(.{1,20}?)\1{3,}", re.DOTALL)
_NUMERAL = re.compile("[0-9０-９〇零一二三四五六七八九十百千万億兆]")
_NUMBER_WORD = re.compile("第?[0-9０-９〇零一二三四五六七八九十百千万億兆点]+[つ人日月年回番]?目?")
_NUMERALS_ONLY = re.compile("[0-9０-９〇零一二三四五六七八九十百千万億兆点.,]+")
_KATAKANA_ONLY = re.compile("[ァ-ヴーぁぃぅぇぉっゃゅょ]+")
_KANJI = re.compile("[㐀-䶿一-鿿豈-﫿々𠀀-𲎯]")


@dataclass(frozen=True, slots=True)
class Forgiven:
    """A differing pair that reads alike, and which kind of likeness it is."""

    ref: str
    hyp: str
    cause: str


def forgiven_pairs(steps: Sequence[Step], ref_units: Morphemes, hyp_units: Morphemes) -> list[Forgiven]:
    """The pairs that a lenient alignment forgave, in order, with their causes."""
    pairs = []
    for step in steps:
        if step.kind == "alike":
            ref = _units_of(ref_units, step.ref_start, step.ref_end)
            hyp = _units_of(hyp_units, step.hyp_start, step.hyp_end)
            pairs.append(_forgiven(ref, hyp))
    return pairs


def _units_of(units: Morphemes, start: int, end: int) -> Morphemes:
    """The morphemes that make up a character range which begins and ends at their borders."""
    found, at = [], 0
    for unit in units:
        if start <= at < end:
            found.append(unit)
        at += len(unit.surface)
    return found


def _forgiven(ref_units: Morphemes, hyp_units: Morphemes) -> Forgiven:
    """One forgiven pair with its cause."""
    ref = "".join(unit.surface for unit in ref_units)
    hyp = "".join(unit.surface for unit in hyp_units)
    same_lemmas = [unit.lemma for unit in ref_units] == [unit.lemma for unit in hyp_units]
    ref_kanji, hyp_kanji = Counter(_KANJI.findall(ref)), Counter(_KANJI.findall(hyp))
    nested = not ref_kanji - hyp_kanji or not hyp_kanji - ref_kanji
    if loanword_key(ref) and loanword_key(hyp):
        cause = "katakana"
    elif _is_number_form(ref, hyp):
        cause = "numeral"
    else:
        cause = "spelling" if same_lemmas or nested else "homophone"
    return Forgiven(ref, hyp, cause)


def _is_number_form(ref: str, hyp: str) -> bool:
    """Whether a side is a number, alone or with the commonest counters, and no side only contains a numeral kanji."""
    with_numeral = [text for text in (ref, hyp) if _NUMERAL.search(text)]
    return bool(with_numeral) and all(map(_NUMBER_WORD.fullmatch, with_numeral))


def edit_causes(
    ref: str, hyp: str, plain: Sequence[Step], lenient: Sequence[Step], forgiven: Sequence[Forgiven]
) -> Counter[str]:
    """Number of edits of the plain alignment by cause; they add up to all its edits."""
    causes: Counter[str] = Counter()
    explained = _explained_positions(lenient, forgiven)
    loops = _loop_positions(ref, hyp)
    for region in regions(plain):
        ref_text, hyp_text = (
            ref[region[0].ref_start : region[-1].ref_end],
            hyp[region[0].hyp_start : region[-1].hyp_end],
        )
        local = _local_cause(ref_text, hyp_text)
        for step in region:
            shape = _shape_cause(step, ref, hyp)
            for side, at in _edit_positions(step):
                likeness = explained.get((side, at))
                looped = "loop" if side == "hyp" and at in loops else None
                causes[likeness or shape or looped or local] += 1
    return causes


def main_cause(causes: Counter[str]) -> str:
    """The cause of most edits, the first in the order of reports among equals; ``correct`` without edits."""
    if not causes:
        return "correct"
    order = list(CAUSES)
    return max(causes, key=lambda cause: (causes[cause], -order.index(cause)))


def _edit_positions(step: Step) -> Iterator[tuple[str, int]]:
    """Where each edit of a step is: in the hypothesis for insertions, else in the reference."""
    if step.kind == "ins":
        yield from (("hyp", at) for at in range(step.hyp_start, step.hyp_end))
    else:
        yield from (("ref", at) for at in range(step.ref_start, step.ref_end))


def _explained_positions(lenient: Sequence[Step], forgiven: Sequence[Forgiven]) -> dict[tuple[str, int], str]:
    """Cause of every position, of either side, inside a forgiven pair."""
    explained: dict[tuple[str, int], str] = {}
    pairs = iter(forgiven)
    for step in lenient:
        if step.kind == "alike":
            cause = next(pairs).cause
            explained.update((("ref", at), cause) for at in range(step.ref_start, step.ref_end))
            explained.update((("hyp", at), cause) for at in range(step.hyp_start, step.hyp_end))
    return explained


def _loop_positions(ref: str, hyp: str) -> set[int]:
    """Positions of the hypothesis in a run of repeats that is long, and that the reference does not hold."""
    if len(hyp) - len(ref) < LONG_INSERTION_CHARS:
        return set()
    return {
        at
        for match in _LOOP.finditer(hyp)
        if len(match[0]) >= LONG_INSERTION_CHARS and match[0] not in ref
        for at in range(match.start(), match.end())
    }


def regions(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Stretches of an alignment without an equal character or a forgiven pair inside."""
    region: list[Step] = []
    for step in steps:
        if step.kind not in {"equal", "alike"}:
            region.append(step)
        elif region:
            yield region
            region = []
    if region:
        yield region


def _shape_cause(step: Step, ref: str, hyp: str) -> str | None:
    """Cause that a step's size and place give away, whatever its text is."""
    if not hyp:
        return "empty"
    length = max(step.ref_end - step.ref_start, step.hyp_end - step.hyp_start)
    at_an_end = step.ref_start == 0 or step.ref_end == len(ref)
    if step.kind == "del" and at_an_end and length >= max(TRUNCATED_CHARS, TRUNCATED_SHARE * len(ref)):
        return "truncation"
    if step.kind == "ins" and length >= LONG_INSERTION_CHARS:
        return "loop" if _LOOP.search(hyp[step.hyp_start : step.hyp_end]) else "hallucination"
    return None


def _local_cause(ref: str, hyp: str) -> str:
    """Cause of a differing stretch by the characters on its two sides."""
    both = ref + hyp
    if not any(char.isalnum() or _KANJI.match(char) for char in both.replace("ー", "")):
        return "katakana" if "ー" in both else "symbol"
    if _NUMERALS_ONLY.fullmatch(both):
        return "numeral"
    if _KATAKANA_ONLY.fullmatch(both):
        return "katakana"
    if not ref or not hyp:
        return "added" if hyp else "dropped"
    return "phonetic"

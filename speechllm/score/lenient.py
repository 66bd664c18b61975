"""Pairs of differing spans that read alike: what a reading-lenient score forgives.

Both sides are cut into UniDic short units. A run of units of the reference and one of the hypothesis make a pair when
they sound alike. The alignment then takes a pair at no cost wherever that saves edits (`errors.align`), so that the
lenient score is the least that any choice of pairs gives, and never above the plain one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from speechllm.score.errors import Pair, Step
from speechllm.text.reading import loanword_key, sound_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from speechllm.text.reading import Morpheme

MAX_MORPHEMES = 8
"""Longest run of morphemes that is compared as one; numbers are the longest."""
MAX_NEIGHBOURS = 8
"""Of many runs that sound alike (loops), only so many of the nearest on each side become pairs."""

Span = tuple[int, int]
Morphemes = Sequence["Morpheme"]
"""A text cut into morphemes; their surfaces join to the text."""


def alike_pairs(steps: Sequence[Step], ref_units: Morphemes, hyp_units: Morphemes) -> list[Pair]:
    """Pairs of spans that differ in writing, sound alike, and touch a difference of the plain alignment ``steps``."""
    differences = [step for step in steps if step.kind != "equal"]
    if not differences:
        return []
    ref, hyp = surface(ref_units), surface(hyp_units)
    ref_spans = _spans_by_sound(ref_units, [(step.ref_start, step.ref_end) for step in differences])
    hyp_spans = _spans_by_sound(hyp_units, [(step.hyp_start, step.hyp_end) for step in differences])
    hyp_sorted = {sound: sorted(hyp_spans[sound]) for sound in ref_spans.keys() & hyp_spans.keys()}
    to_hyp = _projection(steps)
    found = {
        (*ref_span, *hyp_span)
        for sound, candidates in hyp_sorted.items()
        for ref_span in ref_spans[sound]
        for hyp_span in _nearest(candidates, to_hyp[ref_span[0]])
        if ref[slice(*ref_span)] != hyp[slice(*hyp_span)]
    }
    return [Pair(*bounds) for bounds in sorted(found)]


def surface(units: Morphemes) -> str:
    """The text that morphemes were cut from."""
    return "".join(unit.surface for unit in units)


def _spans_by_sound(units: Morphemes, regions: Sequence[Span]) -> dict[str, set[Span]]:
    """Runs of morphemes that touch a region, by how they sound; loanwords also by their variant-free form."""
    spans: dict[str, set[Span]] = defaultdict(set)
    for span, run in _runs(units, regions):
        reading = "".join(unit.reading for unit in run)
        spans[sound_key(reading)].add(span)
        if variant := loanword_key(surface(run)):
            spans[f"loanword {variant}"].add(span)
    return spans


def _runs(units: Morphemes, regions: Sequence[Span]) -> Iterator[tuple[Span, Morphemes]]:
    """Runs of up to MAX_MORPHEMES morphemes, each with a reading, that touch a region."""
    bounds = [0]
    for unit in units:
        bounds.append(bounds[-1] + len(unit.surface))
    for first in sorted(_first_morphemes(bounds, regions)):
        for last in range(first, min(first + MAX_MORPHEMES, len(units))):
            if not units[last].reading:
                break
            span = bounds[first], bounds[last + 1]
            if any(_touches(span, region) for region in regions):
                yield span, units[first : last + 1]


def _first_morphemes(bounds: Sequence[int], regions: Iterable[Span]) -> set[int]:
    """Morphemes at which a run that touches a region can start."""
    firsts: set[int] = set()
    for start, end in regions:
        nearest = max(0, bisect_left(bounds, start) - MAX_MORPHEMES)
        farthest = bisect_left(bounds, max(end, start + 1))
        firsts.update(range(nearest, min(farthest + 1, len(bounds) - 1)))
    return firsts


def _touches(span: Span, region: Span) -> bool:
    """Whether a span overlaps a region; a region without length is touched by what borders on it."""
    if region[0] == region[1]:
        return span[0] <= region[0] <= span[1]
    return span[0] < region[1] and region[0] < span[1]


def _projection(steps: Sequence[Step]) -> list[int]:
    """For every position of the reference, end included, the position of the hypothesis aligned with it."""
    positions: list[int] = []
    for step in steps:
        last = max(step.hyp_start, step.hyp_end - 1)
        positions += [min(step.hyp_start + at, last) for at in range(step.ref_end - step.ref_start)]
    return [*positions, steps[-1].hyp_end if steps else 0]


def _nearest(spans: Sequence[Span], position: int) -> Sequence[Span]:
    """The spans that start nearest a position, MAX_NEIGHBOURS before it and as many after."""
    at = bisect_left(spans, (position, 0))
    return spans[max(0, at - MAX_NEIGHBOURS) : at + MAX_NEIGHBOURS]

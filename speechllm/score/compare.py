"""Whether systems differ: paired bootstrap and matched-pairs test of every two systems, on the same utterances."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from speechllm.score import stats
from speechllm.score.errors import align
from speechllm.score.metrics import Bootstrap, micro_columns
from speechllm.text import reading

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from speechllm.score.errors import Step
    from speechllm.score.utterance import UttScore

COMPARED_METRICS = ("cer", "cer_lenient", "wer")
MIN_GOOD_TOKENS = 2
"""Tokens that both systems have right in a row end a segment, as in sclite's mapsswe."""
NOT_DISTINGUISHABLE = "not distinguishable"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two systems under one metric; differences are first minus second, so a negative one favours the first."""

    metric: str
    first: str
    second: str
    difference: stats.Difference
    matched_pairs: stats.MatchedPairs

    @property
    def verdict(self) -> str:
        """Which system is better, or that the interval of the difference holds 0."""
        if not self.difference.is_real:
            return NOT_DISTINGUISHABLE
        return f"{self.first if self.difference.value < 0 else self.second} is better"

    def as_dict(self) -> dict[str, object]:
        """The record of a JSON file."""
        interval = self.difference.interval
        return {
            "metric": self.metric,
            "first": self.first,
            "second": self.second,
            "difference": self.difference.value,
            "ci95": [interval.low, interval.high],
            "p": self.difference.p,
            "mapsswe": asdict(self.matched_pairs),
            "verdict": self.verdict,
        }


def compare_systems(
    systems: Mapping[str, Sequence[UttScore]], metrics: Sequence[str], bootstrap: Bootstrap
) -> list[Comparison]:
    """Every two systems under every metric; each system scored the same utterances in the same order."""
    found = []
    for metric in metrics:
        flags = {name: [_steps(score, metric) for score in scores] for name, scores in systems.items()}
        columns = {name: micro_columns([one.counts[metric] for one in scores]) for name, scores in systems.items()}
        for first, second in combinations(systems, 2):
            segments = [
                pair for steps in zip(flags[first], flags[second], strict=True) for pair in segment_errors(*steps)
            ]
            errors = np.array(segments, dtype=np.float64).reshape(-1, 2)
            found.append(
                Comparison(
                    metric,
                    first,
                    second,
                    stats.paired_difference(columns[first], columns[second], bootstrap.count, bootstrap.seed),
                    stats.matched_pairs(errors[:, 0], errors[:, 1]),
                )
            )
    return found


def _steps(score: UttScore, metric: str) -> list[Step]:
    """The alignment that a metric counts."""
    if metric == "wer":
        return align(reading.words(score.ref_norm), reading.words(score.hyp_norm))
    if metric == "cer_lenient":
        assert score.leniency is not None, "cer_lenient was not computed"
        return score.leniency.steps
    return score.steps


def segment_errors(first: Sequence[Step], second: Sequence[Step]) -> list[tuple[int, int]]:
    """Errors of two systems in each segment of an utterance, from their alignments with one reference.

    A segment is a stretch with errors of either system, bounded by MIN_GOOD_TOKENS tokens that both have right or
    by the ends of the utterance (Gillick and Cox 1989; SCTK, doc/statdesc.htm).
    """
    errors = np.stack([_slot_errors(first), _slot_errors(second)])
    segments: list[tuple[int, int]] = []
    last_slot = None
    for slot in np.flatnonzero(errors.any(axis=0)).tolist():
        here = (int(errors[0, slot]), int(errors[1, slot]))
        if last_slot is not None and slot // 2 - (last_slot + 1) // 2 < MIN_GOOD_TOKENS:
            segments[-1] = (segments[-1][0] + here[0], segments[-1][1] + here[1])
        else:
            segments.append(here)
        last_slot = slot
    return segments


def _slot_errors(steps: Sequence[Step]) -> NDArray[np.int64]:
    """Errors at each place of a reference of n tokens, (2n + 1,): gap 0, token 0, gap 1, ..., token n-1, gap n."""
    num_tokens = steps[-1].ref_end if steps else 0
    slots = np.zeros(2 * num_tokens + 1, dtype=np.int64)
    for step in steps:
        if step.kind == "ins":
            slots[2 * step.ref_start] += step.hyp_end - step.hyp_start
        elif step.kind in {"sub", "del"}:
            slots[2 * step.ref_start + 1 : 2 * step.ref_end : 2] = 1
    return slots


def comparison_text(comparisons: Iterable[Comparison], order: Sequence[str]) -> str:
    """Comparisons for a terminal: one line each, and per metric a matrix where there are more than two systems."""
    lines = []
    by_metric: dict[str, list[Comparison]] = {}
    for one in comparisons:
        by_metric.setdefault(one.metric, []).append(one)
    for metric, members in by_metric.items():
        lines += [metric, *(f"  {_line(one)}" for one in members)]
        if len(order) > 2:  # noqa: PLR2004 - two systems need no matrix
            lines += _matrix(members, order)
    return "\n".join(lines) + "\n"


def _line(one: Comparison) -> str:
    """One comparison in words and numbers, rates in per cent."""
    interval = one.difference.interval
    return (
        f"{one.first} - {one.second}: {100 * one.difference.value:+.2f}"
        f" [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}] p={one.difference.p:.3f},"
        f" mapsswe z={one.matched_pairs.z:+.2f} p={one.matched_pairs.p:.3f}: {one.verdict}"
    )


def _matrix(members: Sequence[Comparison], order: Sequence[str]) -> list[str]:
    """Row minus column in per cent; ``~`` where the two are not distinguishable."""
    cells: dict[tuple[str, str], str] = {}
    for one in members:
        mark = "" if one.difference.is_real else "~"
        cells[one.first, one.second] = f"{100 * one.difference.value:+.2f}{mark}"
        cells[one.second, one.first] = f"{-100 * one.difference.value:+.2f}{mark}"
    width = max(8, *(len(name) for name in order))
    head = " ".join(name.rjust(width) for name in ("", *order))
    rows = [
        " ".join(cell.rjust(width) for cell in (row, *(cells.get((row, column), "-") for column in order)))
        for row in order
    ]
    return [f"  {line}" for line in (f"{head}   (row minus column, ~ {NOT_DISTINGUISHABLE})", *rows)]

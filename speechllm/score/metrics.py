"""The rates of a set of utterances, each with its interval, from the edit counts of the utterances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from speechllm.score import stats
from speechllm.score.errors import Counts, sum_counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MICRO_METRICS = ("cer", "wer", "cer_lenient", "kana_cer", "ser")
"""Edits of the set over reference length of the set; ``ser`` counts a wrong utterance as one substitution."""
MACRO_METRIC = "macro_cer"
"""Mean of the utterances' CER, those with an empty reference left out."""

Metric = TypedDict(
    "Metric",
    {
        "value": float,
        "ci95": list[float],
        "sub": int,
        "del": int,
        "ins": int,
        "ref": int,
        "signature": str,
    },
)
"""One metric of a set as it stands in score.json: rates are fractions, counts integers in the metric's unit."""

Totals = tuple["NDArray[np.float64]", "NDArray[np.float64]"]


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals are drawn."""

    count: int = 1000
    """Samples of the utterances; 0 leaves each interval at the value itself."""
    seed: int = 0
    """Same seed, same utterances: same interval."""


def summarise(
    counts: Mapping[str, Sequence[Counts]], signatures: Mapping[str, str], bootstrap: Bootstrap
) -> dict[str, Metric]:
    """Metrics of a set from each metric's counts per utterance; ``cer`` also gives ``macro_cer``.

    All intervals come from the same samples of utterances, drawn over utterances in the order given.
    """
    names = [name for name in MICRO_METRICS if name in counts]
    fractions = {name: micro_columns(counts[name]) for name in names}
    totals = {name: sum_counts(counts[name]) for name in names}
    if "cer" in counts:
        fractions[MACRO_METRIC] = macro_columns(counts["cer"])
        totals[MACRO_METRIC] = totals["cer"]
    intervals = _intervals(fractions, bootstrap)
    return {
        name: _metric(_ratio(*fractions[name]), intervals[name], totals[name], signatures[name]) for name in fractions
    }


def micro_columns(counts: Sequence[Counts]) -> Totals:
    """Edits and reference lengths of the utterances, (utterances,) each."""
    return (
        np.array([one.edits for one in counts], dtype=np.float64),
        np.array([one.ref for one in counts], dtype=np.float64),
    )


def macro_columns(counts: Sequence[Counts]) -> Totals:
    """Rates of the utterances and a 1 for each that has a rate, (utterances,) each."""
    edits, refs = micro_columns(counts)
    has_rate = (refs > 0).astype(np.float64)
    return edits * has_rate / np.maximum(refs, 1), has_rate


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> float:
    """Sum over sum; without any reference 0 where nothing was written and 1 where something was."""
    whole = float(denominator.sum())
    return float(numerator.sum()) / whole if whole else float(numerator.sum() > 0)


def _intervals(fractions: Mapping[str, Totals], bootstrap: Bootstrap) -> dict[str, stats.Interval]:
    """Bootstrap interval of each ratio of sums."""
    if not bootstrap.count:
        return {name: stats.Interval(_ratio(*pair), _ratio(*pair)) for name, pair in fractions.items()}
    columns = np.stack([column for pair in fractions.values() for column in pair], axis=1)
    sums = stats.resampled_sums(columns, bootstrap.count, bootstrap.seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = sums[:, 0::2] / sums[:, 1::2]
    return {name: stats.percentile_interval(ratios[:, at]) for at, name in enumerate(fractions)}


def _metric(value: float, interval: stats.Interval, total: Counts, signature: str) -> Metric:
    """The record of one metric."""
    return {
        "value": value,
        "ci95": [interval.low, interval.high],
        "sub": total.sub,
        "del": total.dele,
        "ins": total.ins,
        "ref": total.ref,
        "signature": signature,
    }

"""Intervals and significance of error rates: bootstrap over utterances, and the matched-pairs test.

Sources: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (ICASSP 2004);
Gillick and Cox, "Some statistical issues in the comparison of speech recognition algorithms" (ICASSP 1989).
Callers give utterances sorted by id, so that a result depends on the data and the seed alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """The two ends of a 95 % confidence interval."""

    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether 0 lies in the interval, its ends included."""
        return self.low <= 0.0 <= self.high


def resampled_sums(columns: NDArray[np.float64], count: int, seed: int) -> NDArray[np.float64]:
    """Column sums of ``count`` samples of the utterances, drawn with replacement.

    ``columns`` is (utterances, quantities), the result (count, quantities). All quantities see the same samples, so
    differences of systems are paired.
    """
    generator = np.random.default_rng(seed)
    num_utts = len(columns)
    sums = np.empty((count, columns.shape[1]))
    for sample in range(count):
        drawn = generator.integers(num_utts, size=num_utts)
        sums[sample] = np.bincount(drawn, minlength=num_utts) @ columns
    return sums


def percentile_interval(values: NDArray[np.float64]) -> Interval:
    """The middle 95 % of bootstrap values; values that are not numbers (no reference drawn) are left out."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(0.0, 0.0)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))


@dataclass(frozen=True, slots=True)
class Difference:
    """How much two systems differ in a rate, first minus second."""

    value: float
    interval: Interval
    p: float
    """Two-sided, from the share of samples on the other side of 0; at least 1 / (samples + 1)."""

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.interval.holds_zero


@dataclass(frozen=True, slots=True)
class MatchedPairs:
    """Result of the matched-pairs sentence-segment test."""

    num_segments: int
    mean: float
    """Mean difference of errors in a segment, first system minus second."""
    z: float
    p: float
    """Two-sided, from the normal distribution."""


def paired_difference(
    first: tuple[NDArray[np.float64], NDArray[np.float64]],
    second: tuple[NDArray[np.float64], NDArray[np.float64]],
    count: int,
    seed: int,
) -> Difference:
    """Difference of two systems' rates with its interval, both drawn over the same utterances.

    Each system is (edits, reference lengths), (utterances,) both, in the same order of utterances.
    """
    columns = np.stack([*first, *second], axis=1)
    whole = columns.sum(axis=0)
    sums = resampled_sums(columns, count, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
    samples = samples[np.isfinite(samples)]
    value = float(whole[0] / max(1.0, whole[1]) - whole[2] / max(1.0, whole[3]))
    other_side = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    return Difference(value, percentile_interval(samples), min(1.0, 2 * (other_side + 1) / (len(samples) + 1)))


def matched_pairs(first: NDArray[np.float64], second: NDArray[np.float64]) -> MatchedPairs:
    """Matched-pairs test on errors of two systems in the same segments, (segments,) both (Gillick and Cox 1989).

    Where all segments differ by the same amount the spread is taken to be that amount, not 0.
    """
    gaps = first - second
    num_segments = len(gaps)
    mean = float(gaps.mean()) if num_segments else 0.0
    spread = (float(gaps.std(ddof=1)) if num_segments > 1 else 0.0) or abs(mean)
    if not spread:
        return MatchedPairs(num_segments, mean, 0.0, 1.0)
    z = mean / (spread / math.sqrt(num_segments))
    return MatchedPairs(num_segments, mean, z, math.erfc(abs(z) / math.sqrt(2)))

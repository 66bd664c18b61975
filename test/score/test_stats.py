"""Intervals and tests of significance."""

from __future__ import annotations

import numpy as np
import pytest

from speechllm.score.stats import Interval, matched_pairs, paired_difference, percentile_interval, resampled_sums


def test_resamples_depend_on_the_seed_alone() -> None:
    columns = np.arange(20, dtype=np.float64).reshape(10, 2)
    assert np.array_equal(resampled_sums(columns, 5, seed=1), resampled_sums(columns, 5, seed=1))
    assert not np.array_equal(resampled_sums(columns, 5, seed=1), resampled_sums(columns, 5, seed=2))


def test_resamples_draw_as_many_utterances_as_there_are() -> None:
    ones = np.ones((7, 1))
    assert resampled_sums(ones, 4, seed=0).tolist() == [[7.0]] * 4


def test_an_interval_holds_the_middle_95_percent() -> None:
    interval = percentile_interval(np.arange(1001, dtype=np.float64))
    assert (interval.low, interval.high) == pytest.approx((25, 975))


def test_the_interval_of_a_mean_has_the_width_that_theory_gives() -> None:
    generator = np.random.default_rng(0)
    edits = generator.binomial(30, 0.1, size=2000).astype(np.float64)
    difference = paired_difference((edits, np.full(2000, 30.0)), (np.zeros(2000), np.full(2000, 30.0)), 2000, 0)
    width = difference.interval.high - difference.interval.low
    expected = 2 * 1.96 * edits.std() / np.sqrt(2000) / 30
    assert width == pytest.approx(expected, rel=0.08)


def test_values_that_are_not_numbers_are_left_out() -> None:
    assert percentile_interval(np.array([np.nan, np.inf, 1.0])) == Interval(1.0, 1.0)
    assert percentile_interval(np.array([np.nan])) == Interval(0.0, 0.0)


def test_equal_systems_are_not_distinguishable() -> None:
    edits, refs = np.array([1.0, 0, 3, 2]), np.array([10.0, 10, 10, 10])
    difference = paired_difference((edits, refs), (edits, refs), 200, 0)
    assert (difference.value, difference.p, difference.is_real) == (0.0, 1.0, False)
    assert matched_pairs(edits, edits).p == 1.0


def test_a_system_that_is_always_better_is_better() -> None:
    refs = np.full(50, 10.0)
    worse = 2 + (np.arange(50) % 3).astype(np.float64)
    difference = paired_difference((np.ones(50), refs), (worse, refs), 200, 0)
    assert difference.is_real
    assert difference.value == pytest.approx((50 - worse.sum()) / 500)
    assert difference.p == pytest.approx(2 / 201)


def test_matched_pairs_by_hand() -> None:
    """Differences 1, 0, 1: mean 2/3, deviation 0.577, z 2, as SCTK's test1a.stats.mapsswe prints."""
    result = matched_pairs(np.array([1.0, 5, 3]), np.array([0.0, 5, 2]))
    assert result.num_segments == 3
    assert [result.mean, result.z] == pytest.approx([2 / 3, 2.0])
    assert result.p == pytest.approx(0.0455, abs=1e-4)


def test_matched_pairs_without_spread_or_segments() -> None:
    assert matched_pairs(np.array([]), np.array([])).p == 1.0
    assert matched_pairs(np.full(4, 2.0), np.full(4, 1.0)).z == pytest.approx(2.0)

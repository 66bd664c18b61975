"""Batches: every utterance once, within the budget, the same for the same seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest

from speechllm.data.batch import JITTER, budget_batches, packed_batches, padding_waste


def _sizes(count: int = 400, longest: int = 200) -> dict[str, int]:
    drawn = np.random.default_rng(3).integers(10, longest, count)
    return {f"u{number:03d}": int(size) for number, size in enumerate(drawn)}


@pytest.mark.parametrize("budget", [200, 1_000, 10**6])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_utterance_is_in_one_batch_and_no_batch_is_over_budget(budget: int, epoch: int) -> None:
    sizes = _sizes()
    batches = budget_batches(sizes, budget, 1, epoch)
    assert sorted(utt_id for batch in batches for utt_id in batch) == sorted(sizes)
    assert all(max(sizes[utt_id] for utt_id in batch) * len(batch) <= budget for batch in batches)


def test_a_budget_that_holds_all_gives_one_batch() -> None:
    assert len(budget_batches(_sizes(), 10**6, 1, 0)) == 1


def test_an_utterance_over_the_budget_stands_alone() -> None:
    sizes = {"long": 500, "longer": 900, "a": 10, "b": 10}
    batches = budget_batches(sizes, 100, 1, 0)
    assert sorted(sorted(batch) for batch in batches) == [["a", "b"], ["long"], ["longer"]]


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    sizes = _sizes()
    first = budget_batches(sizes, 1_000, 1, 0)
    shuffled = dict(sorted(sizes.items(), key=lambda item: item[1]))
    assert budget_batches(shuffled, 1_000, 1, 0) == first
    assert budget_batches(sizes, 1_000, 1, 1) != first
    assert budget_batches(sizes, 1_000, 2, 0) != first


def test_neighbours_change_from_epoch_to_epoch() -> None:
    sizes = _sizes()
    one, two = ({frozenset(batch) for batch in budget_batches(sizes, 1_000, 1, epoch)} for epoch in (0, 1))
    assert len(one & two) < len(one) / 2


def test_the_global_generator_is_left_alone() -> None:
    before = str(np.random.get_state())  # noqa: NPY002 - the global one is what is tested
    budget_batches(_sizes(), 1_000, 1, 0)
    assert str(np.random.get_state()) == before  # noqa: NPY002


def test_like_lengths_stand_together() -> None:
    sizes = _sizes(2_000)
    batches = budget_batches(sizes, 2_000, 1, 0)
    assert padding_waste(batches, sizes) < 2 * JITTER
    lengths = [sizes[batch[0]] for batch in batches]
    assert lengths != sorted(lengths)  # but batches come in no order of length


def test_padding_is_what_the_shorter_ones_of_a_batch_lack() -> None:
    assert padding_waste([["a", "b"], ["c"]], {"a": 4, "b": 1, "c": 2}) == pytest.approx(0.3)


def test_nothing_gives_no_batches() -> None:
    assert budget_batches({}, 100, 1, 0) == []


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_packed_batch_holds_what_sums_up_to_the_budget(epoch: int) -> None:
    sizes = _sizes()
    batches = packed_batches(sizes, 1_000, 1, epoch)
    assert sorted(utt_id for batch in batches for utt_id in batch) == sorted(sizes)
    assert all(sum(sizes[utt_id] for utt_id in batch) <= 1_000 for batch in batches)
    assert len(batches) < len(budget_batches(sizes, 1_000, 1, epoch))


def test_packed_batches_are_a_function_of_seed_and_epoch() -> None:
    sizes = _sizes()
    first = packed_batches(sizes, 1_000, 1, 0)
    assert packed_batches(dict(reversed(sizes.items())), 1_000, 1, 0) == first
    assert packed_batches(sizes, 1_000, 1, 1) != first
    assert packed_batches(sizes, 1_000, 2, 0) != first


def test_packed_batches_are_about_as_few_as_can_be() -> None:
    sizes = _sizes(4_000)
    assert len(packed_batches(sizes, 8_192, 1, 0)) <= sum(sizes.values()) / 8_192 + 2


def test_an_utterance_over_the_packed_budget_stands_alone() -> None:
    batches = packed_batches({"long": 500, "a": 10, "b": 10}, 100, 1, 0)
    assert sorted(sorted(batch) for batch in batches) == [["a", "b"], ["long"]]

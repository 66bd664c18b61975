"""Batches of utterances of like length, within a budget of positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from speechllm.runtime import derive_seed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OPEN_BATCHES = 64  # that a packed utterance may still join
LIKE = 1.2
JITTER = 0.1  # of a length: so that an utterance meets other neighbours in every epoch


def budget_batches(sizes: Mapping[str, int], budget: int, seed: int, epoch: int) -> list[list[str]]:
    """Return the utterance ids of each batch of an epoch, in training order.

    A batch holds utterances of like size; its longest size times its number is at most `budget` (one utterance that
    is longer stands alone). A pure function of its arguments.
    """
    rng = np.random.default_rng(derive_seed("batch", seed, epoch))
    ids = sorted(sizes)
    keys = np.array([sizes[utt_id] for utt_id in ids]) * rng.uniform(1 - JITTER, 1 + JITTER, len(ids))
    batches: list[list[str]] = []
    longest = 0
    for index in np.argsort(keys, kind="stable"):
        utt_id = ids[int(index)]
        longest = max(longest, sizes[utt_id])
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = sizes[utt_id]
        batches[-1].append(utt_id)
    return [batches[int(index)] for index in rng.permutation(len(batches))]


def packed_batches(sizes: Mapping[str, int], budget: int, seed: int, epoch: int) -> list[list[str]]:
    """Return the utterance ids of each batch of an epoch, in training order, where nothing is padded.

    Utterances come in an order drawn anew in every epoch; each goes to the first of the open batches that it still
    fits (first fit), and the sizes of a batch sum up to at most `budget` (one that is larger stands alone). A pure
    function of its arguments.
    """
    rng = np.random.default_rng(derive_seed("batch", seed, epoch))
    ids = sorted(sizes)
    batches: list[list[str]] = []
    left: list[int] = []
    for index in rng.permutation(len(ids)):
        utt_id = ids[int(index)]
        first = max(0, len(batches) - OPEN_BATCHES)
        place = next((n for n in range(first, len(batches)) if sizes[utt_id] <= left[n]), None)
        if place is None:
            batches.append([utt_id])
            left.append(budget - sizes[utt_id])
        else:
            batches[place].append(utt_id)
            left[place] -= sizes[utt_id]
    return [batches[int(index)] for index in rng.permutation(len(batches))]


def like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Return groups of indices of like length, none of which pads a length to more than `LIKE` times itself."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if not groups or lengths[index] > LIKE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(index)
    return groups


def padding_waste(batches: list[list[str]], sizes: Mapping[str, int]) -> float:
    """Return the fraction of positions that are padding."""
    padded = sum(max(sizes[utt_id] for utt_id in batch) * len(batch) for batch in batches)
    true = sum(sizes[utt_id] for batch in batches for utt_id in batch)
    return 1 - true / padded

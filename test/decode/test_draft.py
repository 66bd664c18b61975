"""Drafts: what a head takes a text to be, and how the rest of one is used after a wrong token."""

from __future__ import annotations

import random

import pytest
import torch

from speechllm.config.schema import HeadsConfig
from speechllm.decode.draft import checks, draft, resume
from speechllm.model.ctc import best_path
from speechllm.model.heads import Heads, new_heads

WIDTH_H = 4


def sure_of_its_input(token_ids: list[int]) -> Heads:
    """Return heads whose token head says symbol i where channel i of the frame is the largest."""
    heads = new_heads(HeadsConfig(hidden=WIDTH_H, stride=1), WIDTH_H, token_ids, kana=False)
    head = heads.tokens
    assert head is not None
    with torch.no_grad():
        for convolution in (head.conv1, head.conv2):
            convolution.weight.zero_()
            assert convolution.bias is not None
            convolution.bias.zero_()
            convolution.weight[:, :, 2] = torch.eye(WIDTH_H)
        head.out.weight.copy_(torch.eye(WIDTH_H)[: len(token_ids) + 1])
        head.out.bias.zero_()
    head.eval()
    return heads


def test_a_draft_is_the_best_path_in_the_language_models_ids() -> None:
    heads = sure_of_its_input([70, 50, 90])
    said = [[0, 1, 1, 0, 1, 2, 3, 3], [3, 0, 2]]
    frames_beh = torch.zeros(2, 8, WIDTH_H)
    for row, symbols in enumerate(said):
        frames_beh[row, range(len(symbols)), symbols] = 10.0
    assert draft(heads, frames_beh, [8, 3]) == [(70, 70, 50, 90), (90, 50)]


def test_without_a_token_head_there_is_no_draft() -> None:
    heads = new_heads(HeadsConfig(hidden=2), WIDTH_H, [], kana=True)
    assert draft(heads, torch.zeros(2, 5, WIDTH_H), [5, 4]) == [(), ()]


def test_runs_are_merged_and_blanks_keep_two_apart() -> None:
    scores_qk = torch.eye(3)[[0, 1, 1, 0, 1, 2, 2, 0]]
    assert best_path(scores_qk) == [1, 1, 2]
    assert best_path(torch.zeros(0, 3)) == []


@pytest.mark.parametrize(
    ("tokens", "accepted", "correction", "rest"),
    [
        ([5, 6, 7, 8], 1, 9, (6, 7, 8)),  # it lacked 9
        ([5, 6, 7, 8], 1, 7, (8,)),  # it had said 6 too much
        ([5, 6, 7, 8], 0, 8, ()),
        ([5, 6, 7, 8, 9, 3, 4], 0, 4, (5, 6, 7, 8, 9, 3, 4)),  # too far away to be meant
        ([5, 6, 7], 3, 9, ()),
        ([], 0, 1, ()),
    ],
)
def test_a_draft_goes_on_behind_a_wrong_token(
    tokens: list[int], accepted: int, correction: int, rest: tuple[int, ...]
) -> None:
    assert resume(tokens, accepted, correction) == rest


@pytest.mark.parametrize(
    ("tokens", "forwards"),
    [
        ([1, 2, 3, 4, 5], 2),  # four at a time
        ([1, 2, 3, 4], 2),
        ([], 6),
        ([1, 9, 3, 4, 5], 3),  # one wrong
        ([1, 9, 2, 3, 4, 5], 2),  # one too many
        ([1, 3, 4, 5], 2),  # one too few
        ([9, 9, 9], 6),
        ([1, 2, 3, 4, 5, 8, 8], 2),  # the end comes before the rest of the draft
    ],
)
def test_forwards_that_a_draft_leaves(tokens: list[int], forwards: int) -> None:
    assert checks(tokens, [1, 2, 3, 4, 5, 0])[0] == forwards


def test_no_draft_costs_more_forwards_than_none() -> None:
    drawn = random.Random(3)  # noqa: S311 - no secret
    for _ in range(300):
        text = [drawn.randrange(1, 5) for _ in range(drawn.randrange(12))] + [0]
        tokens = [drawn.randrange(1, 5) for _ in range(drawn.randrange(14))]
        forwards, read = checks(tokens, text)
        assert 1 <= forwards <= len(text)
        assert read >= 0
        assert checks(text[:-1], text, look=99) == (1, len(text) - 1)

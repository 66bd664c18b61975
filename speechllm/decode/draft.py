"""Drafts: what a small head takes a text to be, for the language model to check many tokens in one forward.

A draft never changes a text: the decoder keeps of it only what is its own greedy choice (Leviathan 2023, sec. 2; with
greedy search both sides are certain). A draft that is right saves a forward a token.

Shapes: b batch, e encoder frames, h encoder width, q head frames, k symbols (0 is the blank).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from speechllm.model.ctc import best_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from speechllm.model.heads import Heads

REACH = 6
"""How far ahead in a draft the token is looked for that came instead of the expected one."""
LOOK = 4
"""Draft tokens that are worth reading in one forward (docs/heads.md): more are seldom right, and each is computed."""


@torch.inference_mode()
def draft(heads: Heads, frames_beh: Tensor, frames_b: Sequence[int]) -> list[tuple[int, ...]]:
    """Return for each utterance the tokens that its text may be, in the language model's ids; empty without a head."""
    if heads.tokens is None:
        return [() for _ in frames_b]
    logits_bqk, _, tokens_b = heads.tokens(frames_beh, frames_b)
    paths = (best_path(logits_qk[:count]) for logits_qk, count in zip(logits_bqk, tokens_b, strict=True))
    return [tuple(heads.token_ids[symbol - 1] for symbol in path) for path in paths]


def resume(draft: Sequence[int], accepted: int, correction: int) -> tuple[int, ...]:
    """Return what is left of a draft whose first `accepted` tokens were right and `correction` came after them.

    Where the correction comes soon in the draft, the draft goes on behind it. Else it lacked the correction, for a
    head rather leaves a token out than invents one, and it goes on as it is; a token that was wrong is dropped this way
    too, when the one behind it comes.

    >>> resume([5, 6, 7, 8], 1, 7), resume([5, 6, 7, 8], 1, 9)
    ((8,), (6, 7, 8))
    """
    rest = tuple(draft[accepted:])
    ahead = rest[:REACH]
    return rest[ahead.index(correction) + 1 :] if correction in ahead else rest


def checks(draft: Sequence[int], text: Sequence[int], look: int = LOOK) -> tuple[int, int]:
    """Return the forwards that a text (its end counted) takes with a draft, and the draft tokens that they read.

    Each forward reads `look` tokens of the draft at most, keeps what is right, and gives one token more.

    >>> checks([5, 6, 7], [5, 6, 7, 2])
    (1, 3)
    """
    rest: tuple[int, ...] = tuple(draft)
    forwards = read = done = 0
    while done < len(text):
        looked = rest[:look]
        right = 0
        while right < min(len(looked), len(text) - 1 - done) and looked[right] == text[done + right]:
            right += 1
        forwards, read = forwards + 1, read + len(looked)
        rest = resume(rest, right, text[done + right])
        done += right + 1
    return forwards, read

"""Drafts: what a small head takes a text to be, for the language model to check many tokens in one forward.

A draft never changes a text: the decoder keeps of it only what is its own greedy choice (Leviathan 2023, sec. 2; with
greedy search both sides are certain). A draft that is right saves a forward a token.

Shapes: b batch, e encoder frames, h encoder width, q head frames, k symbols (0 is the blank).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from speechllm.model.heads import best_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from speechllm.model.heads import Heads

REACH = 4
"""How far ahead in a draft the token is looked for that came instead of the expected one."""


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

    The nearest alignment with the fewest tokens left out: where the correction comes soon in the draft, it had said too
    much, and goes on behind it. Else it had taken one token for another.

    >>> resume([5, 6, 7, 8], 1, 7), resume([5, 6, 7, 8], 1, 9)
    ((8,), (7, 8))
    """
    rest = tuple(draft[accepted:])
    ahead = rest[:REACH]
    behind = ahead.index(correction) + 1 if correction in ahead else 1
    return rest[behind:]


def checks(draft: Sequence[int], text: Sequence[int]) -> tuple[int, int]:
    """Return how many forwards a draft leaves of the ``len(text)`` of a text, its end counted, and its tokens read.

    Each forward reads what is left of the draft, keeps what is right, and gives one token more.

    >>> checks([5, 6, 7], [5, 6, 7, 2])
    (1, 3)
    """
    rest: tuple[int, ...] = tuple(draft)
    forwards = read = done = 0
    while done < len(text):
        right = 0
        while right < len(rest) and done + right < len(text) - 1 and rest[right] == text[done + right]:
            right += 1
        forwards, read = forwards + 1, read + len(rest)
        correction = text[done + right]
        done += right + 1
        rest = resume(rest, right, correction)
    return forwards, read

"""Attention over utterances that stand one after another in one row, each for itself.

Shapes: l positions of the row, n positions of one utterance, h heads, c head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "speechllm_packed"
FUSED_DTYPES = (torch.bfloat16, torch.float16)  # of torch's variable-length kernel


@dataclass(frozen=True)
class Segments:
    """Where each utterance of a row begins and ends."""

    lengths: tuple[int, ...]
    bounds: Tensor
    """Beginnings, and the end of the last [n + 1], int32, on the row's device."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        """Return the segments of utterances of these lengths."""
        sums = torch.tensor([0, *lengths], device=device).cumsum(dim=0)
        return cls(tuple(lengths), sums.to(torch.int32))

    def positions(self) -> Tensor:
        """Return position ids [1 l] that begin at 0 in every utterance."""
        device = self.bounds.device
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])[None]


def attend(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query_bhlc: Tensor,
    key_bhlc: Tensor,
    value_bhlc: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return causal attention [b l h c]: within each utterance where `segments` are given, else transformers' own."""
    if segments is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query_bhlc,
            key_bhlc,
            value_bhlc,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **others,
        )
        return found
    assert len(query_bhlc) == 1
    assert dropout == 0.0, "packed rows are trained without dropout in the attention"
    if query_bhlc.is_cuda and query_bhlc.dtype in FUSED_DTYPES:
        return _fused(query_bhlc, key_bhlc, value_bhlc, segments, scaling, sliding_window), None
    return _one_by_one(query_bhlc, key_bhlc, value_bhlc, segments, scaling, sliding_window), None


def _fused(
    query_bhlc: Tensor,
    key_bhlc: Tensor,
    value_bhlc: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Return attention [1 l h c] by torch's variable-length kernel; a window counts the position itself."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(segments.lengths)
    made: Any = varlen_attn(
        query_bhlc[0].transpose(0, 1),
        key_bhlc[0].transpose(0, 1),
        value_bhlc[0].transpose(0, 1),
        segments.bounds,
        segments.bounds,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query_bhlc.shape[1] != key_bhlc.shape[1],
    )
    attended: Tensor = made[None]
    return attended


def _one_by_one(
    query_bhlc: Tensor,
    key_bhlc: Tensor,
    value_bhlc: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Return attention [1 l h c], an utterance at a time."""
    grouped = query_bhlc.shape[1] != key_bhlc.shape[1]
    rows = (query_bhlc, key_bhlc, value_bhlc)
    parts = zip(*(torch.split(row, list(segments.lengths), dim=2) for row in rows), strict=True)
    attended = []
    for query_bhnc, key_bhnc, value_bhnc in parts:
        near = _near(query_bhnc.shape[2], window, query_bhnc.device)
        attended.append(
            nn.functional.scaled_dot_product_attention(
                query_bhnc, key_bhnc, value_bhnc, near, is_causal=near is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2)


def _near(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which positions [n n] each may look at, None where no window cuts any off."""
    if window is None or length <= window:
        return None
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (back >= 0) & (back < window)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

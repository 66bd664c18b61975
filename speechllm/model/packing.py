"""Attention over utterances that stand one after another in one row, each for itself.

Shapes: l positions of the row, n positions of one utterance, h heads, c head width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from speechllm.model.splice import on

if TYPE_CHECKING:
    from collections.abc import Sequence

    Row = tuple[Tensor, Tensor, Tensor]
    """Queries, keys and values [1 h l c]."""

log = logging.getLogger(__name__)

NAME = "speechllm_packed"
FUSED_DTYPES = (torch.bfloat16, torch.float16)  # of torch's variable-length kernel
TRIED_WINDOW = 6  # so that it cuts something off in the few positions of a trial
KERNEL_TOLERANCE = 0.03  # of values around 1 in eight bits of mantissa


class Segments:
    """Where each utterance of a row begins and ends, and what stands before all of them."""

    def __init__(self, lengths: Sequence[int], device: torch.device, shared: int = 0) -> None:
        """Keep the `lengths` of the utterances, which begin behind `shared` positions that each of them sees."""
        self.lengths, self.device, self.shared = tuple(lengths), device, shared
        self._nearby: dict[tuple[int, int | None], Tensor] = {}

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Return the lengths of all stretches of the row, the shared one first."""
        return (self.shared, *self.lengths) if self.shared else self.lengths

    @cached_property
    def positions_1l(self) -> Tensor:
        """Return position ids that go on from the shared stretch anew in every utterance."""
        counted = [np.arange(self.shared), *(np.arange(self.shared, self.shared + n) for n in self.lengths)]
        return on(np.concatenate(counted), self.device)[None]

    @cached_property
    def query_bounds(self) -> Tensor:
        """Return where the stretches begin, and the end of the last, int32."""
        return on(np.cumsum([0, *self.parts]), self.device).int()

    @cached_property
    def key_bounds(self) -> Tensor:
        """Return the same of the keys, where every utterance has the shared ones before its own, int32."""
        return on(np.cumsum([0, *self._seen()]), self.device).int()

    @cached_property
    def key_order(self) -> Tensor:
        """Return which positions of the row the keys come from."""
        shared = np.arange(self.shared)
        begins = self.shared + np.cumsum([0, *self.lengths])
        own = [np.concatenate([shared, np.arange(a, b)]) for a, b in pairwise(begins)]
        return on(np.concatenate([shared, *own]), self.device)

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Return the longest stretch of queries and the longest of keys."""
        return max(self.parts), max(self._seen())

    def _seen(self) -> list[int]:
        seen = [self.shared + length for length in self.lengths]
        return [self.shared, *seen] if self.shared else seen

    def nearby(self, length: int, window: int | None) -> Tensor:
        """Return which keys [n, shared + n] the positions of an utterance look at; made once for all blocks."""
        if (length, window) not in self._nearby:
            at = torch.arange(length, device=self.device)[:, None] + self.shared
            back = at - torch.arange(self.shared + length, device=self.device)
            near = back >= 0 if window is None else (back >= 0) & (back < window)
            self._nearby[length, window] = near
        return self._nearby[length, window]


class Rows(Protocol):
    """The rows of a search, which keep what was read before (`model.slots`)."""

    def attend(self, block: int, row: Row, scale: float | None, window: int | None) -> Tensor:
        """Return attention [1 n h c] of the tokens of a forward, each within its row."""
        ...


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
    slots: Rows | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return causal attention [b l h c]: within `segments` or rows of a search where given, else transformers' own."""
    if slots is not None:
        block: int = module.layer_idx  # type: ignore[assignment] # every block of transformers knows its number
        return slots.attend(block, (query_bhlc, key_bhlc, value_bhlc), scaling, sliding_window), None
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
    how = Kind(scaling, sliding_window, grouped=query_bhlc.shape[1] != key_bhlc.shape[1], dropout=dropout)
    return _within((query_bhlc, key_bhlc, value_bhlc), segments, how), None


@torch.compiler.disable  # type: ignore[untyped-decorator] # the lengths differ in every row
def _within(row: Row, segments: Segments, how: Kind) -> Tensor:
    """Return attention [1 l h c] within each utterance."""
    fused = row[0].is_cuda and row[0].dtype in FUSED_DTYPES and not how.dropout and _kernel_is_right(row, how)
    return _fused(row, segments, how) if fused else _one_by_one(row, segments, how)


@dataclass(frozen=True)
class Kind:
    """What sort of attention a block has."""

    scale: float | None
    window: int | None
    """Positions that one sees, itself among them."""
    grouped: bool
    """Whether several heads of queries share one of keys."""
    dropout: float = 0.0
    """Of the weights, in training; the fused kernel has none."""


def _fused(row: Row, segments: Segments, how: Kind) -> Tensor:
    """Return attention [1 l h c] by torch's variable-length kernel."""
    from torch.nn.attention.varlen import varlen_attn

    query_lhc, key_lhc, value_lhc = (part[0].transpose(0, 1) for part in row)
    if segments.shared:
        key_lhc, value_lhc = (part.index_select(0, segments.key_order) for part in (key_lhc, value_lhc))
    made: Any = varlen_attn(
        query_lhc,
        key_lhc,
        value_lhc,
        segments.query_bounds,
        segments.key_bounds,
        *segments.longest,
        scale=how.scale,
        window_size=(-1 if how.window is None else how.window - 1, 0),
        enable_gqa=how.grouped,
    )
    attended: Tensor = made[None]
    return attended


_proven: dict[tuple[object, ...], bool] = {}


def _kernel_is_right(row: Row, how: Kind) -> bool:
    """Return whether this card's kernel gives what the plain computation does; tried once for each sort of block.

    What a kernel takes as the last key of a query, where there are more keys than queries, differs between releases.
    """
    query_bhlc, key_bhlc, _ = row
    sort = (how, query_bhlc.shape[1], key_bhlc.shape[1], query_bhlc.shape[3], query_bhlc.dtype, query_bhlc.device)
    if sort not in _proven:
        segments = Segments((5, 1, 19), query_bhlc.device, shared=7)
        drawn = torch.Generator(query_bhlc.device).manual_seed(1)
        trial = tuple(
            torch.randn(1, part.shape[1], 32, part.shape[3], generator=drawn, device=part.device, dtype=part.dtype)
            for part in row
        )
        narrow = replace(how, window=None if how.window is None else TRIED_WINDOW)
        with torch.no_grad():
            _proven[sort] = _agree(trial, segments, narrow)  # type: ignore[arg-type] # three parts as there were
    return _proven[sort]


def _agree(trial: Row, segments: Segments, how: Kind) -> bool:
    plain = _one_by_one(trial, segments, how)
    try:
        found = _fused(trial, segments, how)
    except (RuntimeError, ImportError, TypeError) as error:
        log.warning("packed rows without the fused kernel reason=%r", " ".join(str(error).split())[:200])
        return False
    difference = float((found - plain).abs().max())
    if difference > KERNEL_TOLERANCE:
        log.warning("packed rows without the fused kernel, it is off by %g", difference)
    return difference <= KERNEL_TOLERANCE


def _one_by_one(row: Row, segments: Segments, how: Kind) -> Tensor:
    """Return attention [1 l h c], an utterance at a time."""
    dtype = row[0].dtype
    if row[0].device.type == "cpu":  # where the backward pass takes longer in half precision
        row = (row[0].float(), row[1].float(), row[2].float())
    queries, keys, values = (torch.split(part, list(segments.parts), dim=2) for part in row)
    attended = []
    for number, query_bhnc in enumerate(queries):
        key_bhnc, value_bhnc = keys[number], values[number]
        length = query_bhnc.shape[2]
        alone = segments.shared == 0 or number == 0
        if not alone:
            key_bhnc = torch.cat([keys[0], key_bhnc], dim=2)
            value_bhnc = torch.cat([values[0], value_bhnc], dim=2)
        all_seen = alone and (how.window is None or length <= how.window)
        near = None if all_seen else segments.nearby(length, how.window)[:, -key_bhnc.shape[2] :]
        parts = (query_bhnc, key_bhnc, value_bhnc)
        attended.append(
            nn.functional.scaled_dot_product_attention(
                *parts, near, how.dropout, is_causal=all_seen, scale=how.scale, enable_gqa=how.grouped
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2).to(dtype)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

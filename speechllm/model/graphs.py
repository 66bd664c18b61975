"""One more token for every row, as a recorded CUDA graph: a launch for the whole model instead of one for each kernel.

A graph has fixed sizes: a number of rows (a power of two; those behind the ones at work are free, and what is written
there is never read) and all positions that the store has room for. Each is recorded when it is first needed.
Shapes: r rows, l positions of a row, h heads, k heads of keys, c head width, d LM width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from speechllm.model.slots import Slots

    Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
    """Work that always reads and writes the same tensors, to what does it again."""

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest difference between the states of a graph and of the plain way, as a part of the largest state."""
WARM_UP = 3  # runs before a graph is recorded, as torch asks for


@dataclass(frozen=True)
class StaticStep:
    """One more token for each of the first rows, with attention over all positions that there are."""

    slots: Slots
    places_r: Tensor
    """Where the token of each row stands."""

    def attend(self, block: int, row: tuple[Tensor, Tensor, Tensor], scale: float | None, window: int | None) -> Tensor:
        """Return attention [1 r h c] of queries [1 h r c] to what their rows have been read of, and to themselves."""
        query_hrc, key_krc, value_krc = (part[0] for part in row)
        rows, heads, width = len(self.places_r), query_hrc.shape[0], query_hrc.shape[2]
        keys_rklc, values_rklc = self.slots.kept(block)
        every_r = torch.arange(rows, device=self.places_r.device)
        keys_rklc[every_r, :, self.places_r] = key_krc.transpose(0, 1)
        values_rklc[every_r, :, self.places_r] = value_krc.transpose(0, 1)
        place_l = torch.arange(keys_rklc.shape[2], device=self.places_r.device)
        seen_rl = place_l <= self.places_r[:, None]
        if window is not None:
            seen_rl &= place_l > self.places_r[:, None] - window
        query_rkgc = query_hrc.transpose(0, 1).reshape(rows, keys_rklc.shape[1], -1, width)
        made_rkgc = torch.nn.functional.scaled_dot_product_attention(
            query_rkgc, keys_rklc[:rows], values_rklc[:rows], seen_rl[:, None, None], scale=scale
        )
        return made_rkgc.reshape(1, rows, heads, width)


def cuda_graph(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return what replays `work`, recorded on the current device."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states_rd = work()

    def replay() -> Tensor:
        graph.replay()
        return states_rd

    return replay


class Graphs:
    """The recorded steps of a store; they are void when it moves."""

    def __init__(self, slots: Slots, record: Recorder = cuda_graph) -> None:
        """Begin with none."""
        self._slots, self._record = slots, record
        self._made: dict[int, Callable[[], Tensor]] = {}
        self._steps: dict[int, tuple[Tensor, Tensor]] = {}
        self.proven = False
        self.broken = False
        """Whether a graph was off, or could not be recorded: then the plain way is taken from there on."""

    def forget(self) -> None:
        """Drop all graphs: the store has moved."""
        self._made.clear()

    def rows(self, count: int) -> int:
        """Return the rows of the graph that serves `count` rows."""
        return 1 << (count - 1).bit_length()

    def read(self, embeds_rd: Tensor, places: Sequence[int]) -> Tensor:
        """Return the last hidden states [r d] of a token for each of the first rows."""
        count = self.rows(len(places))
        if count not in self._steps:
            places_r = torch.zeros(count, dtype=torch.long, device=embeds_rd.device)
            self._steps[count] = embeds_rd.new_zeros(count, embeds_rd.shape[1]), places_r
        static_rd, places_r = self._steps[count]
        static_rd[: len(places)] = embeds_rd
        places_r.zero_()
        places_r[: len(places)] = torch.tensor(places, device=places_r.device)
        if count not in self._made:  # not before: what is run for a recording writes to these places
            step = StaticStep(self._slots, places_r)
            self._made[count] = self._record(lambda: self._slots.forward(static_rd, places_r[None], step))
        return self._made[count]()[: len(places)].clone()

    def agrees(self, states_rd: Tensor, embeds_rd: Tensor, places: Sequence[int]) -> None:
        """Compare a graph with what the plain way gave, once; one that is off is never used, and it is said."""
        try:
            off = float((self.read(embeds_rd, places) - states_rd).abs().max() / states_rd.abs().max())
        except RuntimeError as error:
            log.warning("decode without CUDA graphs reason=%r", " ".join(str(error).split())[:200])
            self.broken = True
            return
        self.proven = off <= TOLERANCE[states_rd.dtype]
        if not self.proven:
            log.warning("decode without CUDA graphs, they are off by %g", off)
            self.broken = True

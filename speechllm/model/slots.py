"""Keys and values of the rows of a search: a static store, and one forward for prompts and next tokens together.

A forward reads one row of tokens without padding: those of the rows at work first, then those of new rows, which are as
long as their sound. What the blocks compute is therefore what is needed; only the attention knows about rows.
Shapes: n tokens of a forward, r rows, m tokens of a row, l positions of a row, h heads, k heads of keys, c head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from speechllm.model.graphs import Graphs
from speechllm.model.splice import on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from speechllm.model.lm import LanguageModel
    from speechllm.model.packing import Rows

GROWS_BY = 64  # positions; a store that grows is copied


class Slots:
    """What every row has been read of so far; rows that are at work are the first ones."""

    def __init__(self, lm: LanguageModel) -> None:
        """Begin empty; the store takes its sizes from the first forward."""
        self.lm = lm
        self.device = lm.model.device
        self.lengths: list[int] = []
        """Positions that are read of each row at work."""
        self.capacity = (0, 0)
        """Rows and positions that there is room for."""
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._shared: dict[int, tuple[Tensor, Tensor]] = {}
        self._no_mask = torch.zeros(1, 1, 1, 1, device=self.device)
        self.graphs = Graphs(self) if self.device.type == "cuda" else None
        self.shared = 0
        """Positions at the beginning that all rows have in common."""

    def share(self, embeds_ld: Tensor) -> None:
        """Read once what stands at the beginning of every row."""
        if len(embeds_ld):
            self.read(embeds_ld, [], [len(embeds_ld)])
            self._shared = {
                block: (keys[:1, :, : len(embeds_ld)].clone(), self._values[block][:1, :, : len(embeds_ld)].clone())
                for block, keys in self._keys.items()
            }
        self.lengths = []
        self.shared = len(embeds_ld)

    def read(self, embeds_nd: Tensor, more: Sequence[int], new: Sequence[int]) -> Tensor:
        """Return the last hidden states [n d] of tokens with the vectors `embeds_nd`.

        The first of them belong to the rows at work, `more` tokens to each; the others are those of `new` rows, which
        begin behind what is shared.
        """
        assert len(more) == len(self.lengths)
        begins = [*self.lengths, *[self.shared] * len(new)]
        ends = [begin + count for begin, count in zip(begins, [*more, *new], strict=True)]
        self._make_room(len(ends), max(ends))
        if self.graphs is not None and not new and not self.graphs.broken and set(more) == {1}:
            states_rd = self._read_recorded(embeds_nd, begins)
        else:
            states_rd = self._read_plain(embeds_nd, begins, more, new)
        self.lengths = ends
        return states_rd

    def _read_recorded(self, embeds_rd: Tensor, places: Sequence[int]) -> Tensor:
        """Return the states of one more token a row, by a graph that was compared with the plain way before."""
        assert self.graphs is not None
        self._make_room(self.graphs.rows(len(places)), 0)
        if self.graphs.proven:
            return self.graphs.read(embeds_rd, places)
        states_rd = self._read_plain(embeds_rd, places, [1] * len(places), [])
        self.graphs.agrees(states_rd, embeds_rd, places)
        return states_rd

    def _read_plain(self, embeds_nd: Tensor, begins: Sequence[int], more: Sequence[int], new: Sequence[int]) -> Tensor:
        step = Step(self, Group(0, begins[: len(more)], list(more)), Group(len(more), begins[len(more) :], list(new)))
        return self.forward(embeds_nd, step.positions_1n, step)

    def forward(self, embeds_nd: Tensor, positions_1n: Tensor, rows: Rows) -> Tensor:
        """Return the last hidden states [n d] of tokens, `rows` being what attention sees of the store."""
        body: Any = self.lm.model.base_model
        output = body(
            inputs_embeds=embeds_nd[None],
            # never looked at; a mask of four dimensions keeps transformers from making one of n x n
            attention_mask=self._no_mask,
            position_ids=positions_1n,
            use_cache=False,
            slots=rows,
        )
        states: Tensor = output.last_hidden_state[0]
        return states

    def kept(self, block: int) -> tuple[Tensor, Tensor]:
        """Return all keys and values [r k l c] that there is room for in a block."""
        return self._keys[block], self._values[block]

    def keep(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Let row i become what row ``rows[i]`` is, up to ``lengths[i]`` positions; the others are free again."""
        self._make_room(len(rows), 0)
        moved = [(to, row) for to, row in enumerate(rows) if to != row]
        if moved:
            end = max(lengths)
            to, source = (on(np.array(side), self.device) for side in zip(*moved, strict=True))
            for store in (self._keys, self._values):
                for kept in store.values():
                    kept[to, :, :end] = kept[source, :, :end]
        self.lengths = list(lengths)

    def store(self, block: int, group: Group, keys_knc: Tensor, values_knc: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what a block has made of a group's tokens; return all keys and values [r k l c] of its rows."""
        if block not in self._keys:
            rows, positions = self.capacity
            shape = (rows, keys_knc.shape[0], positions, keys_knc.shape[2])
            self._keys[block], self._values[block] = keys_knc.new_zeros(shape), values_knc.new_zeros(shape)
        found = []
        for number, (kept, fresh_knc) in enumerate(((self._keys[block], keys_knc), (self._values[block], values_knc))):
            if group.is_new and block in self._shared:
                kept[group.first : group.end, :, : self.shared] = self._shared[block][number]
            kept[group.row_of_n(self.device), :, group.place_of_n(self.device)] = fresh_knc.transpose(0, 1)
            found.append(kept[group.first : group.end, :, : group.longest])
        return found[0], found[1]

    def _make_room(self, rows: int, positions: int) -> None:
        """Make the store larger where it must be."""
        if rows <= self.capacity[0] and positions <= self.capacity[1]:
            return
        if self.graphs is not None:
            self.graphs.forget()
        old = self.capacity
        rows = 1 << max(0, rows - 1).bit_length()  # not a row at a time
        self.capacity = (max(rows, old[0]), max(-(-positions // GROWS_BY) * GROWS_BY, old[1]))
        for store in (self._keys, self._values):
            for block, kept in store.items():
                larger = kept.new_zeros(self.capacity[0], kept.shape[1], self.capacity[1], kept.shape[3])
                larger[: old[0], :, : old[1]] = kept
                store[block] = larger


class Group:
    """Rows next to each other and the tokens that a forward adds to them."""

    def __init__(self, first: int, begins: Sequence[int], counts: Sequence[int]) -> None:
        """Keep where each row's tokens begin, and how many they are, from row `first` on."""
        self.first, self.end = first, first + len(begins)
        self.begins, self.counts = np.array(begins, dtype=np.int64), np.array(counts, dtype=np.int64)
        self.is_new = False
        self.num_tokens = int(self.counts.sum())
        self.longest = int((self.begins + self.counts).max(initial=0))
        self.widest = int(self.counts.max(initial=0))
        self._made: dict[str, Tensor] = {}
        self._seen: dict[tuple[int | None, int], Tensor | None] = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.end - self.first

    def places(self) -> NDArray[np.int64]:
        """Return the position of each token in its row [n]."""
        return np.repeat(self.begins, self.counts) + self._within()

    def _within(self) -> NDArray[np.int64]:
        firsts = np.cumsum(self.counts) - self.counts
        counted: NDArray[np.int64] = np.arange(self.num_tokens) - np.repeat(firsts, self.counts)
        return counted

    def row_of_n(self, device: torch.device) -> Tensor:
        """Return the row of each token [n]."""
        return self._once("row", np.repeat(np.arange(self.first, self.end), self.counts), device)

    def place_of_n(self, device: torch.device) -> Tensor:
        """Return `places` on the device."""
        return self._once("place", self.places(), device)

    def token_of_rm(self, device: torch.device) -> Tensor:
        """Return which token stands in each place of a grid [r m]; behind a row's last one it stands again."""
        firsts = np.cumsum(self.counts) - self.counts
        grid = firsts[:, None] + np.minimum(np.arange(self.widest), self.counts[:, None] - 1)
        return self._once("grid", grid, device)

    def cell_of_n(self, device: torch.device) -> Tensor:
        """Return the place of each token in that grid [n], counted through all rows."""
        rows = np.repeat(np.arange(len(self)), self.counts)
        return self._once("cell", rows * self.widest + self._within(), device)

    def seen(self, window: int | None, heads: int, like: Tensor) -> Tensor | None:
        """Return what is added to scores [r 1 x l]: 0 where a token of the grid looks, else -inf; None for 0 alone.

        There is a line for each of `heads` and token; made once for all blocks.
        """
        key, device = (window, heads), like.device
        if key not in self._seen:
            last_rm = self.begins[:, None] + np.minimum(np.arange(self.widest), self.counts[:, None] - 1)
            reach = self.longest if window is None else window
            if int(last_rm.min()) + 1 == self.longest and reach >= self.longest:
                self._seen[key] = None
                return None
            last_rm1 = on(last_rm, device)[..., None]
            place_l = torch.arange(self.longest, device=device)
            seen_rml = (place_l <= last_rm1) & (place_l > last_rm1 - reach)
            mask_rml = torch.zeros(seen_rml.shape, dtype=like.dtype, device=device).masked_fill(~seen_rml, -torch.inf)
            self._seen[key] = mask_rml.repeat(1, heads, 1)[:, None]
        return self._seen[key]

    def _once(self, name: str, numbers: NDArray[np.int64], device: torch.device) -> Tensor:
        if name not in self._made:
            self._made[name] = on(numbers, device)
        return self._made[name]


@dataclass(frozen=True)
class Step:
    """One forward: the rows at work and the new ones."""

    slots: Slots
    live: Group
    new: Group

    def __post_init__(self) -> None:
        """Mark the new rows, which begin with what is shared."""
        self.new.is_new = True

    @property
    def positions_1n(self) -> Tensor:
        """Return the position ids of all tokens."""
        return on(np.concatenate([self.live.places(), self.new.places()]), self.slots.device)[None]

    def attend(self, block: int, row: tuple[Tensor, Tensor, Tensor], scale: float | None, window: int | None) -> Tensor:
        """Return attention [1 n h c] of queries [1 h n c] to all that their rows have been read of, and to themselves.

        `row` holds queries, keys and values; `scale` and `window` are the block's own.
        """
        begin, attended = 0, []
        for group in (self.live, self.new):
            if not len(group):
                continue
            query_hnc, key_knc, value_knc = (part[0, :, begin : begin + group.num_tokens] for part in row)
            begin += group.num_tokens
            keys_rklc, values_rklc = self.slots.store(block, group, key_knc, value_knc)
            attended.append(_attend_group(query_hnc, (keys_rklc, values_rklc), group, scale, window))
        return torch.cat(attended)[None] if len(attended) > 1 else attended[0][None]


def _attend_group(
    query_hnc: Tensor, kept: tuple[Tensor, Tensor], group: Group, scale: float | None, window: int | None
) -> Tensor:
    """Return attention [n h c]; the heads that share one of keys stand beside each other as if they were tokens."""
    device = query_hnc.device
    keys_rklc, values_rklc = kept
    heads, width = query_hnc.shape[0], query_hnc.shape[2]
    shape = (len(group), group.widest, keys_rklc.shape[1], heads // keys_rklc.shape[1], width)
    query_nhc = query_hnc.transpose(0, 1)
    if group.widest > 1:
        query_nhc = query_nhc[group.token_of_rm(device)]
    query_rkxc = query_nhc.reshape(shape).permute(0, 2, 3, 1, 4).flatten(2, 3)
    seen_r1xl = group.seen(window, shape[3], query_hnc)
    made_rkxc = nn.functional.scaled_dot_product_attention(query_rkxc, keys_rklc, values_rklc, seen_r1xl, scale=scale)
    made_rmkgc = made_rkxc.reshape(shape[0], shape[2], shape[3], shape[1], width).permute(0, 3, 1, 2, 4)
    made_xhc = made_rmkgc.reshape(-1, heads, width)
    return made_xhc[group.cell_of_n(device)] if group.widest > 1 else made_xhc

"""WavLM's attention through torch's fused kernels; Hugging Face's makes every weight of it in memory.

Both add a bias to the scores: a number for each head and distance between two frames, the same in all layers, times a
gate for each head and query frame, which each layer computes from its own input (Chen 2022, after Chi 2022).

Shapes: b batch, e encoder frames (queries, then keys), h encoder width, n heads, c width of a head. The keys of what
is added may be followed by columns that nobody reads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

GATES = 2  # of a query frame and head; each is the sum of several outputs of one linear map
CUDA_ALIGNMENT = 16  # torch copies a mask whose rows begin elsewhere; on a CPU aligned rows were the slower ones


def replace_attention(blocks: Any) -> None:
    """Put `GatedAttention` in the place of Hugging Face's in every layer of a WavLM encoder; names of weights stay."""
    for layer in blocks.layers:
        layer.attention = GatedAttention(layer.attention)


class Added:
    """What one pass through the layers adds to its attention scores, but for the gates."""

    def __init__(self, bias_nee: Tensor, keys_b11e: Tensor) -> None:
        """Take the bias of each head, and 0 or minus infinity for each key."""
        self.bias_nee, self.keys_b11e = bias_nee, keys_b11e
        self._space_bnee: Tensor | None = None

    def gated(self, gate_bne1: Tensor) -> Tensor:
        """Return gate x bias + keys [b n e e]; without gradients the next layer's is written over it."""
        if torch.is_grad_enabled():
            return torch.addcmul(self.keys_b11e, gate_bne1, self.bias_nee)
        if self._space_bnee is None:  # memory is taken from the system once, not in every layer
            self._space_bnee = gate_bne1.new_empty(*gate_bne1.shape[:3], self.bias_nee.shape[2])
        return torch.addcmul(self.keys_b11e, gate_bne1, self.bias_nee, out=self._space_bnee)


class GatedAttention(nn.Module):
    """Hugging Face's WavLMAttention: its weights, names and numbers, but no attention weights come out."""

    def __init__(self, theirs: Any) -> None:
        """Take over the parts of `theirs`, in their order."""
        super().__init__()
        self.num_heads: int = theirs.num_heads
        self.num_buckets: int = theirs.num_buckets
        self.max_distance: int = theirs.max_distance
        self.dropout: float = theirs.dropout
        self.k_proj, self.v_proj, self.q_proj = theirs.k_proj, theirs.v_proj, theirs.q_proj
        self.out_proj = theirs.out_proj
        self.gru_rel_pos_const, self.gru_rel_pos_linear = theirs.gru_rel_pos_const, theirs.gru_rel_pos_linear
        if hasattr(theirs, "rel_attn_embed"):  # the first layer's
            self.rel_attn_embed = theirs.rel_attn_embed
        self.train(theirs.training)

    def forward(
        self,
        hidden_beh: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Added | None = None,
        index: int = 0,  # noqa: ARG002 - the layers of one of the two variants name themselves
    ) -> tuple[Tensor, None, Added]:
        """Return attended frames [b e h], and what the first layer found to be added, for the next ones.

        `attention_mask` [b e] is 1 on true frames; each row needs one.
        """
        query_bnec, key_bnec, value_bnec = (
            self._by_head(projection(hidden_beh)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_bias is None:
            width = _padded(query_bnec)
            bias_nee = self._bias(hidden_beh.shape[1], width).to(query_bnec)
            keys_b11e = _keys(attention_mask, width, hidden_beh.device)
            position_bias = Added(bias_nee, keys_b11e.to(query_bnec))
        added_bnee = position_bias.gated(self._gate(hidden_beh).to(query_bnec))
        attended_bnec = nn.functional.scaled_dot_product_attention(
            query_bnec,
            key_bnec,
            value_bnec,
            added_bnee[..., : hidden_beh.shape[1]],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(attended_bnec.transpose(1, 2).flatten(2)), None, position_bias

    def _by_head(self, rows_beh: Tensor) -> Tensor:
        """Return [b n e c]."""
        return self._heads(rows_beh).transpose(1, 2)

    def _heads(self, rows_beh: Tensor) -> Tensor:
        """Return [b e n c]."""
        return rows_beh.reshape(*rows_beh.shape[:2], self.num_heads, -1)

    def _gate(self, hidden_beh: Tensor) -> Tensor:
        """Return the gate [b n e 1] of each head and query frame."""
        outputs = self.gru_rel_pos_linear(self._heads(hidden_beh))
        update_ben, reset_ben = outputs.view(*outputs.shape[:3], GATES, -1).sum(dim=-1).sigmoid().unbind(dim=-1)
        gate_ben: Tensor = update_ben * (reset_ben * self.gru_rel_pos_const.flatten() - 1) + 2
        return gate_ben.transpose(1, 2).contiguous()[..., None]

    def _bias(self, num_frames: int, width: int) -> Tensor:
        """Return the bias [n e width] of each head, query and key.

        It only depends on the distance, so each row is the one below it without its first column.
        """
        distances = torch.arange(1 - num_frames, width, device=self.rel_attn_embed.weight.device)
        table_n = self.rel_attn_embed(buckets(distances, self.num_buckets, self.max_distance)).t()
        # contiguous, or the rows of the bias are not
        bias_nee: Tensor = table_n.contiguous().unfold(1, width, 1).flip(1)
        return bias_nee


def buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Return the bucket of each distance, key minus query: half of them for keys ahead.

    Of each half the first half hold one distance each, the others a range that grows up to `max_distance`, and the
    last whatever is further away (Raffel 2020, section 2.1).
    """
    one_side = num_buckets // 2
    exact = one_side // 2
    away = distances.abs()
    # in float32 and in this order as in Hugging Face's, where rounding decides at the edges
    ranges = torch.log(away.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (one_side - exact)
    far = (exact + ranges).long().clamp(max=one_side - 1)
    return torch.where(away < exact, away, far) + one_side * (distances > 0)


def _padded(query_bnec: Tensor) -> int:
    """Return how many columns what is added gets, so that no kernel has to copy it."""
    num_frames = query_bnec.shape[2]
    return -(-num_frames // CUDA_ALIGNMENT) * CUDA_ALIGNMENT if query_bnec.is_cuda else num_frames


def _keys(mask_be: Tensor | None, width: int, device: torch.device) -> Tensor:
    """Return [b 1 1 width]: minus infinity on the padding of each row, 0 elsewhere."""
    if mask_be is None:
        return torch.zeros(1, 1, 1, width, device=device)
    keys_be = torch.zeros(len(mask_be), width, device=device)
    keys_be[:, : mask_be.shape[1]].masked_fill_(mask_be.ne(1), -math.inf)
    return keys_be[:, None, None]

"""Projectors: encoder frames in, vectors on the scale of the language model's embeddings out.

Shapes: b batch, e encoder frames, h encoder width, p projected audio tokens, d LM width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from speechllm import lengths
from speechllm.config.schema import ConvMlpProjector, CtcProjector, LinearProjector, NueProjector
from speechllm.model.ctc import CtcHead, collapse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from speechllm.config.schema import Projector

EXPECTED_KANA_PER_FRAME = 0.16  # about eight kana a second of 50 frames; only batch sizes depend on it


class ConvMlp(nn.Module):
    """The published projector: Conv1d with kernel = stride, ReLU, Linear, ReLU, Linear (SpiralAI, YANS 2024)."""

    def __init__(self, config: ConvMlpProjector, width_h: int, width_d: int) -> None:
        """Make it for frames of `width_h` and vectors of `width_d`."""
        super().__init__()
        self.stride = config.stride
        self.conv = nn.Conv1d(width_h, width_h, kernel_size=config.stride, stride=config.stride)
        self.hidden = nn.Linear(width_h, config.hidden)
        self.out = nn.Linear(config.hidden, width_d)

    def expected_tokens(self, num_frames: int) -> int:
        """Return the tokens that `num_frames` become."""
        return lengths.strided_tokens(num_frames, self.stride)

    def forward(self, frames_beh: Tensor, frames_b: Sequence[int]) -> list[Tensor]:
        """Return vectors [p d] of each utterance; a last group that is short is filled with zeros."""
        tokens_b = [self.expected_tokens(count) for count in frames_b]
        padded_beh = _padded(frames_beh, max(tokens_b) * self.stride)
        hidden_bph = torch.relu(self.conv(padded_beh.transpose(1, 2))).transpose(1, 2)
        vectors_bpd = self.out(torch.relu(self.hidden(hidden_bph)))
        return [row[:count] for row, count in zip(vectors_bpd, tokens_b, strict=True)]


class Linear(nn.Module):
    """`stride` frames side by side, then one linear map."""

    def __init__(self, config: LinearProjector, width_h: int, width_d: int) -> None:
        """Make it for frames of `width_h` and vectors of `width_d`."""
        super().__init__()
        self.stride = config.stride
        self.out = nn.Linear(width_h * config.stride, width_d)

    def expected_tokens(self, num_frames: int) -> int:
        """Return the tokens that `num_frames` become."""
        return lengths.strided_tokens(num_frames, self.stride)

    def forward(self, frames_beh: Tensor, frames_b: Sequence[int]) -> list[Tensor]:
        """Return vectors [p d] of each utterance; a last group that is short is filled with zeros."""
        tokens_b = [self.expected_tokens(count) for count in frames_b]
        padded_beh = _padded(frames_beh, max(tokens_b) * self.stride)
        stacked = padded_beh.reshape(len(frames_b), max(tokens_b), -1)
        return [row[:count] for row, count in zip(self.out(stacked), tokens_b, strict=True)]


class NueBridge(nn.Module):
    """Two strided convolutions with GELU, then a linear map, nothing padded (Hono 2023, sec. 3.1)."""

    def __init__(self, config: NueProjector, width_h: int, width_d: int) -> None:
        """Make it for frames of `width_h` and vectors of `width_d`."""
        super().__init__()
        self.kernels, self.strides = (config.kernel,) * 2, (config.stride,) * 2
        self.shortest = lengths.shortest_input(self.kernels, self.strides)
        self.convs = nn.ModuleList([nn.Conv1d(width_h, width_h, config.kernel, config.stride) for _ in range(2)])
        self.out = nn.Linear(width_h, width_d)

    def expected_tokens(self, num_frames: int) -> int:
        """Return the tokens that `num_frames` become."""
        return lengths.conv_frames(max(num_frames, self.shortest), self.kernels, self.strides)

    def forward(self, frames_beh: Tensor, frames_b: Sequence[int]) -> list[Tensor]:
        """Return vectors [p d] of each utterance; one too short for a token is filled with zeros."""
        tokens_b = [self.expected_tokens(count) for count in frames_b]
        hidden_bhe = _padded(frames_beh, max(self.shortest, frames_beh.shape[1])).transpose(1, 2)
        for conv in self.convs:
            hidden_bhe = nn.functional.gelu(conv(hidden_bhe))
        vectors_bpd = self.out(hidden_bhe.transpose(1, 2))
        return [row[:count] for row, count in zip(vectors_bpd, tokens_b, strict=True)]


class CtcBridge(nn.Module):
    """A kana recogniser whose posteriors, one vector a kana, weight the LM's own kana embeddings.

    Frames between two kana (blanks) are left out, as in CTC compression (Gaido 2021, sec. 3); what the kana do
    not say of the sound comes through a residual that starts at zero.
    """

    kana_kd: Tensor

    def __init__(self, config: CtcProjector, width_h: int, kana_kd: Tensor) -> None:
        """Make it for frames of `width_h`; `kana_kd` are the LM's embeddings of the kana, blank left out."""
        super().__init__()
        self.stride = config.stride
        self.head = CtcHead(config, width_h, num_symbols=len(kana_kd))
        self.residual = nn.Linear(config.hidden, kana_kd.shape[1])
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)
        self.register_buffer("kana_kd", kana_kd.float(), persistent=False)

    def expected_tokens(self, num_frames: int) -> int:
        """Return about how many kana `num_frames` hold."""
        return max(1, round(EXPECTED_KANA_PER_FRAME * num_frames))

    def forward(self, frames_beh: Tensor, frames_b: Sequence[int]) -> list[Tensor]:
        """Return vectors [p d] of each utterance, p the number of kana that the head hears, 1 at least."""
        logits_bqk, hidden_bqh, tokens_b = self.head(frames_beh, frames_b)
        posteriors_bqk = logits_bqk.softmax(dim=-1)
        vectors = []
        for posterior_qk, hidden_qh, count in zip(posteriors_bqk, hidden_bqh, tokens_b, strict=True):
            segment_pq = collapse(posterior_qk[:count]).to(posterior_qk.dtype)
            kana_pk = (segment_pq @ posterior_qk[:count])[:, 1:]
            kana_pk = kana_pk / kana_pk.sum(dim=1, keepdim=True)
            vectors.append(kana_pk @ self.kana_kd + self.residual(segment_pq @ hidden_qh[:count]))
        return vectors


def _padded(frames_beh: Tensor, length: int) -> Tensor:
    missing = length - frames_beh.shape[1]
    return nn.functional.pad(frames_beh, (0, 0, 0, missing)) if missing > 0 else frames_beh[:, :length]


AnyProjector = ConvMlp | Linear | NueBridge | CtcBridge


def build_projector(config: Projector, width_h: int, width_d: int, kana_kd: Tensor) -> AnyProjector:
    """Return the configured projector, its weights drawn from torch's current generator."""
    if isinstance(config, ConvMlpProjector):
        return ConvMlp(config, width_h, width_d)
    if isinstance(config, LinearProjector):
        return Linear(config, width_h, width_d)
    if isinstance(config, NueProjector):
        return NueBridge(config, width_h, width_d)
    return CtcBridge(config, width_h, kana_kd)

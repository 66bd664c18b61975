"""A kana recogniser on encoder frames: connectionist temporal classification (Graves 2006).

Shapes: b batch, e encoder frames, h width, q head frames, k symbols (0 is the blank), p segments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from speechllm import lengths
from speechllm.model.encoder import padding_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from speechllm.config.schema import CtcProjector

KANA = (
    "ァアィイゥウェエォオカガキギクグケゲコゴサザシジスズセゼソゾタダチッツテデトド"
    "ナニヌネノハバパヒビピフブプヘベペホボポマミムメモャヤュユョヨラリルレロワンヴー"
)
BLANK = 0
KERNEL = 5


class CtcHead(nn.Module):
    """LayerNorm, a strided and a plain convolution, a linear map to blank and kana."""

    def __init__(self, config: CtcProjector, width_h: int, num_symbols: int) -> None:
        """Make it for frames of `width_h` and `num_symbols` kana."""
        super().__init__()
        self.stride = config.stride
        self.norm = nn.LayerNorm(width_h)
        self.conv1 = nn.Conv1d(width_h, config.hidden, KERNEL, stride=config.stride, padding=KERNEL // 2)
        self.conv2 = nn.Conv1d(config.hidden, config.hidden, KERNEL, padding=KERNEL // 2)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.hidden, num_symbols + 1)

    def forward(self, frames_beh: Tensor, frames_b: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Return logits [b q k], the hidden frames [b q h] below them, and the true q of each row."""
        tokens_b = [lengths.strided_tokens(count, self.stride) for count in frames_b]
        inside_be = padding_mask(frames_b, frames_beh.device)[..., None]
        inside_bq = padding_mask(tokens_b, frames_beh.device)[..., None]
        normed_bhe = (self.norm(frames_beh) * inside_be).transpose(1, 2)
        first_bqh = nn.functional.gelu(self.conv1(normed_bhe)).transpose(1, 2)[:, : inside_bq.shape[1]]
        first_bhq = (self.dropout(first_bqh) * inside_bq).transpose(1, 2)
        second_bqh = self.dropout(nn.functional.gelu(self.conv2(first_bhq)).transpose(1, 2))
        return self.out(second_bqh), second_bqh, tokens_b


def collapse(posterior_qk: Tensor) -> Tensor:
    """Return [p q]: row i averages the frames of the i-th run of one kana on the best path.

    Where the best path is all blank, one row averages everything: silence is one vector, never none.
    """
    best_q = posterior_qk.argmax(dim=-1)
    starts_q = torch.ones_like(best_q, dtype=torch.bool)
    starts_q[1:] = best_q[1:] != best_q[:-1]
    run_q = starts_q.cumsum(0) - 1
    voiced_q = best_q != BLANK
    runs = torch.unique(run_q[voiced_q])
    if len(runs) == 0:
        return torch.full((1, len(best_q)), 1 / len(best_q), device=best_q.device)
    member_pq = (run_q[None, :] == runs[:, None]).float()
    averages_pq: Tensor = member_pq / member_pq.sum(dim=1, keepdim=True)
    return averages_pq


def targets_of(reading: str) -> list[int]:
    """Return symbol numbers of a katakana reading; other characters are left out."""
    return [index + 1 for index in (KANA.find(char) for char in reading) if index >= 0]


def best_kana(logits_qk: Tensor) -> str:
    """Return the kana of the best path, runs merged and blanks left out."""
    return "".join(KANA[symbol - 1] for symbol in best_path(logits_qk))


def best_path(scores_qk: Tensor) -> list[int]:
    """Return the symbols of the best path, runs merged and blanks left out."""
    best = scores_qk.argmax(dim=-1).tolist()
    runs = [symbol for place, symbol in enumerate(best) if place == 0 or symbol != best[place - 1]]
    return [symbol for symbol in runs if symbol != BLANK]


def ctc_loss(logits_bqk: Tensor, tokens_b: Sequence[int], targets: Sequence[Sequence[int]]) -> Tensor:
    """Return the sum over utterances of the negative log likelihood, in nats; impossible ones count 0."""
    log_probs_qbk = logits_bqk.float().log_softmax(dim=-1).transpose(0, 1)
    flat = torch.tensor([symbol for target in targets for symbol in target], device=logits_bqk.device)
    sizes = torch.tensor([len(target) for target in targets])
    nll: Tensor = nn.functional.ctc_loss(
        log_probs_qbk,
        flat,
        torch.tensor(tokens_b),
        sizes,
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )
    return nll

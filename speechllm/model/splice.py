"""Where everything goes that the language model reads: prompt, projected sound and answer, in rows.

Worked out on the host from lengths alone; the device then gathers all positions in one step, and nothing waits for it.
Shapes: b batch, l positions of a row, n positions of one utterance, p projected audio tokens, x answer tokens of the
batch, d LM width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from speechllm.text.prompt import Prompt

    Indices = NDArray[np.int64]

NOTHING = 0  # the source of a padded position: a row of zeros


@dataclass(frozen=True)
class Utterance:
    """The positions of one utterance behind what all share, as rows of the source."""

    rows: Indices
    """Sound, what stands behind it, and the answer but its last token, which predicts nothing [n]."""
    first_label: int
    """Position in `rows` that predicts the first token of the answer."""
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """What is gathered from: a row of zeros, then tokens, then the sounds one after another."""

    token_ids: tuple[int, ...]
    shared: Indices
    """Rows of the prompt before the sound, the same for every utterance."""
    utterances: tuple[Utterance, ...]


@dataclass(frozen=True)
class Layout:
    """Rows of the source in the order in which the language model reads them."""

    source: Source
    order_bl: Indices
    answer_at: Indices
    """Positions, counted through all rows, that predict a token of an answer [x]."""
    lengths: tuple[int, ...]
    """True positions: of each row where rows are padded, of each utterance behind the prompt where they are packed."""
    shared: int = 0
    """Positions at the beginning of a packed row that all of its utterances see."""

    @property
    def labels(self) -> list[int]:
        """Return the tokens to predict, in the order of `answer_at`."""
        return [label for utterance in self.source.utterances for label in utterance.labels]


def source_of(prompts: Sequence[Prompt], audio_tokens: Sequence[int]) -> Source:
    """Return the rows of utterances with these prompts, which differ in their answers alone, and sounds."""
    before, after = prompts[0].before, prompts[0].after
    read = [token for prompt in prompts for token in prompt.answer[:-1]]
    token_ids = (*before, *after, *read)
    shared = np.arange(1, 1 + len(before))
    tail = np.arange(1 + len(before), 1 + len(before) + len(after))
    next_answer, next_audio = 1 + len(before) + len(after), 1 + len(token_ids)
    utterances = []
    for prompt, count in zip(prompts, audio_tokens, strict=True):
        answered = len(prompt.answer[:-1])
        audio = np.arange(next_audio, next_audio + count)
        answer = np.arange(next_answer, next_answer + answered)
        rows = np.concatenate([audio, tail, answer])
        utterances.append(Utterance(rows, count + len(after) - 1, prompt.answer))
        next_audio, next_answer = next_audio + count, next_answer + answered
    return Source(token_ids, shared, tuple(utterances))


def padded(source: Source, *, pad_left: bool) -> Layout:
    """Return a row for each utterance, all as long as the longest."""
    rows = [np.concatenate([source.shared, utterance.rows]) for utterance in source.utterances]
    longest = max(map(len, rows))
    order_bl = np.full((len(rows), longest), NOTHING, dtype=np.int64)
    answer_at = []
    for number, (row, utterance) in enumerate(zip(rows, source.utterances, strict=True)):
        begin = longest - len(row) if pad_left else 0
        order_bl[number, begin : begin + len(row)] = row
        first = number * longest + begin + len(source.shared) + utterance.first_label
        answer_at.append(np.arange(first, first + len(utterance.labels)))
    return Layout(source, order_bl, np.concatenate(answer_at), tuple(map(len, rows)))


def packed(source: Source, *, share_prompt: bool) -> Layout:
    """Return one row with the utterances one after another; the prompt stands before all of them, or before each."""
    head = np.array([], dtype=np.int64) if share_prompt else source.shared
    begin = len(source.shared) if share_prompt else 0
    pieces = [source.shared[:begin]]
    answer_at, lengths = [], []
    at = begin
    for utterance in source.utterances:
        pieces += [head, utterance.rows]
        first = at + len(head) + utterance.first_label
        answer_at.append(np.arange(first, first + len(utterance.labels)))
        lengths.append(len(head) + len(utterance.rows))
        at += lengths[-1]
    return Layout(source, np.concatenate(pieces)[None], np.concatenate(answer_at), tuple(lengths), begin)


def gather(layout: Layout, token_td: Tensor, audio_pd: Sequence[Tensor]) -> Tensor:
    """Return what the language model reads [b l d]; `token_td` are the vectors of the source's tokens."""
    nothing = token_td.new_zeros(1, token_td.shape[1])
    rows_xd = torch.cat([nothing, token_td, *(audio.to(token_td.dtype) for audio in audio_pd)])
    order = on(layout.order_bl, token_td.device)
    return rows_xd.index_select(0, order.flatten()).view(*order.shape, -1)


def on(numbers: Indices | Sequence[int], device: torch.device) -> Tensor:
    """Return whole numbers as a tensor on `device`, copied without waiting for what the device does."""
    tensor = torch.as_tensor(numbers, dtype=torch.long)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

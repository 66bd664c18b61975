"""Decodes many utterances: batches of like length, bounded texts, results by id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from speechllm.decode.search import search

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from speechllm.config.schema import DecodeConfig
    from speechllm.decode.search import Hypothesis
    from speechllm.model.speechllm import SpeechLlm

    Fetch = Callable[[Sequence[str]], tuple[Tensor, list[int]]]
    """Ids to padded frames [b e h] and the true frames of each row."""


@dataclass(frozen=True)
class Text:
    """One decoded text and how sure the model was."""

    text: str
    log_prob: float
    num_tokens: int
    ended: bool


def decode(
    model: SpeechLlm, durations_s: Mapping[str, float], fetch: Fetch, config: DecodeConfig
) -> Iterator[dict[str, list[Text]]]:
    """Yield id -> n-best texts, batch by batch, the shortest utterances first."""
    model.eval()
    ids = sorted(durations_s, key=lambda utt_id: (durations_s[utt_id], utt_id))
    for start in range(0, len(ids), config.batch_size):
        batch = ids[start : start + config.batch_size]
        frames_beh, frames_b = fetch(batch)
        with torch.no_grad():
            spliced = model.splice(frames_beh, frames_b, None, pad_left=True)
        limits = [max_tokens(config, durations_s[utt_id]) for utt_id in batch]
        found = search(model.lm, spliced, limits, config)
        yield {utt_id: [to_text(model, h) for h in nbest] for utt_id, nbest in zip(batch, found, strict=True)}


def max_tokens(config: DecodeConfig, duration_s: float) -> int:
    """Return the most tokens that the text of so many seconds may have."""
    return config.extra_tokens + int(config.tokens_per_s * duration_s + 0.5)


def to_text(model: SpeechLlm, hypothesis: Hypothesis) -> Text:
    """Return a hypothesis as one line of text; runs of blanks are folded, and NUL, which no text file holds, goes."""
    text = str(model.lm.tokenizer.decode(list(hypothesis.tokens), skip_special_tokens=True)).replace("\0", "")
    return Text(" ".join(text.split()), hypothesis.log_prob, len(hypothesis.log_probs), hypothesis.ended)

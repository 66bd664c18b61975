"""What a model brings that helps its own search: a kana recogniser, drafts, and hotwords where there are any."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from speechllm.decode import align
from speechllm.decode.batched import Aids
from speechllm.decode.bias import Bias
from speechllm.decode.draft import draft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from speechllm.decode.batched import Kana
    from speechllm.decode.hotwords import Hotwords
    from speechllm.model.heads import Heads
    from speechllm.model.speechllm import SpeechLlm


def aids_of(model: SpeechLlm, heads: Heads | None, hotwords: Hotwords | None) -> Aids:
    """Return what helps the search of a model: its kana recogniser, drafts where it has a head for them, hotwords."""

    def hear(frames_beh: Tensor, frames_b: Sequence[int]) -> list[Kana] | None:
        return align.kana_log_probs(model, frames_beh, frames_b, heads)

    def drafts(frames_beh: Tensor, frames_b: Sequence[int]) -> list[tuple[int, ...]]:
        return [] if heads is None else draft(heads, frames_beh, frames_b)

    has_drafts = heads is not None and heads.tokens is not None
    bias = None if hotwords is None else _bias(hotwords, model.lm.tokenizer).if_heard
    return Aids(hear=hear, bias=bias, draft=drafts if has_drafts else None)


@functools.lru_cache(maxsize=4)
def _bias(hotwords: Hotwords, tokenizer: PreTrainedTokenizerFast) -> Bias:
    """Return the bias of a list; a recording comes in many pieces, and a server's clients use the same lists."""
    return Bias(hotwords, tokenizer)

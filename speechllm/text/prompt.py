"""The only prompt builder: what the language model reads around the sound.

<bos> PROMPT newline  [sound]  newline  ANSWER <eos>
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n"


@dataclass(frozen=True)
class Prompt:
    """Token ids on both sides of the sound; `answer` is empty when decoding."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    answer: tuple[int, ...]


def build(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str | None) -> Prompt:
    """Return the token ids around the sound.

    With a `target`, the answer is its tokens and the end of sequence; without one, everything else is the same:
    training and decoding share this path.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before = (*start, *encode(tokenizer, prompt + SEPARATOR))
    after = tuple(encode(tokenizer, SEPARATOR))
    answer = () if target is None else (*encode(tokenizer, target), tokenizer.eos_token_id)
    return Prompt(before, after, answer)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of `text` alone, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids

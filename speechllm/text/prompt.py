"""The only prompt builder: what the language model reads around the sound.

<bos> TEMPLATE up to {audio}  [sound]  TEMPLATE from {audio} on  ANSWER <eos>
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUDIO, PROMPT = "{audio}", "{prompt}"


@dataclass(frozen=True)
class Prompt:
    """Token ids on both sides of the sound; `answer` is empty when decoding."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """What is asked, and the order in which prompt and sound are read."""

    prompt: str
    template: str

    def around(self) -> tuple[str, str]:
        """Return the text before the sound and the text after it."""
        before, after = self.template.split(AUDIO)
        return before.replace(PROMPT, self.prompt), after.replace(PROMPT, self.prompt)


def build(tokenizer: PreTrainedTokenizerBase, form: Form, target: str | None) -> Prompt:
    """Return the token ids around the sound.

    With a `target`, the answer is its tokens and the end of sequence; without one, everything else is the same:
    training and decoding share this path.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before, after = form.around()
    answer = () if target is None else (*encode(tokenizer, target), tokenizer.eos_token_id)
    return Prompt((*start, *encode(tokenizer, before)), tuple(encode(tokenizer, after)), answer)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of `text` alone, without special tokens but those that it spells out."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return ids

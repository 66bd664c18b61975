"""Decodes many utterances: the short ones first, bounded texts, each result as soon as it is there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from speechllm.decode.engine import Engine, Job, Spent
from speechllm.decode.result import CUT, LOOP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from speechllm.config.schema import DecodeConfig
    from speechllm.decode.bias import UtteranceBias
    from speechllm.decode.engine import Found
    from speechllm.decode.search import Hypothesis
    from speechllm.model.speechllm import SpeechLlm

    Fetch = Callable[[Sequence[str]], tuple[Tensor, list[int]]]
    """Ids to padded frames [b e h] and the true frames of each row."""

PREPARED = 16  # utterances whose frames are fetched together


@dataclass(frozen=True)
class Text:
    """One decoded text and how sure the model was."""

    text: str
    log_prob: float
    num_tokens: int
    ended: bool
    pieces: tuple[str, ...] = ()
    """The text of each token; characters of several tokens stand with the last of them."""
    probs: tuple[float, ...] = ()
    """The probability of each of these tokens, given those before."""
    flags: tuple[str, ...] = ()

    @property
    def confidence(self) -> float:
        """Return the geometric mean of the probabilities of all tokens, the end included."""
        return math.exp(self.log_prob / max(1, self.num_tokens))


def text_of(fields: Mapping[str, Any]) -> Text:
    """Return a text from what JSON kept of its fields."""
    kept: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Text(**kept)


@dataclass(frozen=True)
class Aids:
    """What helps the search, made from the frames [b e h] of utterances and their true lengths."""

    bias: Callable[[Tensor, Sequence[int]], list[UtteranceBias]] | None = None
    """Hotwords of each utterance."""
    draft: Callable[[Tensor, Sequence[int]], list[tuple[int, ...]]] | None = None
    """What the text of each may be, in tokens."""


@dataclass
class Utterances:
    """The utterances to decode, prepared some at a time."""

    model: SpeechLlm
    durations_s: Mapping[str, float]
    fetch: Fetch
    config: DecodeConfig
    aids: Aids = Aids()
    at_once: int = PREPARED

    def __post_init__(self) -> None:
        """Put the short ones first: what is at work together then ends together."""
        self._waiting = sorted(self.durations_s, key=lambda key: (self.durations_s[key], key), reverse=True)
        self._ready: list[Job] = []

    def take(self) -> Job | None:
        """Return the next utterance, or None where there is none left."""
        if not self._ready and self._waiting:
            keys = self._waiting[-self.at_once :][::-1]
            self._ready = self._prepared(keys)[::-1]
            del self._waiting[-len(keys) :]
        return self._ready.pop() if self._ready else None

    def shrink(self) -> None:
        """Prepare fewer at a time from now on."""
        self.at_once = max(1, self.at_once // 2)

    def limit(self, key: str) -> int:
        """Return the most tokens that the text of an utterance may have."""
        return max_tokens(self.config, self.durations_s[key])

    @torch.inference_mode()
    def _prepared(self, keys: Sequence[str]) -> list[Job]:
        frames_beh, frames_b = self.fetch(keys)
        own_ld = self.model.questions(frames_beh, frames_b)
        biases = self.aids.bias(frames_beh, frames_b) if self.aids.bias else [None] * len(keys)
        drafts = self.aids.draft(frames_beh, frames_b) if self.aids.draft else [()] * len(keys)
        limits = [self.limit(key) for key in keys]
        return [Job(*parts) for parts in zip(keys, own_ld, limits, biases, drafts, strict=True)]


@dataclass
class Decoder:
    """Texts of utterances, as they are found, and what finding them took."""

    model: SpeechLlm
    config: DecodeConfig
    aids: Aids = Aids()
    spent: Spent = field(default_factory=Spent)

    def texts(self, durations_s: Mapping[str, float], fetch: Fetch) -> Iterator[tuple[str, list[Text]]]:
        """Yield id and n-best of each utterance as it ends; about the shortest first."""
        self.model.eval()
        utterances = Utterances(self.model, durations_s, fetch, self.config, self.aids)
        engine = Engine(self.model.lm, self.model.question_start(), self.config, self.spent)
        for found in engine.run(utterances):
            yield found.key, [to_text(self.model, hypothesis, found) for hypothesis in found.nbest]


def decode(
    model: SpeechLlm, durations_s: Mapping[str, float], fetch: Fetch, config: DecodeConfig
) -> dict[str, list[Text]]:
    """Return id -> n-best texts."""
    return dict(Decoder(model, config).texts(durations_s, fetch))


def max_tokens(config: DecodeConfig, duration_s: float) -> int:
    """Return the most tokens that the text of so many seconds may have."""
    return config.extra_tokens + int(config.tokens_per_s * duration_s + 0.5)


def to_text(model: SpeechLlm, hypothesis: Hypothesis, found: Found | None = None) -> Text:
    """Return a hypothesis as one line of text; runs of blanks are folded, and NUL, which no text file holds, goes."""
    text = _line(str(model.lm.tokenizer.decode(list(hypothesis.tokens), skip_special_tokens=True)))
    flags = [LOOP] if found is not None and found.looped else []
    flags += [] if hypothesis.ended else [CUT]
    probs = tuple(round(math.exp(log_prob), 4) for log_prob in hypothesis.log_probs[: len(hypothesis.tokens)])
    count = len(hypothesis.log_probs)
    pieces = pieces_of(model, hypothesis.tokens)
    return Text(text, hypothesis.log_prob, count, hypothesis.ended, pieces, probs, tuple(flags))


def pieces_of(model: SpeechLlm, tokens: Sequence[int]) -> tuple[str, ...]:
    """Return the text of each token; together they are the text but for runs of blanks."""
    pieces, told = [], ""
    for end in range(1, len(tokens) + 1):
        text = str(model.lm.tokenizer.decode(list(tokens[:end]), skip_special_tokens=True)).replace("\0", "")
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}") if end < len(tokens) else text
        pieces.append(whole[len(told) :])
        told = whole if len(whole) > len(told) else told
    return tuple(pieces)


def character_confidences(text: Text) -> list[float]:
    """Return the probability of the token of each character of ``text.text``."""
    raw = [(char, prob) for piece, prob in zip(text.pieces, text.probs, strict=False) for char in piece]
    found, at = [], 0
    for char in text.text:
        while at < len(raw) - 1 and not (raw[at][0] == char or (char == " " and raw[at][0].isspace())):
            at += 1
        found.append(raw[at][1] if raw else text.confidence)
        at += 1 if at < len(raw) - 1 else 0
    return found


def _line(text: str) -> str:
    return " ".join(text.replace("\0", "").split())

"""Decodes many utterances: the long ones first, bounded texts, each result as soon as it is there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from speechllm.decode.engine import Engine, Job, Spent
from speechllm.decode.result import CUT, LOOP, NO_SPEECH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from speechllm.config.schema import DecodeConfig
    from speechllm.decode.bias import UtteranceBias
    from speechllm.decode.engine import Found
    from speechllm.decode.search import Hypothesis
    from speechllm.model.speechllm import SpeechLlm

    Fetch = Callable[[Sequence[str]], tuple[Tensor, list[int]]]
    """Ids to padded frames [b e h] and the true frames of each row."""
    Kana = NDArray[np.float32]
    """Log posteriors [q k] of a kana recogniser, column 0 the blank."""

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
    """What helps the search."""

    hear: Callable[[Tensor, Sequence[int]], list[Kana] | None] | None = None
    """Frames [b e h] and their true lengths to what a kana recogniser hears in each."""
    is_silent: Callable[[str, Kana], bool] | None = None
    """Whether nothing was said in an utterance; its text is then empty, and no search is made."""
    bias: Callable[[Kana | None], UtteranceBias | None] | None = None
    """Hotwords of an utterance."""
    draft: Callable[[Tensor, Sequence[int]], list[tuple[int, ...]]] | None = None
    """Frames to what the text of each may be, in tokens."""


@dataclass(frozen=True)
class Decoded:
    """The n-best of an utterance, the best first, and what the kana recogniser heard, where there is one."""

    key: str
    nbest: list[Text]
    kana: Kana | None


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
        """Put the long ones first: rows are filled again as they end, and short ones keep all of them busy to the end.

        Where the memory does not hold so many, that is seen at once.
        """
        self._waiting = sorted(self.durations_s, key=lambda key: (self.durations_s[key], key))
        self._ready: list[Job] = []
        self.kana: dict[str, Kana] = {}
        """Of utterances that are at work."""
        self.silent: list[str] = []
        """Those in which nothing was said."""

    def take(self) -> Job | None:
        """Return the next utterance, or None where there is none left."""
        while not self._ready and self._waiting:
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
        drafts = self.aids.draft(frames_beh, frames_b) if self.aids.draft else [()] * len(keys)
        heard = self.aids.hear(frames_beh, frames_b) if self.aids.hear else None
        if heard is not None:
            self.kana |= dict(zip(keys, heard, strict=True))
        jobs = []
        for key, embeds_ld, drafted in zip(keys, own_ld, drafts, strict=True):
            kana = self.kana.get(key)
            if kana is not None and self.aids.is_silent is not None and self.aids.is_silent(key, kana):
                self.silent.append(key)
                continue
            bias = self.aids.bias(kana) if self.aids.bias else None
            jobs.append(Job(key, embeds_ld, self.limit(key), bias, drafted))
        return jobs


@dataclass
class Decoder:
    """Texts of utterances, as they are found, and what finding them took."""

    model: SpeechLlm
    config: DecodeConfig
    aids: Aids = Aids()
    spent: Spent = field(default_factory=Spent)

    def texts(self, durations_s: Mapping[str, float], fetch: Fetch) -> Iterator[Decoded]:
        """Yield each utterance as it ends; about the longest first."""
        self.model.eval()
        several = min(len(durations_s), self.config.batch_size) > 1
        on_cpu = self.model.lm.model.device.type == "cpu"
        # a processor is busy with several rows; there a draft, most of which is read in vain, costs more than it saves
        aids = replace(self.aids, draft=None) if several and on_cpu else self.aids
        utterances = Utterances(self.model, durations_s, fetch, self.config, aids)
        with torch.inference_mode():
            engine = Engine(self.model.lm, self.model.question_start(), self.config, self.spent)
        for found in engine.run(utterances):
            nbest = [to_text(self.model, hypothesis, found) for hypothesis in found.nbest]
            yield Decoded(found.key, nbest, utterances.kana.pop(found.key, None))
            yield from _silent(utterances)
        yield from _silent(utterances)


def _silent(utterances: Utterances) -> Iterator[Decoded]:
    """Yield the utterances in which nothing was said, once."""
    while utterances.silent:
        key = utterances.silent.pop()
        yield Decoded(key, [Text("", 0.0, 0, ended=True, flags=(NO_SPEECH,))], utterances.kana.pop(key))


def decode(
    model: SpeechLlm, durations_s: Mapping[str, float], fetch: Fetch, config: DecodeConfig
) -> dict[str, list[Text]]:
    """Return id -> n-best texts."""
    return {found.key: found.nbest for found in Decoder(model, config).texts(durations_s, fetch)}


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

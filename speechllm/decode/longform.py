"""Recordings of any length: found speech becomes sounds that the model can hear, and their texts a transcript.

Every sample of speech goes to the model in one sound only, so no text is lost or doubled at the joints. What is held
in memory is bounded by the longest sound and the number of sounds recognised at once. Shape: s samples at 16 kHz.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from speechllm.data import streaming
from speechllm.data.audio import SAMPLE_RATE_HZ
from speechllm.decode.result import Recognized, Segment, Transcript
from speechllm.decode.vad import SpanStream, VadSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from speechllm.decode.hotwords import Hotwords
    from speechllm.decode.vad import Span

    Wave = NDArray[np.float32]


class Recognizer(Protocol):
    """What is needed of `SpeechLLM`."""

    longest_s: float
    """Longest sound that it takes."""
    joined_s: float
    """Longest sound that stretches of speech should be joined to."""

    def recognize(
        self,
        waves_s: Sequence[Wave],
        *,
        hotwords: Hotwords | None = None,
        beam: int | None = None,
        words: bool = True,
    ) -> list[Recognized]:
        """Return the text of each wave."""


@dataclass(frozen=True)
class LongOptions:
    """How a recording is cut and recognised."""

    hotwords: Hotwords | None = None
    beam: int | None = None
    words: bool = True
    batch: int = 8
    """Sounds recognised at once."""
    join_s: float = 0.6
    """Spans with at most so much between them (their padding counts as speech) are one sound, up to `joined_s`."""


DEFAULTS = LongOptions()


def transcribe_file(
    recognizer: Recognizer, path: Path, *, hotwords: Hotwords | None = None, beam: int | None = None
) -> Transcript:
    """Return the transcript of a file.

    Raises:
        DataError: the file cannot be read, see `streaming.blocks`.
    """
    options = replace(DEFAULTS, hotwords=hotwords, beam=beam)
    return transcribe_blocks(recognizer, streaming.blocks(path), options)


def transcribe_blocks(
    recognizer: Recognizer,
    blocks: Iterable[Wave],
    options: LongOptions = DEFAULTS,
    on_progress: Callable[[float], None] | None = None,
) -> Transcript:
    """Return the transcript of blocks [s]; `on_progress` gets the seconds of each block as it has been read."""
    read_s = 0.0

    def counted() -> Iterator[Wave]:
        nonlocal read_s
        for block in blocks:
            yield block
            read_s += len(block) / SAMPLE_RATE_HZ
            if on_progress is not None:
                on_progress(len(block) / SAMPLE_RATE_HZ)

    segments = tuple(transcribe_stream(recognizer, counted(), options))
    return Transcript(read_s, segments)


def transcribe_stream(
    recognizer: Recognizer, blocks: Iterable[Wave], options: LongOptions = DEFAULTS
) -> Iterator[Segment]:
    """Yield each segment in order as soon as its batch is done; one without speech has an empty text and its flag."""
    waiting: list[tuple[float, Wave]] = []
    for sound in sounds(blocks, recognizer.longest_s, options.join_s, recognizer.joined_s):
        waiting.append(sound)
        if len(waiting) == options.batch:
            yield from _recognize(recognizer, waiting, options)
            waiting = []
    if waiting:
        yield from _recognize(recognizer, waiting, options)


def _recognize(
    recognizer: Recognizer, waiting: Sequence[tuple[float, Wave]], options: LongOptions
) -> Iterator[Segment]:
    waves = [wave for _, wave in waiting]
    found = recognizer.recognize(waves, hotwords=options.hotwords, beam=options.beam, words=options.words)
    for (start_s, wave), one in zip(waiting, found, strict=True):
        words = tuple(word.later(start_s) for word in one.words)
        end_s = start_s + len(wave) / SAMPLE_RATE_HZ
        yield Segment(start_s, end_s, one.text, one.confidence, words, one.flags)


def sounds(blocks: Iterable[Wave], longest_s: float, join_s: float, joined_s: float) -> Iterator[tuple[float, Wave]]:
    """Yield begin in seconds and samples [s] of each stretch with speech, of at most `longest_s`, without overlap.

    See `LongOptions` and `Recognizer` for what is joined.
    """
    stream = SpanStream(VadSettings(longest_s=longest_s))
    joiner = Joiner(min(longest_s, joined_s), join_s)
    held = _Held()
    for block in blocks:
        held.add(block)
        spans = stream.feed(block)
        for start_s, end_s in [*joiner.add(spans), *joiner.settle(stream.settled_s)]:
            yield start_s, held.between(start_s, end_s)
        held.forget(min(stream.settled_s, joiner.settled_s))
    for start_s, end_s in [*joiner.add(stream.finish()), *joiner.finish()]:
        yield start_s, held.between(start_s, end_s)


class Joiner:
    """Joins spans over short pauses into stretches of at most `longest_s`, cut at the longest pause.

    A span that is longer stays one.
    """

    def __init__(self, longest_s: float, join_s: float) -> None:
        """Begin a recording."""
        self._longest_s = longest_s
        self._join_s = join_s
        self._spans: list[Span] = []

    @property
    def settled_s(self) -> float:
        """Return the time before which nothing that is still to come begins."""
        return self._spans[0].start_s if self._spans else float("inf")

    def add(self, spans: Iterable[Span]) -> list[tuple[float, float]]:
        """Return the stretches that are settled by the next spans."""
        done: list[tuple[float, float]] = []
        for span in spans:
            if self._spans and span.start_s - self._spans[-1].end_s > self._join_s:
                done += self.finish()
            self._spans.append(span)
            while len(self._spans) > 1 and self._spans[-1].end_s - self._spans[0].start_s > self._longest_s:
                done.append(self._take(self._longest_pause()))
        return done

    def settle(self, until_s: float) -> list[tuple[float, float]]:
        """Return the stretch that nothing can join any more, given that no span that is to come begins before."""
        return self.finish() if self._spans and until_s - self._spans[-1].end_s > self._join_s else []

    def finish(self) -> list[tuple[float, float]]:
        """Return the last stretch, if there is one."""
        return [self._take(len(self._spans))] if self._spans else []

    def _take(self, count: int) -> tuple[float, float]:
        taken, self._spans = self._spans[:count], self._spans[count:]
        return taken[0].start_s, taken[-1].end_s

    def _longest_pause(self) -> int:
        """Return the number of spans before the longest pause; before the last of several equal ones."""
        pauses = [after.start_s - before.end_s for before, after in zip(self._spans, self._spans[1:], strict=False)]
        return max(range(len(pauses)), key=lambda number: (pauses[number], number)) + 1


class _Held:
    """The samples of a recording that are still needed."""

    def __init__(self) -> None:
        self._first = 0
        self._blocks: list[Wave] = []

    def add(self, block_s: Wave) -> None:
        self._blocks.append(block_s)

    def forget(self, before_s: float) -> None:
        """Drop the blocks that end before `before_s`."""
        while self._blocks and self._first + len(self._blocks[0]) <= before_s * SAMPLE_RATE_HZ:
            self._first += len(self._blocks.pop(0))

    def between(self, start_s: float, end_s: float) -> Wave:
        first, last = round(start_s * SAMPLE_RATE_HZ), round(end_s * SAMPLE_RATE_HZ)
        return np.concatenate(self._blocks)[first - self._first : last - self._first]

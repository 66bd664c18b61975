"""Long recordings: every spoken sample reaches the model once, in bounded memory, with the times of the recording."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import spoken

from speechllm.decode import longform
from speechllm.decode.result import NO_SPEECH, Recognized, Word
from speechllm.decode.vad import Span

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from speechllm.decode.hotwords import Hotwords

    Wave = NDArray[np.float32]


class Ear:
    """Keeps what it hears; its text is how many samples that was."""

    def __init__(self, longest_s: float = 30.0) -> None:
        self.longest_s = self.joined_s = longest_s
        self.batches: list[list[Wave]] = []

    def recognize(
        self,
        waves_s: Sequence[Wave],
        *,
        hotwords: Hotwords | None = None,
        beam: int | None = None,
        words: bool = True,
    ) -> list[Recognized]:
        del hotwords, beam, words
        self.batches.append(list(waves_s))
        return [Recognized(f"<{len(wave)}>", 0.5, (Word("<", 0.25, 0.5, 0.5),)) for wave in waves_s]


def blocks(wave: Wave, size: int = 5_000) -> Iterator[Wave]:
    for start in range(0, len(wave), size):
        yield wave[start : start + size]


@pytest.mark.parametrize("longest_s", [30.0, 6.0, 2.0])
@pytest.mark.parametrize("pauses", [[0.3, 0.2, 0.2, 0.2, 0.2], [1.0, 3.0, 0.5, 0.9, 0.2], [0.0, 0.45, 0.45, 5.0, 0.0]])
def test_no_sample_of_speech_is_lost_or_comes_twice(longest_s: float, pauses: list[float]) -> None:
    wave, said = spoken.recording(pauses)
    ear = Ear(longest_s)
    found = longform.transcribe_blocks(ear, blocks(wave))
    times = np.zeros(len(wave), int)
    heard = [one for batch in ear.batches for one in batch]
    for segment, sound in zip(found.segments, heard, strict=True):
        first = round(segment.start_s * 16_000)
        assert np.array_equal(sound, wave[first : first + len(sound)])
        assert len(sound) <= longest_s * 16_000
        times[first : first + len(sound)] += 1
    assert times.max() == 1
    for begin_s, end_s in said:
        assert times[round(begin_s * 16_000) : round(end_s * 16_000)].min() == 1
    assert found.duration_s == pytest.approx(len(wave) / 16_000)


def test_words_are_moved_to_the_time_of_the_recording() -> None:
    wave, said = spoken.recording([2.0, 2.0])
    segments = longform.transcribe_blocks(Ear(), blocks(wave)).segments
    assert len(segments) == 2
    for segment, (begin_s, _) in zip(segments, said, strict=True):
        assert abs(segment.start_s - begin_s) < 0.4
        assert segment.words[0].start_s == pytest.approx(segment.start_s + 0.25)
        assert segment.words[0].end_s == pytest.approx(segment.start_s + 0.5)


def test_segments_come_as_their_batch_is_done_and_the_rest_is_not_read_before() -> None:
    wave, _ = spoken.recording([2.0] * 6)
    read: list[int] = []

    def watched() -> Iterator[Wave]:
        for block in blocks(wave):
            read.append(len(block))
            yield block

    ear = Ear()
    stream = longform.transcribe_stream(ear, watched(), longform.LongOptions(batch=2))
    next(stream)
    assert len(ear.batches) == 1
    assert sum(read) < len(wave) - 32_000
    rest = list(stream)
    assert len(rest) == 5
    assert [len(batch) for batch in ear.batches] == [2, 2, 2]


def test_what_is_held_does_not_grow_with_silence_or_with_speech() -> None:
    held: list[int] = []
    wave, _ = spoken.recording([1.0, 0.5, 1.5] * 4)
    wave = np.concatenate([wave, np.zeros(60 * 16_000, np.float32), wave])
    original = longform._Held.forget

    def watched(self: longform._Held, before_s: float) -> None:
        original(self, before_s)
        held.append(sum(map(len, self._blocks)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(longform._Held, "forget", watched)
        assert sum(1 for _ in longform.sounds(blocks(wave), 6.0, 0.6, 6.0)) > 8
    assert max(held) < (6 + 5 + 5) * 16_000  # the longest sound, the detector's block, the pause that ends it


def test_a_recording_without_speech_is_an_empty_transcript() -> None:
    ear = Ear()
    found = longform.transcribe_blocks(ear, blocks(np.zeros(160_000, np.float32)))
    assert (found.text, found.segments, found.duration_s, ear.batches) == ("", (), 10.0, [])


def test_what_the_model_calls_no_speech_stays_in_the_transcript_with_its_mark() -> None:
    class Doubter(Ear):
        def recognize(
            self,
            waves_s: Sequence[Wave],
            *,
            hotwords: Hotwords | None = None,
            beam: int | None = None,
            words: bool = True,
        ) -> list[Recognized]:
            del hotwords, beam, words
            return [Recognized("", 0.0, flags=(NO_SPEECH,)) for _ in waves_s]

    found = longform.transcribe_blocks(Doubter(), blocks(spoken.recording([1.0])[0]))
    assert [(segment.text, segment.flags) for segment in found.segments] == [("", (NO_SPEECH,))]


def span(start_s: float, end_s: float) -> Span:
    return Span(start_s, end_s, 1.0)


def test_spans_are_joined_over_short_pauses_and_cut_at_the_longest() -> None:
    joiner = longform.Joiner(10.0, 0.6)
    assert joiner.add([span(0, 3), span(3.5, 5), span(5.2, 8), span(8.1, 9)]) == []
    assert joiner.add([span(9.3, 12)]) == [(0, 3)]  # half a second is the longest pause so far
    assert joiner.add([span(20, 21)]) == [(3.5, 12)]
    assert joiner.settle(21.5) == []
    assert joiner.settle(21.7) == [(20, 21)]
    assert joiner.finish() == []


def test_a_span_longer_than_what_is_joined_stays_one() -> None:
    joiner = longform.Joiner(4.0, 0.6)
    assert joiner.add([span(0, 1), span(1.5, 9)]) == [(0, 1)]
    assert joiner.add([span(9.1, 10)]) == [(1.5, 9)]
    assert joiner.finish() == [(9.1, 10)]


def test_sounds_are_joined_up_to_what_the_options_say() -> None:
    wave, _ = spoken.recording([0.5, 0.6, 0.6, 0.6])
    lengths_s: dict[float, list[float]] = {}
    for joined_s in (10.0, 5.0, 1.0):
        ear = Ear()
        ear.joined_s = joined_s
        segments = longform.transcribe_blocks(ear, blocks(wave)).segments
        lengths_s[joined_s] = [segment.end_s - segment.start_s for segment in segments]
    assert [len(found) for found in lengths_s.values()] == [1, 3, 4]
    assert max(lengths_s[5.0]) <= 5.0


def test_progress_adds_up_to_the_length() -> None:
    steps: list[float] = []
    longform.transcribe_blocks(Ear(), blocks(np.zeros(40_000, np.float32)), on_progress=steps.append)
    assert sum(steps) == pytest.approx(2.5)

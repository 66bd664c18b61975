"""The detector: speech is found, what is no speech is not, and blocks do not matter."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))
import no_speech
import spoken

from speechllm.decode import vad
from speechllm.errors import ModelError


@pytest.mark.parametrize("level", [1.0, 0.02])
def test_every_sample_that_is_spoken_lies_in_a_span(level: float) -> None:
    wave, said = spoken.recording([1.0, 2.0, 0.7])
    found = vad.speech_spans(level * wave)
    assert all(any(start <= begin and end <= stop for start, stop in found) for begin, end in said), (found, said)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(found))
    pauses = sum(end - begin for begin, end in found) - sum(end - begin for begin, end in said)
    assert pauses < 1.5  # padding, not the four seconds of pauses


def test_fifty_sounds_without_speech_have_no_span() -> None:
    sounds = dict(no_speech.sounds())
    assert len(sounds) == 50
    found = {name: vad.detect(wave) for name, wave in sounds.items()}
    assert [name for name, activity in found.items() if activity.spans] == []
    assert max(activity.probability for activity in found.values()) < 0.1


def test_the_mean_probability_tells_speech_from_its_absence() -> None:
    assert vad.detect(spoken.sentence(0)).probability > 0.6
    assert vad.detect(np.zeros(0, np.float32)) == vad.Activity((), 0.0)


def test_how_the_samples_come_in_does_not_matter() -> None:
    wave, _ = spoken.recording([0.5, 1.5, 1.0, 0.6])
    whole = vad.detect(wave)
    stream = vad.SpanStream()
    spans: list[vad.Span] = []
    for start in range(0, len(wave), 777):
        spans += stream.feed(wave[start : start + 777])
    assert tuple(spans + stream.finish()) == whole.spans
    assert stream.probability == whole.probability


def test_a_span_that_is_too_long_is_cut_without_gap_or_overlap_where_it_is_quiet() -> None:
    wave, _ = spoken.recording([0.5, 0.25, 0.25, 0.25])  # pauses shorter than those that end a span
    whole = vad.detect(wave).spans
    assert len(whole) == 1
    cut = vad.detect(wave, vad.VadSettings(longest_s=5.0)).spans
    assert (cut[0].start_s, cut[-1].end_s) == (whole[0].start_s, whole[0].end_s)
    assert len(cut) > 1
    for before, after in itertools.pairwise(cut):
        assert before.end_s == after.start_s
        around = wave[round(before.end_s * 16_000) - 80 : round(before.end_s * 16_000) + 80]
        assert np.abs(around).max() < 0.05
    assert all(span.end_s - span.start_s <= 5.0 for span in cut)


def test_a_click_is_no_span() -> None:
    wave = np.zeros(48_000, np.float32)
    wave[24_000:24_040] = 0.9
    assert vad.speech_spans(wave) == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    vad._network.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"silero-vad: is not installed; pip install 'silero-vad>=6.2,<7'"):
        vad.detect(np.zeros(16_000, np.float32))

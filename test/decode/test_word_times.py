"""The word starts that a long recording is measured against: they are those of the sound."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))
import word_times

# kana, for the readings of some kanji pass through a package that warns
TEXT = "えきまで、あるいてじゅっぷんかかります。"


@pytest.mark.parametrize("speed", [0.85, 1.0, 1.15, 1.3])
def test_the_durations_of_the_phones_add_up_to_the_sound(speed: float) -> None:
    import pyopenjtalk

    wave, rate_hz = pyopenjtalk.tts(TEXT, speed=speed)
    assert word_times.open_jtalk(TEXT, speed).duration_s == pytest.approx(len(wave) / rate_hz, abs=1e-9)


def test_a_word_begins_where_its_sound_does() -> None:
    import pyopenjtalk

    wave, rate_hz = pyopenjtalk.tts(TEXT)
    starts_s = word_times.spoken("ojt-p0-s100-a55", TEXT).starts_s
    level = np.abs(wave) / np.abs(wave).max()
    first, after_pause = starts_s[0], starts_s[TEXT.index("あ")]
    assert level[: round(first * rate_hz)].max() < 0.05 < level[round(first * rate_hz) :][: rate_hz // 10].max()
    pause = level[round((after_pause - 0.08) * rate_hz) : round((after_pause - 0.02) * rate_hz)]
    assert pause.max() < 0.05 < level[round(after_pause * rate_hz) :][: rate_hz // 10].max()
    assert list(starts_s.values()) == sorted(starts_s.values())

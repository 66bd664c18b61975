"""Speech for tests: sentences of Open JTalk, and recordings made of them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from speechllm.data.audio import SAMPLE_RATE_HZ, resample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# kana, for the readings of some kanji pass through a package that warns
SENTENCES = (
    "きょうはてんきがいいですね。",
    "えきまであるいてじゅっぷんかかります。",
    "あしたのかいぎはさんじからです。",
)


@functools.cache
def sentence(number: int) -> NDArray[np.float32]:
    """Return a sentence at 16 kHz without the silence around it."""
    import pyopenjtalk

    wave, rate_hz = pyopenjtalk.tts(SENTENCES[number % len(SENTENCES)])
    wave = resample((wave / np.abs(wave).max() / 2).astype(np.float32), rate_hz, SAMPLE_RATE_HZ)
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    return wave[loud[0] : loud[-1] + 1]


def recording(pauses_s: Sequence[float]) -> tuple[NDArray[np.float32], list[tuple[float, float]]]:
    """Return a recording with a sentence after each pause, and when each is spoken; a second of silence ends it."""
    rng = np.random.default_rng(4)
    parts: list[NDArray[np.float32]] = []
    spans: list[tuple[float, float]] = []
    at = 0
    for number, pause_s in enumerate(pauses_s):
        parts += [np.zeros(round(pause_s * SAMPLE_RATE_HZ), np.float32), sentence(number)]
        at += len(parts[-2])
        spans.append((at / SAMPLE_RATE_HZ, (at + len(parts[-1])) / SAMPLE_RATE_HZ))
        at += len(parts[-1])
    wave = np.concatenate([*parts, np.zeros(SAMPLE_RATE_HZ, np.float32)])
    return wave + rng.normal(0, 1e-4, len(wave)).astype(np.float32), spans

"""Fifty sounds without speech, made from seeds: silence, noises, tones, music; and what a recogniser makes of them.

    python tools/bench/no_speech.py --model exp/mini/model

Told are the sounds in which the detector finds speech, and those that get a text.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Wave = NDArray[np.float32]

SAMPLE_RATE_HZ = 16_000
PEAK = 0.5
KINDS_EACH = 5  # of ten kinds
SCALE = (0, 2, 4, 5, 7, 9, 11)  # half tones of a major scale
CHORDS = ((0, 4, 7), (5, 9, 12), (7, 11, 14), (9, 12, 16), (2, 5, 9))
NOTES_SHARE = 0.8  # of the beats of a melody; the others are rests
TOP_HZ = 7_500
PARTIALS = (1.0, 0.5, 0.3, 0.2, 0.12, 0.08)


def silence(count: int, _rng: np.random.Generator) -> Wave:
    """Return zeros."""
    return np.zeros(count, np.float32)


def white(count: int, rng: np.random.Generator) -> Wave:
    """Return white noise."""
    return _coloured(count, rng, 0.0)


def pink(count: int, rng: np.random.Generator) -> Wave:
    """Return noise that falls by 3 dB an octave."""
    return _coloured(count, rng, 0.5)


def brown(count: int, rng: np.random.Generator) -> Wave:
    """Return noise that falls by 6 dB an octave."""
    return _coloured(count, rng, 1.0)


def hum(count: int, rng: np.random.Generator) -> Wave:
    """Return mains hum with its overtones, and a little noise."""
    base_hz = rng.choice([50.0, 60.0])
    overtones = [_tone(count, base_hz * n) / n**1.5 for n in range(1, 12)]
    return _scaled(np.sum(overtones, axis=0) + 0.05 * rng.standard_normal(count), rng)


def sine(count: int, rng: np.random.Generator) -> Wave:
    """Return a steady tone."""
    return _scaled(_tone(count, rng.uniform(80, 4_000)), rng)


def sweep(count: int, rng: np.random.Generator) -> Wave:
    """Return a tone that rises or falls all the time."""
    first_hz, last_hz = rng.uniform(100, 6_000, 2)
    phase = 2 * np.pi * np.cumsum(np.linspace(first_hz, last_hz, count)) / SAMPLE_RATE_HZ
    return _scaled(np.sin(phase), rng)


def beeps(count: int, rng: np.random.Generator) -> Wave:
    """Return short tones with pauses, as a telephone or an alarm makes them."""
    period = int(rng.uniform(0.3, 1.2) * SAMPLE_RATE_HZ)
    sounds = (np.arange(count) % period) < period * rng.uniform(0.3, 0.6)
    return _scaled(_tone(count, rng.uniform(400, 2_500)) * sounds, rng)


def chords(count: int, rng: np.random.Generator) -> Wave:
    """Return struck chords, one after the other."""
    notes = [(beat, half_tone) for beat in range(64) for half_tone in CHORDS[int(rng.integers(len(CHORDS)))]]
    return _scaled(_played(count, notes, rng, beat_s=rng.uniform(0.5, 1.0)), rng)


def music(count: int, rng: np.random.Generator) -> Wave:
    """Return a melody over chords, with drums."""
    beat_s = rng.uniform(0.35, 0.6)
    melody = [(beat / 2, 12 + SCALE[int(rng.integers(7))]) for beat in range(128) if rng.random() < NOTES_SHARE]
    harmony = [(4 * bar, half_tone - 12) for bar in range(16) for half_tone in CHORDS[int(rng.integers(len(CHORDS)))]]
    drums: NDArray[np.float64] = np.zeros(count)
    for beat in np.arange(0, count / SAMPLE_RATE_HZ, beat_s):
        first = int(beat * SAMPLE_RATE_HZ)
        hit = rng.standard_normal(min(2_000, count - first)) * np.exp(-np.arange(min(2_000, count - first)) / 300)
        drums[first : first + len(hit)] += 0.5 * hit
    return _scaled(_played(count, [*melody, *harmony], rng, beat_s=beat_s) + drums, rng)


KINDS: dict[str, Callable[[int, np.random.Generator], Wave]] = {
    made.__name__: made for made in (silence, white, pink, brown, hum, sine, sweep, beeps, chords, music)
}


def sounds(each: int = KINDS_EACH) -> Iterator[tuple[str, Wave]]:
    """Yield name and samples at 16 kHz of `each` sounds of every kind, 1 to 20 s long; always the same ones."""
    for number, (name, make) in enumerate(KINDS.items()):
        for index in range(each):
            rng = np.random.default_rng([number, index])
            count = int(SAMPLE_RATE_HZ * (1.0, 3.0, 6.0, 12.0, 20.0)[index % 5])
            yield f"{name}-{index}", make(count, rng)


def _tone(count: int, pitch_hz: float) -> NDArray[np.float64]:
    return np.sin(2 * np.pi * pitch_hz * np.arange(count) / SAMPLE_RATE_HZ)


def _coloured(count: int, rng: np.random.Generator, exponent: float) -> Wave:
    """Return noise whose amplitude falls with frequency to the power of `exponent`."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    pitches_hz = np.fft.rfftfreq(count, 1 / SAMPLE_RATE_HZ)
    return _scaled(np.fft.irfft(spectrum / np.maximum(pitches_hz, 20.0) ** exponent, count), rng)


def _played(
    count: int, notes: Sequence[tuple[float, int]], rng: np.random.Generator, *, beat_s: float
) -> NDArray[np.float64]:
    """Return notes (beat, half tones above the key) of a plucked sound with overtones."""
    key_hz = rng.uniform(150, 350)
    wave = np.zeros(count)
    for beat, half_tone in notes:
        first = int(beat * beat_s * SAMPLE_RATE_HZ)
        length = min(int(1.5 * SAMPLE_RATE_HZ), count - first)
        if length <= 0:
            continue
        pitch_hz = key_hz * 2 ** (half_tone / 12)
        sound = sum(part * _tone(length, pitch_hz * n) for n, part in enumerate(PARTIALS, 1) if pitch_hz * n < TOP_HZ)
        wave[first : first + length] += sound * np.exp(-np.arange(length) / (0.4 * SAMPLE_RATE_HZ))
    return wave


def _scaled(wave: NDArray[np.float64], rng: np.random.Generator) -> Wave:
    """Return the sound at a level between -30 dB and the full peak, as recordings come."""
    gain = PEAK * 10 ** rng.uniform(-1.5, 0)
    return (gain * wave / max(1e-9, float(np.abs(wave).max()))).astype(np.float32)


def main() -> int:
    """Recognise every sound; return 0 where none gets a text and all are marked."""
    from speechllm.decode.result import NO_SPEECH
    from speechllm.decode.vad import detect
    from speechllm.recognizer import SpeechLLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    recognizer = SpeechLLM.from_pretrained(parser.parse_args().model)
    made = dict(sounds())
    found = dict(zip(made, recognizer.recognize(list(made.values())), strict=True))
    report = {
        "sounds": len(made),
        "with_spans": [name for name, wave in made.items() if detect(wave).spans],
        "with_text": {name: one.text for name, one in found.items() if one.text},
        "not_marked": [name for name, one in found.items() if NO_SPEECH not in one.flags],
        "most_probable_speech": max(detect(wave).probability for wave in made.values()),
    }
    print(json.dumps(report, ensure_ascii=False, indent=1))
    return 1 if report["with_text"] or report["not_marked"] else 0


if __name__ == "__main__":
    sys.exit(main())

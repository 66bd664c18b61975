"""Changes to sounds and features while training, each a pure function of (seed, epoch, utterance id).

A resumed run, or another number of processes, replays them exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from speechllm.data import audio
from speechllm.errors import ConfigError
from speechllm.runtime import derive_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from speechllm.config.schema import AugmentConfig

SOUND_SUFFIXES = (".wav", ".flac", ".ogg")
QUIET = 1e-8  # power below which a sound is silence, and has no ratio to noise


class SoundAugmenter:
    """Speed, reverberation and noise for the sounds of one run; sounds of the folders are read when drawn."""

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        """List the folders.

        Raises:
            ConfigError: a folder holds no sound.
        """
        self.config, self.seed = config, seed
        self.noises = _sounds_of(config.noise_dir, "noise_dir")
        self.rooms = _sounds_of(config.reverb_dir, "reverb_dir")

    def __call__(self, wave_s: NDArray[np.float32], utt_id: str, epoch: int) -> NDArray[np.float32]:
        """Return the sound as this epoch hears it: another speed, then another room, then noise."""
        rng = np.random.default_rng(derive_seed("sound", self.seed, epoch, utt_id))
        if self.config.speeds:
            wave_s = change_speed(wave_s, self.config.speeds[int(rng.integers(len(self.config.speeds)))])
        if self.rooms and rng.random() < self.config.reverb_part:
            wave_s = reverberate(wave_s, audio.read(self.rooms[int(rng.integers(len(self.rooms)))]))
        if self.noises and rng.random() < self.config.noise_part:
            noise_s = audio.read(self.noises[int(rng.integers(len(self.noises)))])
            start = int(rng.integers(len(noise_s)))
            wave_s = add_noise(wave_s, np.roll(noise_s, -start), rng.uniform(*self.config.snr_db))
        return wave_s


def _sounds_of(folder: str | None, field: str) -> list[Path]:
    """Return the sounds below a folder, in the order of their paths."""
    if folder is None:
        return []
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SOUND_SUFFIXES)
    if not found:
        raise ConfigError(f"train.augment.{field}", f"{folder} holds no sound", f"name a folder of {SOUND_SUFFIXES}")
    return found


def change_speed(wave_s: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Return the sound played `factor` times as fast; its pitch rises with it (Ko 2015)."""
    return audio.resample(wave_s, round(audio.SAMPLE_RATE_HZ * factor), audio.SAMPLE_RATE_HZ)


def add_noise(wave_s: NDArray[np.float32], noise_s: NDArray[np.float32], snr_db: float) -> NDArray[np.float32]:
    """Return the sound with noise `snr_db` below it; noise that is too short is repeated, silence stays silence."""
    fitted_s = np.resize(noise_s, len(wave_s))
    power, noise_power = float(np.mean(wave_s**2)), float(np.mean(fitted_s**2))
    if min(power, noise_power) < QUIET:
        return wave_s
    scale = np.sqrt(power / noise_power / 10 ** (snr_db / 10))
    noisy_s: NDArray[np.float32] = (wave_s + scale * fitted_s).astype(np.float32)
    return noisy_s


def reverberate(wave_s: NDArray[np.float32], room_s: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the sound in the room of an impulse response, as long, as loud, and not later than it was."""
    peak = int(np.abs(room_s).argmax())
    length = len(wave_s) + len(room_s) - 1
    spectrum = np.fft.rfft(wave_s, length) * np.fft.rfft(room_s, length)
    heard_s = np.fft.irfft(spectrum, length)[peak : peak + len(wave_s)]
    loudness = float(np.sqrt(np.mean(heard_s**2)))
    if loudness**2 < QUIET:
        return wave_s
    return (heard_s * float(np.sqrt(np.mean(wave_s**2))) / loudness).astype(np.float32)


def augment_frames(
    frames_eh: NDArray[np.float32], config: AugmentConfig, seed: int, epoch: int, utt_id: str
) -> NDArray[np.float32]:
    """Return features with stretches and bands set to the mean, and noise (SpecAugment, Park 2019, sec. 2).

    A pure function of its arguments: a resumed run replays it exactly.
    """
    rng = np.random.default_rng(derive_seed("augment", seed, epoch, utt_id))
    changed = frames_eh.copy()
    mean_h = frames_eh.mean(axis=0)
    length, width = frames_eh.shape
    for _ in range(config.time_masks):
        size = int(rng.integers(0, min(config.max_time_mask_frames, length) + 1))
        start = int(rng.integers(0, length - size + 1))
        changed[start : start + size] = mean_h
    for _ in range(config.channel_masks):
        size = int(rng.integers(0, min(config.max_channel_mask, width) + 1))
        start = int(rng.integers(0, width - size + 1))
        changed[:, start : start + size] = mean_h[start : start + size]
    if config.noise:
        noise = rng.standard_normal(frames_eh.shape, dtype=np.float32)
        changed += config.noise * frames_eh.std(axis=0) * noise
    return changed

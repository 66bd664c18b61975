"""Changes to sounds: what they do, and that they are functions of seed, epoch and utterance alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny

from speechllm.config.schema import AugmentConfig
from speechllm.data import audio
from speechllm.data.augment import SoundAugmenter, add_noise, change_speed, reverberate
from speechllm.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

RATE_HZ = audio.SAMPLE_RATE_HZ


def tone(frequency_hz: float, num_samples: int = 8_000) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    made: np.ndarray[tuple[int], np.dtype[np.float32]] = (
        0.3 * np.sin(2 * np.pi * frequency_hz * np.arange(num_samples) / RATE_HZ)
    ).astype(np.float32)
    return made


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1])
def test_speed_changes_length_and_pitch(factor: float) -> None:
    faster = change_speed(tone(440.0), factor)
    assert len(faster) == pytest.approx(8_000 / factor, abs=2)
    peak_hz = np.abs(np.fft.rfft(faster)).argmax() * RATE_HZ / len(faster)
    assert peak_hz == pytest.approx(440 * factor, abs=3)


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 20.0])
@pytest.mark.parametrize("noise_samples", [3_000, 20_000])
def test_noise_has_the_power_that_was_asked_for(snr_db: float, noise_samples: int) -> None:
    clean = tone(300.0)
    noisy = add_noise(clean, tiny.wave(noise_samples, 2), snr_db)
    ratio = np.mean(clean**2) / np.mean((noisy - clean) ** 2)
    assert 10 * np.log10(ratio) == pytest.approx(snr_db, abs=0.01)
    assert noisy.dtype == np.float32


def test_silence_stays_silence() -> None:
    silence = np.zeros(500, dtype=np.float32)
    assert not add_noise(silence, tiny.wave(500), 10.0).any()
    assert not reverberate(silence, tiny.wave(50)).any()


def test_a_room_of_one_echo_adds_it_and_delays_nothing() -> None:
    room = np.zeros(1_200, dtype=np.float32)
    room[[200, 1_000]] = 1.0, 0.5
    clean = tiny.wave(4_000, 5)
    heard = reverberate(clean, room)
    echo = clean + 0.5 * np.pad(clean, (800, 0))[:4_000]
    np.testing.assert_allclose(heard / np.linalg.norm(heard), echo / np.linalg.norm(echo), atol=1e-5)
    assert np.sqrt(np.mean(heard**2)) == pytest.approx(np.sqrt(np.mean(clean**2)), rel=1e-4)


@pytest.fixture
def config(tmp_path: Path) -> AugmentConfig:
    for number in range(3):
        (tmp_path / "noise/sub").mkdir(parents=True, exist_ok=True)
        audio.write_wav(tmp_path / f"noise/sub/{number}.wav", tiny.wave(5_000, number), RATE_HZ)
    return AugmentConfig(speeds=(0.9, 1.0, 1.1), noise_dir=str(tmp_path / "noise"), noise_part=0.5)


def test_a_sound_is_a_function_of_seed_epoch_and_utterance(config: AugmentConfig) -> None:
    wave = tone(200.0)
    first = SoundAugmenter(config, 1)(wave, "u1", 3)
    np.testing.assert_array_equal(SoundAugmenter(config, 1)(wave, "u1", 3), first)
    others = [SoundAugmenter(config, 1)(wave, "u1", epoch) for epoch in range(8)]
    assert len({sound.tobytes() for sound in others}) > 4
    assert {len(sound) for sound in others} == {8_889, 8_000, 7_273}
    assert SoundAugmenter(config, 2)(wave, "u1", 3).tobytes() != SoundAugmenter(config, 1)(wave, "u2", 3).tobytes()


def test_without_settings_a_sound_is_left_as_it_is() -> None:
    wave = tone(200.0)
    assert SoundAugmenter(AugmentConfig(), 1)(wave, "u1", 0) is wave


def test_a_folder_without_sounds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.augment\.reverb_dir: .* holds no sound"):
        SoundAugmenter(AugmentConfig(reverb_dir=str(tmp_path)), 1)

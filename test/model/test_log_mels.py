"""Whisper's input: our log-mel features are those of Hugging Face's extractor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from transformers import WhisperFeatureExtractor

from speechllm.config.schema import EncoderConfig
from speechllm.model.encoder import load_encoder
from speechllm.model.encoder_whisper import WhisperFrames, log_mels

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LENGTHS = (400, 559, 560, 16_000, 16_001, 40_079, 480_000)


def sounds() -> list[NDArray[np.float32]]:
    """Return sounds of many lengths and of very different loudness, one of them silent, one half so."""
    waves = [tiny.wave(length, seed) * np.float32(10.0 ** -(seed % 4)) for seed, length in enumerate(LENGTHS)]
    half = tiny.wave(30_000, 20)
    half[10_000:] = 0
    return [*waves, np.zeros(5_000, np.float32), half]


def theirs(features: Any, wave: NDArray[np.float32], padding: str) -> torch.Tensor:
    """Return [m f] as transformers computes it, one sound at a time."""
    made = features(wave, sampling_rate=16_000, padding=padding, return_tensors="pt")
    mel_mf: torch.Tensor = made["input_features"][0]
    return mel_mf


@pytest.mark.parametrize("num_mels", [80, 128])
def test_log_mels_are_the_extractors_for_each_sound_whatever_stands_beside_it(num_mels: int) -> None:
    features = WhisperFeatureExtractor(feature_size=num_mels)
    filters_mk = torch.from_numpy(features.mel_filters.T).float()
    waves = sounds()
    found_bmf, frames_b = log_mels(waves, torch.hann_window(features.n_fft), filters_mk)
    assert found_bmf.shape == (len(waves), num_mels, 3_000)
    for found_mf, length, wave in zip(found_bmf, frames_b, waves, strict=True):
        wanted_mf = theirs(features, wave, "do_not_pad")
        assert wanted_mf.shape[1] == length
        torch.testing.assert_close(found_mf[:, :length], wanted_mf, rtol=0, atol=1e-5)
        assert not found_mf[:, length:].any()


@pytest.mark.parametrize("pad_to_30s", [False, True])
def test_the_encoder_reads_what_the_extractor_in_its_folder_makes(tmp_path: Path, *, pad_to_30s: bool) -> None:
    folder = tiny.whisper(tmp_path)
    config = EncoderConfig(name=str(folder), pad_to_30s=pad_to_30s)
    encoder = load_encoder(config, tiny.found(folder), tiny.CPU)
    assert isinstance(encoder, WhisperFrames)
    features = WhisperFeatureExtractor.from_pretrained(folder)
    waves = sounds()[:5]
    found_bmf, frames_b = encoder._mels(waves)
    for found_mf, length, wave in zip(found_bmf, frames_b, waves, strict=True):
        wanted_mf = theirs(features, wave, "max_length" if pad_to_30s else "do_not_pad")
        torch.testing.assert_close(found_mf[:, :length], wanted_mf, rtol=0, atol=1e-5)

"""Training from sounds, without a store: the same frames, checked before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny

from speechllm import dump, stages
from speechllm.config import load as configs
from speechllm.data import audio, kaldi
from speechllm.data.dataset import FeatureSet
from speechllm.errors import ConfigError, DataError
from speechllm.train.sets import WaveSet, open_sets

if TYPE_CHECKING:
    from pathlib import Path

    from speechllm.config.schema import Config

LENGTHS = {"u1": 16_000, "u2": 9_000, "u3": 12_345}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.data_folder(tmp_path_factory.mktemp("sounds"), LENGTHS)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    base = tmp_path_factory.mktemp("models")
    return tiny.config(tiny.wavlm(base / "encoder"), tiny.llama(base / "lm"), train={"epochs": 1, "validate_every": 9})


@pytest.fixture
def dumped(tmp_path: Path, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dump, "worker_pool", tiny.HerePool)
    dump.dump(config.encoder, "cpu", data, tmp_path / "dump", 1)
    return tmp_path / "dump"


def test_sounds_give_the_frames_of_a_store(data: Path, config: Config, dumped: Path) -> None:
    opened = open_sets(config, data, data)
    stored = FeatureSet(dumped)
    assert isinstance(opened.train, WaveSet)
    assert opened.width_h == 16
    assert list(opened.train.examples) == list(stored.examples)
    for (key, example), frames in zip(
        opened.train.examples.items(), opened.train.frames_of(list(LENGTHS)), strict=True
    ):
        assert example.num_frames == stored.examples[key].num_frames == len(frames)
        np.testing.assert_allclose(frames, stored.frames(key), atol=2e-3)


def test_sounds_are_rounded_as_the_configured_store_rounds(
    tmp_path: Path, data: Path, config: Config, dumped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump, "worker_pool", tiny.HerePool)
    small = config.model_copy(update={"encoder": config.encoder.model_copy(update={"stored": "int8"})})
    dump.dump(small.encoder, "cpu", data, tmp_path / "small", 1)
    opened = open_sets(small, data, data)
    stored, finer = FeatureSet(tmp_path / "small"), FeatureSet(dumped)
    for key, frames in zip(LENGTHS, opened.train.frames_of(list(LENGTHS)), strict=True):
        step = np.abs(frames).max(axis=1, keepdims=True) / 127
        assert (np.abs(frames - stored.frames(key)) <= 1.01 * step).all()
        np.testing.assert_allclose(frames / step, np.rint(frames / step), atol=1e-3)  # one byte a value
        assert not np.allclose(frames, finer.frames(key), atol=2e-3)


def test_a_run_from_sounds_leaves_a_model_that_decodes(tmp_path: Path, data: Path, config: Config) -> None:
    configs.dump(config, tmp_path / "conf.yaml")
    stages.train(tmp_path / "conf.yaml", data, data, tmp_path / "exp")
    assert stages.decode(tmp_path / "exp", data, tmp_path / "out", {}) == len(LENGTHS)


def test_a_dump_and_a_data_directory_do_not_mix(data: Path, config: Config, dumped: Path) -> None:
    with pytest.raises(ConfigError, match="is not of one kind with"):
        open_sets(config, data, dumped)


def test_a_sound_that_the_encoder_cannot_take_is_named_before_the_first_step(tmp_path: Path, config: Config) -> None:
    audio.write_wav(tmp_path / "short.wav", tiny.wave(300), tiny.SAMPLE_RATE_HZ)
    kaldi.write_dir(tmp_path / "data", [kaldi.Utterance("u9", tmp_path / "short.wav", text="あ")])
    with pytest.raises(DataError, match=r"short\.wav \(utterance u9\): lasts 0\.019 s, too short"):
        open_sets(config, tmp_path / "data", tmp_path / "data")

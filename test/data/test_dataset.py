"""Examples by id, and augmentation as a pure function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from speechllm.config.schema import AugmentConfig
from speechllm.data import archive, kaldi
from speechllm.data.augment import augment_frames as augment
from speechllm.data.dataset import Example, FeatureSet
from speechllm.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MASKS = AugmentConfig(time_masks=2, max_time_mask_frames=6, channel_masks=2, max_channel_mask=4)
NOISE = AugmentConfig(noise=0.5)


def _frames(length: int = 30, width: int = 16) -> NDArray[np.float32]:
    return np.random.default_rng(9).standard_normal((length, width), dtype=np.float32) + 3


def _dump(
    folder: Path,
    texts: dict[str, str],
    durations: dict[str, str] | None = None,
    stored: archive.Stored = "float16",
) -> Path:
    matrices = {key: np.full((at + 2, 3), at, np.float16) for at, key in enumerate(("u1", "u2", "あ"))}
    frames = archive.write_archive(folder / "feats.ark", iter(matrices.items()), stored)
    kaldi.write_table(folder / "utt2crc", archive.checksums(folder / "feats.ark"))
    kaldi.write_table(folder / "utt2num_frames", {key: str(count) for key, count in frames.items()})
    kaldi.write_table(folder / "text", texts)
    kaldi.write_table(folder / "utt2dur", {"u1": "0.05", "u2": "0.07", "あ": "0.09", **(durations or {})})
    return folder


def test_examples_are_joined_by_id_in_byte_order(tmp_path: Path) -> None:
    features = FeatureSet(_dump(tmp_path, {"あ": "傘を忘れた。", "u2": "窓を開ける。", "u1": "鍵を探す。"}))
    assert list(features.examples.values()) == [
        Example("u1", 2, "鍵を探す。", 0.05),
        Example("u2", 3, "窓を開ける。", 0.07),
        Example("あ", 4, "傘を忘れた。", 0.09),
    ]
    assert features.frames("あ").dtype == np.float32
    assert np.array_equal(features.frames("u2"), np.full((3, 3), 1.0))


def test_frames_are_the_same_however_they_are_stored(tmp_path: Path) -> None:
    texts = {"あ": "傘を忘れた。", "u2": "窓を開ける。", "u1": "鍵を探す。"}
    for stored in ("float16", "int8"):
        features = FeatureSet(_dump(tmp_path, texts, stored=stored))
        for at, frames in enumerate(features.frames_of(["u1", "u2", "あ"])):
            assert frames.dtype == np.float32
            np.testing.assert_allclose(frames, np.full((at + 2, 3), at), rtol=1e-6)


@pytest.mark.parametrize(
    ("texts", "utt_id"),
    [
        ({"u1": "鍵", "u2": "窓"}, "あ"),
        ({"u1": "鍵", "u2": "窓", "u3": "傘", "あ": "傘"}, "u3"),
        ({"u1": "鍵", "u02": "窓", "あ": "傘"}, "u02"),
    ],
)
def test_features_and_texts_of_other_utterances_are_told(tmp_path: Path, texts: dict[str, str], utt_id: str) -> None:
    with pytest.raises(DataError) as caught:
        FeatureSet(_dump(tmp_path, texts))
    assert str(caught.value) == f"{tmp_path}: {utt_id} is not in both text and feats.scp; run stage 2 again"


@pytest.mark.parametrize(
    ("durations", "message"),
    [
        ({"u9": "1.0"}, ": u9 is not in both utt2dur and feats.scp; run stage 2 again"),
        ({"u2": "eine"}, "/utt2dur: u2 has no number of seconds; run stage 2 again"),
    ],
)
def test_durations_that_do_not_fit_are_told(tmp_path: Path, durations: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        FeatureSet(_dump(tmp_path, {"u1": "鍵", "u2": "窓", "あ": "傘"}, durations))
    assert str(caught.value) == f"{tmp_path}{message}"


def test_a_dump_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"feats\.scp: no such file"):
        FeatureSet(tmp_path)


@pytest.mark.parametrize("config", [MASKS, NOISE], ids=["masks", "noise"])
def test_augmentation_is_a_function_of_seed_epoch_and_utterance(config: AugmentConfig) -> None:
    frames = _frames()
    first = augment(frames, config, 1, 0, "u1")
    augment(frames, config, 7, 7, "u7")  # what was drawn in between does not matter
    assert np.array_equal(augment(frames, config, 1, 0, "u1"), first)
    for other in ((2, 0, "u1"), (1, 1, "u1"), (1, 0, "u2")):
        assert not np.array_equal(augment(frames, config, *other), first)


def test_augmentation_leaves_its_input_alone() -> None:
    frames = _frames()
    changed = augment(frames, MASKS.model_copy(update={"noise": 1.0}), 1, 0, "u1")
    assert np.array_equal(frames, _frames())
    assert changed.shape == frames.shape
    assert changed.dtype == np.float32


def test_no_augmentation_changes_nothing() -> None:
    assert np.array_equal(augment(_frames(), AugmentConfig(), 1, 0, "u1"), _frames())


def test_masks_set_stretches_and_bands_to_the_mean() -> None:
    frames = _frames()
    mean_h = frames.mean(axis=0)
    num_masked = 0
    for epoch in range(20):
        masked = augment(frames, MASKS, 1, epoch, "u1") != frames
        times, channels = masked.all(axis=1), masked.all(axis=0)
        assert np.array_equal(masked, times[:, None] | channels[None, :])
        assert times.sum() <= 12
        assert channels.sum() <= 8
        num_masked += int(masked.sum())
        assert np.array_equal(augment(frames, MASKS, 1, epoch, "u1")[masked], np.tile(mean_h, (30, 1))[masked])
    assert num_masked > 0


def test_noise_is_as_loud_as_asked() -> None:
    frames = (_frames(2_000) * np.arange(1, 17)).astype(np.float32)
    added = augment(frames, NOISE, 1, 0, "u1") - frames
    assert np.allclose(added.std(axis=0) / frames.std(axis=0), 0.5, atol=0.03)


@pytest.mark.parametrize("shape", [(1, 16), (2, 1)])
def test_a_mask_longer_than_the_utterance_fits_in(shape: tuple[int, int]) -> None:
    config = AugmentConfig(time_masks=20, max_time_mask_frames=1_000, channel_masks=20, max_channel_mask=1_000)
    frames = _frames(*shape)
    assert np.allclose(augment(frames, config, 1, 0, "u1"), frames.mean(axis=0))

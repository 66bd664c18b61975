"""The length arithmetic: what it says is what torch's modules really put out."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModel, SeamlessM4TFeatureExtractor, WhisperFeatureExtractor

from speechllm import lengths

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("family", tiny.WAV2VEC2_KIND)
def test_conv_frames_are_those_of_the_familys_own_convolutions(family: str, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny.ENCODERS[family](tmp_path))
    convolutions = [layer.conv.to("meta") for layer in model.feature_extractor.conv_layers]

    @functools.cache
    def put_out(index: int, length: int) -> int:
        conv = convolutions[index]
        return int(conv(torch.empty(1, conv.in_channels, length, device="meta")).shape[-1])

    for num_samples in range(400, 2001):
        length = num_samples
        for index in range(len(convolutions)):
            length = put_out(index, length)
        counted = lengths.conv_frames(num_samples, model.config.conv_kernel, model.config.conv_stride)
        assert length == counted, num_samples


def test_ten_seconds_are_499_frames_of_wavlm(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny.wavlm(tmp_path))
    assert model(torch.zeros(1, 160_000)).last_hidden_state.shape[1] == 499
    assert lengths.conv_frames(160_000, lengths.WAV2VEC2_KERNELS, lengths.WAV2VEC2_STRIDES) == 499


def test_the_published_kernels_and_strides_are_those_of_transformers(tmp_path: Path) -> None:
    config = AutoModel.from_pretrained(tiny.wavlm(tmp_path)).config
    assert (tuple(config.conv_kernel), tuple(config.conv_stride)) == (
        lengths.WAV2VEC2_KERNELS,
        lengths.WAV2VEC2_STRIDES,
    )


@pytest.mark.parametrize("num_samples", [0, 1, 9, 399])
def test_too_short_an_input_leaves_no_frame(num_samples: int) -> None:
    assert lengths.conv_frames(num_samples, lengths.WAV2VEC2_KERNELS, lengths.WAV2VEC2_STRIDES) == 0


def test_kernels_and_strides_of_unequal_number_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        lengths.conv_frames(400, (10, 3), (5,))


def test_whisper_mel_frames_are_those_of_its_feature_extractor() -> None:
    extract = WhisperFeatureExtractor()
    for num_samples in (*range(400, 2001, 13), 1600, 1759, 1760, 1761, 15_999, 16_000, 479_999, 480_000):
        made = extract(np.zeros(num_samples, np.float32), sampling_rate=16_000, padding=False, return_tensors="np")
        assert made["input_features"].shape[-1] == lengths.whisper_mel_frames(num_samples), num_samples


def test_whisper_encoder_frames_are_those_of_its_two_convolutions() -> None:
    encoder = tiny.whisper_model().to("meta").get_encoder()  # type: ignore[operator] # transformers' own
    for num_frames in range(2, 201):
        frames_bhe = encoder.conv2(encoder.conv1(torch.empty(1, 80, num_frames, device="meta")))
        assert frames_bhe.shape[-1] == lengths.whisper_encoder_frames(num_frames), num_frames


def test_thirty_seconds_are_1500_frames_of_whisper() -> None:
    assert lengths.whisper_encoder_frames(lengths.whisper_mel_frames(30 * 16_000)) == 1500


def test_mel_frames_of_w2v_bert_are_those_of_its_feature_extractor() -> None:
    extract = SeamlessM4TFeatureExtractor()
    for num_samples in (*range(400, 2001, 13), 559, 560, 561, 719, 720, 16_000):
        made = extract._extract_fbank_features(np.zeros(num_samples, np.float32))
        assert len(made) == lengths.fbank_frames(num_samples), num_samples


def test_stacked_frames_are_those_that_the_feature_extractor_lets_attend() -> None:
    extract = SeamlessM4TFeatureExtractor()
    for num_samples in (*range(560, 2001, 41), 719, 720, 721, 879, 880, 160_000):
        made = extract(np.zeros(num_samples, np.float32), sampling_rate=16_000, return_tensors="np")
        counted = lengths.stacked_frames(lengths.fbank_frames(num_samples), extract.stride)
        assert made["attention_mask"].sum() == counted, num_samples


def test_sounds_shorter_than_a_window_have_no_mel_frame() -> None:
    assert [lengths.fbank_frames(num_samples) for num_samples in (0, 399, 400)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("kernels", "strides", "shortest"),
    [
        (lengths.WAV2VEC2_KERNELS, lengths.WAV2VEC2_STRIDES, 400),
        ((lengths.FBANK_WINDOW, 2), (lengths.FBANK_HOP, 2), 560),
    ],
    ids=["wav2vec2", "w2v-bert"],
)
def test_the_shortest_input_is_the_first_that_leaves_a_frame(
    kernels: tuple[int, ...], strides: tuple[int, ...], shortest: int
) -> None:
    assert lengths.shortest_input(kernels, strides) == shortest
    assert [lengths.conv_frames(shortest - less, kernels, strides) for less in (0, 1)] == [1, 0]


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (4, 1), (5, 1), (6, 2), (10, 2), (499, 100)])
def test_a_short_last_group_of_frames_is_a_token(frames: int, tokens: int) -> None:
    assert lengths.strided_tokens(frames, 5) == tokens

"""A stream of frames: in order, read ahead but not without end, and faults come through."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import tiny
import torch

from speechllm.config.schema import EncoderConfig
from speechllm.data import kaldi
from speechllm.errors import DataError
from speechllm.model import stream as streaming
from speechllm.model.encoder import load_encoder
from speechllm.model.stream import like_lengths, stream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SAMPLES = {"a": 9_000, "b": 4_000, "c": 12_345, "d": 16_000, "e": 7_000, "f": 400}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_frames_are_those_of_each_utterance(tmp_path: Path, dtype: torch.dtype) -> None:
    config = EncoderConfig(name=str(tiny.whisper(tmp_path / "whisper")))
    encoder = load_encoder(config, tiny.found(tmp_path / "whisper"), tiny.CPU)
    utterances = list(kaldi.load(tiny.data_folder(tmp_path / "in", SAMPLES)).utterances.values())
    found = dict(stream(encoder, like_lengths(utterances, 1.0), tiny.CPU, dtype))
    assert list(found) == ["f", "b", "e", "a", "c", "d"]
    for utt in utterances:
        alone_eh = encoder.encode([utt.read()])[0].to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(torch.from_numpy(found[utt.utt_id]), alone_eh, rtol=0, atol=tolerance)


def test_a_sound_that_cannot_be_read_is_named_and_ends_the_stream(tmp_path: Path) -> None:
    config = EncoderConfig(name=str(tiny.whisper(tmp_path / "whisper")))
    encoder = load_encoder(config, tiny.found(tmp_path / "whisper"), tiny.CPU)
    data = kaldi.load(tiny.data_folder(tmp_path / "in", {"a": 4_000, "short": 399}))
    before = threading.active_count()
    with pytest.raises(DataError, match=r"short\.wav \(utterance short\): lasts 0\.025 s, too short"):
        list(stream(encoder, [list(data.utterances.values())], tiny.CPU, torch.float32))
    assert threading.active_count() == before


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_work_is_done_ahead_in_order_and_no_further_than_asked(depth: int) -> None:
    handed_out: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(10):
            handed_out.append(number)
            yield number

    taken = []
    with ThreadPoolExecutor(4) as pool:
        for number, square in streaming._ahead(pool, lambda value: value * value, numbers(), depth):
            taken.append((number, square))
            assert len(handed_out) <= len(taken) + depth
    assert taken == [(number, number**2) for number in range(10)]


@pytest.mark.parametrize(("seconds", "sizes"), [(0.1, [1] * 6), (1.0, [2, 1, 1, 1, 1]), (2.0, [3, 2, 1]), (60.0, [6])])
def test_a_batch_is_as_long_as_its_longest_makes_it(tmp_path: Path, seconds: float, sizes: list[int]) -> None:
    data = kaldi.load(tiny.data_folder(tmp_path, SAMPLES))
    batches = list(like_lengths(list(data.utterances.values()), seconds))
    assert [len(batch) for batch in batches] == sizes
    assert [utt.utt_id for batch in batches for utt in batch] == ["f", "b", "e", "a", "c", "d"]


def test_what_the_encoder_pads_counts_as_long_as_that(tmp_path: Path) -> None:
    data = kaldi.load(tiny.data_folder(tmp_path, SAMPLES))
    batches = list(like_lengths(list(data.utterances.values()), 100.0, least_s=30.0))
    assert [len(batch) for batch in batches] == [3, 3]

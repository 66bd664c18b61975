"""A ready hypothesis file is taken over with a note of where it came from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from speechllm.data.audio import write_wav
from speechllm.data.kaldi import Utterance, read_table, write_dir
from speechllm.errors import ConfigError, DataError
from speechllm.stages import BaselineOptions, baseline

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    write_wav(tmp_path / "u1.wav", np.zeros(1600, dtype=np.float32), 16_000)
    write_dir(tmp_path / "data", [Utterance("u1", tmp_path / "u1.wav", text="はい")])
    return tmp_path / "data"


def options(hyp: Path | None) -> BaselineOptions:
    return BaselineOptions(hyp=hyp, source="their page")


def test_the_texts_and_the_sum_of_their_file_are_kept(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "their.text").write_text("u1 はい、そうです\n", encoding="utf-8")
    assert baseline("hyp", data_dir, tmp_path / "out", options(tmp_path / "their.text")) == 1
    assert read_table(tmp_path / "out/text") == {"u1": "はい、そうです"}
    note = json.loads((tmp_path / "out/provenance.json").read_text(encoding="utf-8"))
    assert note["hypotheses"] == "their.text"
    assert len(note["sha256"]) == 64
    assert note["source"] == "their page"


def test_a_folder_with_transcripts_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs/text").write_text("u1 はい\n", encoding="utf-8")
    (tmp_path / "their.text").write_text("u1 いいえ\n", encoding="utf-8")
    assert baseline("hyp", tmp_path / "refs", tmp_path / "out", options(tmp_path / "their.text")) == 1


def test_a_missing_file_is_an_error_and_nothing_is_written(tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        baseline("hyp", data_dir, tmp_path / "out", options(tmp_path / "nope"))
    with pytest.raises(ConfigError, match="add --hyp FILE"):
        baseline("hyp", data_dir, tmp_path / "out", options(None))
    assert not (tmp_path / "out").exists()


def test_an_unknown_baseline_names_those_there_are(tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"choose one of whisper, nue-asr, .*hyp"):
        baseline("kaldi", data_dir, tmp_path / "out", options(None))

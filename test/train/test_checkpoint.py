"""Saved states: whole or stepped over, never half believed."""

from __future__ import annotations

import json
import math
import pickle
from typing import TYPE_CHECKING

import pytest
import torch

from speechllm.errors import ModelError
from speechllm.model.state import load_tensors
from speechllm.runtime import sha256
from speechllm.train import checkpoint
from speechllm.train.checkpoint import OPTIMIZER, STATE, TRAINABLE, Checkpoint, load_newest, prune, save

if TYPE_CHECKING:
    from pathlib import Path


def state(step: int) -> Checkpoint:
    progress = {"step": step, "best": math.inf, "seconds": 12.5}
    return Checkpoint({"w": torch.full((2, 3), float(step))}, {"w.exp_avg": torch.arange(3) / 7}, progress)


def saved(folder: Path, *steps: int, keep: int = 9) -> Path:
    """Write states of these steps and return the last one's folder."""
    paths = [save(folder, step, state(step), keep) for step in steps]
    return paths[-1]


def flip(path: Path, place: int) -> None:
    blob = bytearray(path.read_bytes())
    blob[place] ^= 1
    path.write_bytes(blob)


def newest_step(folder: Path) -> object:
    found = load_newest(folder)
    return None if found is None else found.progress["step"]


def test_a_saved_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved(tmp_path, 7)
    found = load_newest(tmp_path)
    assert found is not None
    assert found.progress == state(7).progress
    assert torch.equal(found.trainable["w"], state(7).trainable["w"])
    assert torch.equal(found.optimizer["w.exp_avg"], state(7).optimizer["w.exp_avg"])


def test_where_nothing_was_saved_nothing_is_found(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "missing") is None


def test_the_newest_state_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    saved(tmp_path, 5, 100, 20)
    assert newest_step(tmp_path) == 100


def test_only_the_newest_states_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000002", "step_0000003"]
    prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000003"]


def test_a_step_that_is_saved_again_takes_the_place_of_the_old(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    save(tmp_path, 3, Checkpoint({"w": torch.zeros(1)}, {}, {"step": 3}), keep=9)
    found = load_newest(tmp_path)
    assert found is not None
    assert found.trainable["w"].shape == (1,)


@pytest.mark.parametrize("name", [TRAINABLE, OPTIMIZER])
@pytest.mark.parametrize("place", [0, -1], ids=["first-byte", "last-byte"])
def test_a_state_with_one_changed_byte_is_stepped_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, place: int
) -> None:
    flip(saved(tmp_path, 10, 20) / name, place)
    assert newest_step(tmp_path) == 10
    assert "checkpoint skipped" in caplog.text
    assert f"step_0000020/{name}: is missing or its SHA-256 is wrong" in caplog.text


def test_any_changed_byte_of_the_record_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = saved(tmp_path, 10, 20) / STATE
    whole = record.read_bytes()
    for place, char in enumerate(whole):
        if not bytes((char,)).isspace():  # a changed blank changes no value, or is no JSON
            flip(record, place)
            assert newest_step(tmp_path) == 10, whole[: place + 1]
            record.write_bytes(whole)
    assert "checkpoint skipped" in caplog.text
    assert newest_step(tmp_path) == 20


@pytest.mark.parametrize("name", [TRAINABLE, OPTIMIZER, STATE])
def test_a_state_that_lacks_a_file_is_stepped_over(tmp_path: Path, name: str) -> None:
    (saved(tmp_path, 10, 20) / name).unlink()
    assert newest_step(tmp_path) == 10


def test_where_every_state_is_bad_the_run_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 10, 20)
    for path in tmp_path.glob(f"*/{STATE}"):
        path.write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="holds saved states, none of them whole; remove the folder to start over"):
        load_newest(tmp_path)
    assert caplog.text.count("checkpoint skipped") == 2


class Trap:
    """Something that shows if it was unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _spring, ("unpickled",)


def _spring(word: str) -> None:
    raise AssertionError(word)


def test_a_pickle_is_refused_even_where_its_sum_is_right(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = saved(tmp_path, 10, 20)
    (newest / TRAINABLE).write_bytes(pickle.dumps(Trap()))
    content = json.loads((newest / STATE).read_text(encoding="utf-8"))
    content["sha256"][TRAINABLE] = sha256(newest / TRAINABLE)
    (newest / STATE).write_text(json.dumps(content), encoding="utf-8")
    assert newest_step(tmp_path) == 10
    assert "is no readable safetensors file" in caplog.text


def test_a_pickle_is_no_safetensors_file(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "state.safetensors")
    with pytest.raises(ModelError, match="is no readable safetensors file"):
        load_tensors(tmp_path / "state.safetensors")


def test_a_save_that_was_broken_off_leaves_the_older_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 10)

    def full(_path: Path, _value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 20, state(20), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000010"]
    assert newest_step(tmp_path) == 10

"""Saved training states: whole or absent, checked when read, the newest good one found.

A state is a folder ``step_<n>`` with ``trainable.safetensors``, ``optimizer.safetensors`` and ``state.json``, which
holds the SHA-256 of both. The folder is written under another name, synced and renamed.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.data.archive import sha256
from speechllm.errors import ModelError
from speechllm.model.state import load_tensors, save_tensors
from speechllm.runtime import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

log = logging.getLogger(__name__)

TRAINABLE = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
BEST = "best.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had not stopped."""

    trainable: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    progress: Mapping[str, object]
    """Step, position in the epoch, best result so far."""


def save(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``folder/step_<step>`` and delete all but the newest `keep` states; return its path."""
    target = folder / f"step_{step:07d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_tensors(temporary / TRAINABLE, checkpoint.trainable)
        save_tensors(temporary / OPTIMIZER, checkpoint.optimizer)
        sums = {name: sha256(temporary / name) for name in (TRAINABLE, OPTIMIZER)}
        write_json(temporary / STATE, {"sha256": sums, "progress": dict(checkpoint.progress)})
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    prune(folder, keep)
    return target


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` states."""
    for old in _states(folder)[keep:]:
        shutil.rmtree(old)


def _states(folder: Path) -> list[Path]:
    """Return the saved states, the newest first."""
    return sorted(folder.glob("step_*"), reverse=True) if folder.is_dir() else []


def load_newest(folder: Path) -> Checkpoint | None:
    """Return the newest state that is whole; a bad one is named in the log and stepped over."""
    for path in _states(folder):
        try:
            return _load(path)
        except ModelError as error:
            log.warning("checkpoint skipped reason=%r", str(error))
    return None


def _load(path: Path) -> Checkpoint:
    content = read_json(path / STATE)
    sums, progress = content["sha256"], content["progress"]
    assert isinstance(sums, dict)
    assert isinstance(progress, dict)
    for name, wanted in sums.items():
        if not (path / name).is_file() or sha256(path / name) != wanted:
            raise ModelError(path / name, "is missing or its SHA-256 is wrong", "an older state is used")
    return Checkpoint(load_tensors(path / TRAINABLE), load_tensors(path / OPTIMIZER), progress)

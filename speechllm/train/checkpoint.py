"""Saved training states: whole or absent, checked when read, the newest good one found.

A state is a folder ``step_<n>`` with ``trainable.safetensors``, ``optimizer.safetensors`` and ``state.json``, which
holds the sums of both and of itself. The folder is written under another name, synced and renamed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.errors import ModelError
from speechllm.model.state import load_tensors, save_tensors
from speechllm.runtime import hash_texts, read_json, sha256, sync_folder, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

log = logging.getLogger(__name__)

TRAINABLE = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
STATE_NAME = re.compile(r"step_\d+", re.ASCII)
BEST = "best.safetensors"
PROGRESS = "progress"  # beside the sums of the files, the record keeps one of what it says itself
OLDER = "an older state is used"


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
        progress = dict(checkpoint.progress)
        write_json(temporary / STATE, {"sha256": {**sums, PROGRESS: _sum_of(progress)}, PROGRESS: progress})
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    prune(folder, keep)
    return target


def _sum_of(progress: Mapping[str, object]) -> str:
    return hash_texts([json.dumps(progress, sort_keys=True)])


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` states, and what a kill left of one that was being written."""
    for old in [*_states(folder)[keep:], *folder.glob(".step_*.tmp")]:
        shutil.rmtree(old)


def _states(folder: Path) -> list[Path]:
    """Return the saved states, the newest first."""
    found = [path for path in folder.glob("step_*") if STATE_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def load_newest(folder: Path) -> Checkpoint | None:
    """Return the newest state that is whole, None where none was saved; a bad one is named in the log and stepped over.

    Raises:
        ModelError: states were saved, and all of them are bad: starting over in silence would lose them.
    """
    for path in _states(folder):
        try:
            return _load(path)
        except ModelError as error:
            log.warning("checkpoint skipped reason=%r", str(error))
    if _states(folder):
        raise ModelError(folder, "holds saved states, none of them whole", "remove the folder to start over")
    return None


def _load(path: Path) -> Checkpoint:
    content = read_json(path / STATE)
    sums, progress = content.get("sha256"), content.get(PROGRESS)
    if not isinstance(sums, dict) or not isinstance(progress, dict):
        raise ModelError(path / STATE, "has no sums or no progress", OLDER)
    for name, wanted in sums.items():
        if name == PROGRESS:
            right = _sum_of(progress) == wanted
        else:
            right = (path / name).is_file() and sha256(path / name) == wanted
        if not right:
            file = STATE if name == PROGRESS else name
            raise ModelError(path / file, "is missing or its SHA-256 is wrong", OLDER)
    return Checkpoint(load_tensors(path / TRAINABLE), load_tensors(path / OPTIMIZER), progress)

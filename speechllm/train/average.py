"""The mean of several states of one run: those of its best validations, or of its last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from speechllm.model.state import load_tensors, save_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    Kept = list[tuple[float, int]]
    """Score and step of each state that is kept."""

FOLDER = "averaged"


def chosen(kept: Sequence[tuple[float, int]], score: float, step: int, count: int, kind: str) -> Kept:
    """Return which states to keep once one of `step` has this `score`, the earlier before the later."""
    everything = [*((kept_score, kept_step) for kept_score, kept_step in kept), (score, step)]
    if kind == "last":
        return everything[-count:]
    return sorted(sorted(everything)[:count], key=lambda one: one[1])


def keep(exp: Path, kept: Kept, step: int, state: Mapping[str, Tensor]) -> None:
    """Write the state of `step` if it is among those `kept`, and delete the files of all others."""
    folder = exp / FOLDER
    folder.mkdir(exist_ok=True)
    wanted = {_path(exp, number) for _, number in kept}
    if _path(exp, step) in wanted:
        temporary = folder / ".state.tmp"
        save_tensors(temporary, state)
        temporary.replace(_path(exp, step))
    for path in set(folder.glob("*.safetensors")) - wanted:
        path.unlink()


def mean(exp: Path, kept: Kept) -> dict[str, Tensor]:
    """Return the mean of the kept states.

    Raises:
        ModelError: one of the files is missing or damaged.
    """
    states = [load_tensors(_path(exp, step)) for _, step in kept]
    return {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}


def _path(exp: Path, step: int) -> Path:
    return exp / FOLDER / f"step_{step:07d}.safetensors"

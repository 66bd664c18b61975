"""The record of a run: ``metrics.jsonl``, TensorBoard, and Weights & Biases where WANDB_PROJECT is set."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import resource
from typing import TYPE_CHECKING, Any, Self

import torch

from speechllm.errors import ConfigError
from speechllm.runtime import naming, read_whole_lines, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from speechllm.train.task import Sample

METRICS = "metrics.jsonl"
TIMED = ("minutes", "audio_hours_per_hour", "tokens_per_s", "memory_gib")
"""What differs between two runs that are otherwise the same to the bit."""
SHOWN_SAMPLES = 8


class Curves:
    """Writes what happens at each step; a process that is not the first writes nothing."""

    def __init__(self, folder: Path, name: str, first_step: int, *, writes: bool) -> None:
        """Go on with the record of task `name` in `folder`, whose next step is `first_step`.

        Raises:
            ConfigError: WANDB_PROJECT is set and the package wandb is not installed.
        """
        self.folder, self.name, self.writes = folder, name, writes
        self.board: Any = None
        self.wandb: Any = None
        if writes:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
            self.wandb = _wandb_run(folder, name)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write out what is buffered."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()

    def record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append to the record and to the curves."""
        if not self.writes:
            return
        # JSON has no NaN: the loss of a skipped step is null
        plain = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = json.dumps({"kind": kind, "task": self.name, "step": step, **plain})
        path = self.folder / METRICS
        with naming(path), path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        self.curve(kind, step, values)

    def curve(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Add to the curves alone."""
        if not self.writes:
            return
        named = {f"{self.name}/{kind}/{key}": value for key, value in values.items()}
        for key, value in named.items():
            self.board.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log({**named, "step": step})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Show what was heard of some utterances."""
        if not self.writes or not samples:
            return
        chosen = samples[:: max(1, len(samples) // SHOWN_SAMPLES)][:SHOWN_SAMPLES]
        rows = [f"| {_cell(one.utt_id)} | {_cell(one.ref)} | {_cell(one.hyp)} |" for one in chosen]
        self.board.add_text(
            f"{self.name}/samples", "\n".join(["| utterance | said | heard |", "|---|---|---|", *rows]), step
        )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _wandb_run(folder: Path, name: str) -> Any:
    """Return a run of Weights & Biases; None where WANDB_PROJECT, its own variable, is not set."""
    project = os.environ.get("WANDB_PROJECT")
    if not project:
        return None
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("WANDB_PROJECT", "is set, but the package wandb is missing", "run: pip install -e .[wandb]")
    import wandb

    return wandb.init(project=project, dir=str(folder), name=f"{folder.name} {name}", reinit="create_new")


def forget_after(folder: Path, step: int, *, validated: bool = True) -> None:
    """Drop what the resumed run makes again: records after `step`, and its validation where that is still to come."""
    path = folder / METRICS
    if path.is_file():
        last = (step, "valid" if validated else "train")  # "train" < "valid", as they come
        kept = [one for one in read_whole_lines(path) if (one.get("step", step), one.get("kind", "")) <= last]
        write_text(path, "".join(f"{json.dumps(one)}\n" for one in kept))


def peak_memory_gib() -> float:
    """Return the most memory that was taken so far: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    with contextlib.suppress(OSError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return math.nan

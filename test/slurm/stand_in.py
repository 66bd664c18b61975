"""Programs in the place of Slurm's, for tests without a cluster."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

QUICK = "poll_s: 0.2\n"
"""Settings for tests that wait."""


def write(path: Path, text: str) -> Path:
    """Write a file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put programs in front of Slurm's; each notes its call in the file ``calls`` and runs the file of its name.

    sbatch keeps the script that it is given; squeue knows no job.
    """
    for name in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
        lines = ["#!/bin/bash", f'printf "%s\\n" "{name} $*" >>"{folder}/calls"', f'. "{folder}/{name}"']
        program = write(folder / "bin" / name, "\n".join(lines) + "\n")
        write(folder / name, ":\n")
        program.chmod(0o755)
    write(folder / "sbatch", f'cp "$1" "{folder}/script"\necho "Submitted batch job 7"\n')
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    return folder


def calls(folder: Path) -> list[str]:
    """Return how the programs were called."""
    path = folder / "calls"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

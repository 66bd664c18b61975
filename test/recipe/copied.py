"""A copy of the tree that recipes can be run in, with this environment."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
TIME_LIMIT_S = 900  # a hang is a failure; an honest run takes about a minute


def copy_tree(folder: Path) -> Path:
    """Return `folder`, filled with the files of the project, new ones too."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=TOP, capture_output=True, check=True)
    for name in listed.stdout.decode().rstrip("\0").split("\0"):
        if (TOP / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, folder / name)
    (folder / ".venv").symlink_to(TOP / ".venv")
    setup = folder / "tools/setup.sh"  # the real one would install the copy into the environment that we share
    setup.write_text("#!/bin/sh\n", encoding="utf-8")
    return folder


def run(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of the copy to its end; what it printed is text."""
    asked = [str(part) for part in command]
    return subprocess.run(asked, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S, env=env)

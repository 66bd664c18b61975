"""Starts a training as several processes of this machine, one for each GPU, and ends as the first of them ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from speechllm.errors import EXIT_OURS
from speechllm.runtime import on_signals

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import FrameType

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_S = 0.2
GRACE_S = 60.0  # for the others once one has ended; a step and a saved state fit in it


def is_launched() -> bool:
    """Return whether a launcher (this one, torchrun, Slurm's wrapper) has started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], count: int, logs: Path) -> int:
    """Run ``speechllm ARGUMENTS`` in `count` processes and return the exit status of the run.

    The first writes to our stderr, the others to ``rank<N>.log`` in `logs`. A signal goes to all. Where one fails, the
    others are ended, and its status is that of the run.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(count):
            errors = None if rank == 0 else stack.enter_context((logs / f"rank{rank}.log").open("wb"))
            command = [sys.executable, "-m", "speechllm", *arguments]
            ranks.append(subprocess.Popen(command, env=_environment(rank, count, port), stderr=errors, stdout=errors))
        with _forwarding(ranks):
            return _wait(ranks)


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // count))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    return {"OMP_NUM_THREADS": threads, **os.environ, **{name: str(value) for name, value in place.items()}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _forwarding(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hand signals on to the processes while they run."""

    def forward(number: int, _frame: FrameType | None) -> None:
        for process in ranks:
            process.send_signal(number)

    with on_signals(FORWARDED, forward):
        yield


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Return the status of the first process that failed, 0 where none did; none is left running."""
    failed = 0
    deadline = float("inf")
    while any(process.poll() is None for process in ranks):
        time.sleep(POLL_S)
        ended = [process.returncode for process in ranks if process.returncode]
        if ended and not failed:
            failed, deadline = ended[0], time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
    failed = failed or next((process.returncode for process in ranks if process.returncode), 0)
    return failed if failed >= 0 else EXIT_OURS

"""Starts a training as several processes of this machine, one for each GPU, and ends as the first of them ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from speechllm.errors import EXIT_OURS, EXIT_STOPPED, EXIT_USER, fail
from speechllm.runtime import FIRST_PORT, NUM_PORTS, on_signals

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import FrameType

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
POLL_S = 0.2
GRACE_S = 60.0  # for the others once one has ended; a step and a saved state fit in it


def is_launched() -> bool:
    """Return whether a launcher (this one, torchrun, Slurm's wrapper) has started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], count: int, logs: Path) -> int:
    """Run ``speechllm ARGUMENTS`` in `count` processes and return the exit status of the run.

    The first writes to our stderr, the others to ``rank<N>.log`` in `logs`. A signal goes to all. Where one fails, the
    others are ended, its status is that of the run, and its last line is told where it is not the first.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(count):
            errors = None if rank == 0 else stack.enter_context(_log(logs, rank).open("wb"))
            command = [sys.executable, "-m", "speechllm", *arguments]
            ranks.append(subprocess.Popen(command, env=_environment(rank, count, port), stderr=errors, stdout=errors))
        with _forwarding(ranks):
            rank, status = _wait(ranks)
    return _told(rank, status, logs, first=ranks[0].returncode)


def _log(logs: Path, rank: int) -> Path:
    return logs / f"rank{rank}.log"


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // count))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    return {"OMP_NUM_THREADS": threads, **os.environ, **{name: str(value) for name, value in place.items()}}


def _free_port() -> int:
    """Return a port that nobody has, and that no connection takes while the processes import torch."""
    while True:
        port = FIRST_PORT + secrets.randbelow(NUM_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def _forwarding(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hand signals on to the processes while they run."""

    def forward(number: int, _frame: FrameType | None) -> None:
        for process in ranks:
            process.send_signal(number)

    with on_signals(FORWARDED, forward):
        yield


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Return which process failed and how, or (0, 0) where none did; none is left running.

    Where several have, it is that whose status says most: the others may have failed for want of it.
    """
    failed, killed = (0, 0), False
    deadline = float("inf")
    while True:
        running = None in [process.poll() for process in ranks]  # each is asked, also behind one that runs
        ended = [(rank, process.returncode) for rank, process in enumerate(ranks) if process.returncode]
        if ended:
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if not killed:  # one whose fault it was may take longer to end than the others
            failed = min(ended, key=lambda one: one[1] == EXIT_OURS, default=failed)
        if not running:
            return failed
        if time.monotonic() > deadline:
            killed = True
            for process in ranks:
                process.kill()
        time.sleep(POLL_S)


def _told(rank: int, status: int, logs: Path, first: int) -> int:
    """Return the status of the run; what ended it is told where neither the process nor the first (`first`) could."""
    if status < 0:
        name = signal.Signals(-status).name
        if status != -signal.SIGKILL:
            return fail(
                f"{logs}: process {rank} of this run died of {name}; report it, and run again to go on", EXIT_OURS
            )
        what = f"process {rank} of this run was killed, as the system does where memory is full"
        return fail(f"memory: {what}; free some, and run again: it goes on from the last saved state", EXIT_USER)
    if rank and status != EXIT_STOPPED and first not in {EXIT_USER, EXIT_STOPPED}:
        lines = _log(logs, rank).read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        said = lines[-1].removeprefix("error: ") if lines else "said nothing"
        return fail(
            said if status == EXIT_USER else f"{_log(logs, rank)}: {said}; see there, and run again to go on", status
        )
    return status

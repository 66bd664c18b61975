"""What runs inside a job: one speechllm command a task, told to save in time, its job put into the queue again then.

The command is a process of its own. Slurm's signals reach every process of a job, and most would end the workers of a
command before it has saved; the one that is sent ahead of the time limit is therefore one that processes ignore, and
this module tells the command alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from speechllm.errors import EXIT_OURS, EXIT_STOPPED
from speechllm.runtime import FIRST_PORT, NUM_PORTS, on_signals, setup_logging, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import FrameType

log = logging.getLogger(__name__)

WARNING = signal.SIGURG  # sent ahead of the time limit: a process that does not handle it is not ended by it
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, WARNING)
POLL_S = 0.5
REPEAT_S = 10.0  # a library may swallow what a signal raises; a command that is saving may well be told twice
LOOK_S = 5.0  # between two looks at how the other tasks ended
GRACE_S = 60.0  # for this task once another has failed
SLURM_TRIES, SLURM_PAUSE_S, SLURM_LIMIT_S = 3, 5.0, 60.0


@dataclass(frozen=True)
class Place:
    """Which task of which job this is."""

    job: str
    task: int = 0
    tasks: int = 1
    local: int = 0
    """Number among the tasks of its node."""
    nodes: int = 1
    first_host: str = "localhost"
    restarts: int = 0
    """How often the job was put into the queue again."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended; there is none while its job goes on, or waits in the queue again."""

    status: int
    """Exit status of the command."""
    restarts: int = 0
    signal: int = 0
    """Signal that ended the command, where one did."""
    note: str = ""
    """Why the job was not put into the queue again."""


def outcome_path(folder: Path, job: str, task: int) -> Path:
    """Return the file that a task of a job leaves its outcome in."""
    return folder / f"{job}_{task}_outcome.json"


def read_outcomes(folder: Path, job: str, tasks: int) -> dict[int, Outcome]:
    """Return task -> outcome of what has ended since the job was last put into the queue."""
    found: dict[int, Outcome] = {}
    for path in folder.glob(f"{job}_*_outcome.json"):
        # one may be replaced while it is read; it is seen at the next look
        with contextlib.suppress(OSError, ValueError, TypeError):
            task = int(path.name.split("_")[-2])
            outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
            if path == outcome_path(folder, job, task) and task < tasks:
                found[task] = outcome
    newest = max((outcome.restarts for outcome in found.values()), default=0)
    return {task: outcome for task, outcome in found.items() if outcome.restarts == newest}


def this_place() -> Place:
    """Return the place of this process, as Slurm (or submitit's local executor) says it."""
    from submitit import JobEnvironment

    here = JobEnvironment()
    return Place(
        here.job_id,
        here.global_rank,
        here.num_tasks,
        here.local_rank,
        here.num_nodes,
        here.hostnames[0],
        int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )


def rank_variables(place: Place) -> dict[str, str]:
    """Return what ``speechllm train`` reads to find the other processes: the names that torchrun uses."""
    port = FIRST_PORT + int(place.job.split("_")[0]) % NUM_PORTS  # the same in all tasks, another in another job
    return {
        "RANK": str(place.task),
        "LOCAL_RANK": str(place.local),
        "WORLD_SIZE": str(place.tasks),
        "MASTER_ADDR": "127.0.0.1" if place.nodes == 1 else place.first_host,
        "MASTER_PORT": str(port),
    }


def work(arguments: list[str], environment: dict[str, str], folder: str, requeues: int, ranks: bool) -> None:  # noqa: FBT001 - submitit hands over by position
    """Run ``speechllm ARGUMENTS`` as this task, and leave its outcome in `folder`.

    Where it was stopped and has saved, the first task puts the job into the queue again, up to `requeues` times, and no
    outcome is left. With `ranks`, the tasks of the job are the processes of one training.
    """
    setup_logging()
    logging.getLogger("submitit").propagate = False  # it has its own handlers
    place = this_place()
    outcome_path(Path(folder), place.job, place.task).unlink(missing_ok=True)  # of before the job was queued again
    variables = {**(rank_variables(place) if ranks else {}), **environment}
    outcome = _run(arguments, variables, Path(folder), place)
    if outcome.status == EXIT_STOPPED:
        if place.task or not _is_running(place):  # the first speaks for all; what Slurm ends is Slurm's to queue again
            sys.exit(0)
        why_not = _why_no_requeue(place, requeues, Path(folder))
        if not why_not:
            log.info("slurm requeued job=%s restarts=%d", place.job, place.restarts + 1)
            sys.exit(0)
        log.warning("slurm not requeued job=%s: %s", place.job, why_not)
        outcome = Outcome(EXIT_STOPPED, place.restarts, outcome.signal, why_not)
    write_json(outcome_path(Path(folder), place.job, place.task), asdict(outcome))
    if outcome.status:
        sys.exit(outcome.status)


def _run(arguments: Sequence[str], variables: Mapping[str, str], folder: Path, place: Place) -> Outcome:
    """Run the command to its end; a signal to us is handed on as SIGTERM."""
    threads = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    with _told() as told:
        command = [sys.executable, "-m", "speechllm", *arguments]
        with subprocess.Popen(command, env={"OMP_NUM_THREADS": threads, **os.environ, **variables}) as process:
            status = _wait(process, told, folder, place)
    ended_by = max(0, -status)
    # only training saves and says so; of the others a signal is the end, and what they have done is kept
    if status and (told or ended_by in STOPS):
        return Outcome(EXIT_STOPPED, place.restarts, ended_by)
    return Outcome(status if status >= 0 else EXIT_OURS, place.restarts, ended_by)


@contextlib.contextmanager
def _told() -> Iterator[list[int]]:
    """Yield a list that gets the number of each signal that asks us to stop; submitit's own handlers rest meanwhile."""
    told: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        told.append(number)

    with on_signals(STOPS, note):
        yield told


def _wait(process: subprocess.Popen[bytes], told: Sequence[int], folder: Path, place: Place) -> int:
    """Return the status of the command; it is ended where another task has failed and it does not end by itself."""
    next_told, next_look, deadline = 0.0, time.monotonic() + LOOK_S, float("inf")
    while (status := process.poll()) is None:
        if told and time.monotonic() > next_told:
            log.info("slurm stop requested signal=%d job=%s", told[0], place.job)
            process.send_signal(signal.SIGTERM)
            next_told = time.monotonic() + REPEAT_S
        if place.tasks > 1 and time.monotonic() > next_look:
            next_look = time.monotonic() + LOOK_S
            if deadline == float("inf") and _others_failed(folder, place):
                log.warning("slurm another task failed job=%s task=%d", place.job, place.task)
                deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(POLL_S)
    return status


def _others_failed(folder: Path, place: Place) -> bool:
    outcomes = read_outcomes(folder, place.job, place.tasks)
    return any(outcome.status and outcome.restarts == place.restarts for outcome in outcomes.values())


def _is_running(place: Place) -> bool:
    """Return whether the job is neither cancelled nor being ended or queued again by Slurm itself.

    scancel, preemption and the time limit send the same signal, but only a job that may still go on is RUNNING.
    """
    state, fault = _slurm("squeue", "--noheader", "--format=%T", f"--jobs={place.job}")
    if state != "RUNNING":
        log.info("slurm stopped job=%s state=%s", place.job, state or fault or "GONE")
    return state == "RUNNING"


def _why_no_requeue(place: Place, requeues: int, folder: Path) -> str:
    """Put the job into the queue again; return why that must not be or failed, empty where it worked."""
    if _others_failed(folder, place):
        return "another task failed"
    if place.restarts >= requeues:
        return f"it has been queued again {place.restarts} times already"
    return _slurm("scontrol", "requeue", place.job)[1]


def _slurm(*command: str) -> tuple[str, str]:
    """Return what a program of Slurm's prints, and why it failed after a few tries, empty where it did not."""
    fault = ""
    for attempt in range(SLURM_TRIES):
        if attempt:
            time.sleep(SLURM_PAUSE_S)
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SLURM_LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            fault = f"{command[0]} failed ({error})"
            continue
        if done.returncode == 0:
            return done.stdout.strip(), ""
        fault = f"{command[0]} failed ({done.stderr.strip()})"
    return "", fault

"""Waits for jobs: their state is what squeue says, their end what they left in their folder.

Without accounting sacct says nothing, and a job that was cancelled leaves nothing: both are looked at, and neither is
waited for without end.
"""

from __future__ import annotations

import logging
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.errors import EXIT_OURS, EXIT_STOPPED, EXIT_USER, ConfigError, Stopped
from speechllm.slurm.work import Outcome, read_outcomes

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from speechllm.slurm.settings import SlurmSettings
    from speechllm.slurm.submit import Job

log = logging.getLogger(__name__)

GRACE_S = 60.0  # a shared file system may show an outcome this late; a failed node's job is queued again meanwhile
SQUEUE_LIMIT_S = 60.0
LOG_TAIL_BYTES = 1 << 16
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
CLEAR_AT_ONCE = {"CANCELLED"}  # nothing that is still to come would say otherwise
AGAIN = "run the same command again to go on"
BLAME = (EXIT_USER, EXIT_OURS, EXIT_STOPPED)
"""Which status of several tells most: one task's fault makes the others fail in other ways."""


@dataclass(frozen=True)
class State:
    """What squeue says of a job."""

    name: str
    reason: str = ""

    @property
    def is_over(self) -> bool:
        """Return whether the job will not run any more."""
        return self.name in ENDED


@dataclass(frozen=True)
class Ending:
    """How a job ended."""

    status: int
    line: str = ""
    """What to show, as ``error:`` or ``stopped:`` goes on; empty where all is well."""
    log_file: Path | None = None


def parse_squeue(text: str, name: str) -> dict[str, State]:
    """Return job -> state of the jobs called `name`, from lines ``ID|STATE|REASON|NAME``."""
    found = {}
    for line in text.splitlines():
        parts = line.strip().split("|")
        if len(parts) == 4 and parts[3] == name:  # noqa: PLR2004 - the fields of our own format
            found[parts[0]] = State(parts[1], "" if parts[2] in ("None", "(null)") else parts[2])
    return found


def ask_squeue(jobs: Sequence[Job]) -> dict[str, State] | None:
    """Return job -> state of those that Slurm still knows; None where it does not answer."""
    numbers = ",".join(sorted({job.job.split("_")[0] for job in jobs}))
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={numbers}", "--format=%i|%T|%r|%j"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SQUEUE_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("slurm squeue failed: %s", error)
        return None
    if done.returncode and "Invalid job id" not in done.stderr:  # ours ended so long ago that they are forgotten
        log.warning("slurm squeue failed: %s", done.stderr.strip())
        return None
    return parse_squeue(done.stdout, jobs[0].name)


class Watch:
    """Looks at jobs until all are over."""

    def __init__(self, jobs: Sequence[Job], folder: Path, settings: SlurmSettings) -> None:
        """Begin to watch jobs whose outcomes and logs lie in `folder`."""
        self.jobs, self.folder, self.settings = jobs, folder, settings
        self.endings: dict[str, Ending] = {}
        self.shown: dict[str, State] = {}
        self.gone_since: dict[str, float] = {}
        self.answered = time.monotonic()

    def wait(self, stop: threading.Event) -> list[Ending]:
        """Return how each job ended.

        Raises:
            Stopped: `stop` was set; the jobs go on.
            ConfigError: squeue has not answered for long.
        """
        while not stop.is_set():
            self.look()
            if len(self.endings) == len(self.jobs):
                return [self.endings[job.job] for job in self.jobs]
            stop.wait(self.settings.poll_s)
        names = self._numbers()
        what = f"the same command waits for it again, 'scancel {names}' ends it"
        raise Stopped(f"job {names.replace(' ', ', ')} goes on without this command; {what}")

    def look(self) -> None:
        """Ask once, log what has changed, and note which jobs are over.

        Raises:
            ConfigError: squeue has not answered for long.
        """
        states = ask_squeue(self.jobs)
        now = time.monotonic()
        if states is not None:
            self.answered = now
        elif now - self.answered > self.settings.patience_s:
            what = f"squeue has not answered for {now - self.answered:.0f} s; job {self._numbers()} may go on"
            raise ConfigError("slurm", what, "run the same command again once the cluster answers")
        for job in self.jobs:
            if job.job not in self.endings:
                self._look_at(job, states)

    def _look_at(self, job: Job, states: Mapping[str, State] | None) -> None:
        now = time.monotonic()
        outcomes = read_outcomes(self.folder, job.job, job.tasks)
        state = None if states is None else states.get(job.job, State("GONE"))
        if state is not None and state != self.shown.get(job.job):
            self.shown[job.job] = state
            log.info("slurm job=%s state=%s%s", job.job, state.name, f" reason={state.reason}" if state.reason else "")
            if "held" in state.reason.lower():
                log.warning("slurm job=%s is held: 'scontrol release %s' lets it go on", job.job, job.job)
        if state is not None and not (state.is_over or state.name == "GONE"):
            self.gone_since.pop(job.job, None)
        elif state is not None:
            self.gone_since.setdefault(job.job, now)
        gone_s = now - self.gone_since.get(job.job, now)
        surely = state is not None and state.name in CLEAR_AT_ONCE
        if len(outcomes) == job.tasks or gone_s > GRACE_S or surely:
            last = self.shown.get(job.job, State("GONE"))
            self.endings[job.job] = ending(job, last.name, outcomes, self.folder)
            log.info("slurm job=%s over status=%d", job.job, self.endings[job.job].status)

    def _numbers(self) -> str:
        return " ".join(sorted({job.job.split("_")[0] for job in self.jobs}, key=int))


def ending(job: Job, state: str, outcomes: Mapping[int, Outcome], folder: Path) -> Ending:
    """Return how a job ended, from what its tasks left and, where they left nothing, from its last state."""
    bad = {task: outcome for task, outcome in outcomes.items() if outcome.status}
    if len(outcomes) == job.tasks and not bad:
        return Ending(0)
    worst = min(bad, key=lambda task: (_blame(bad[task]), task)) if bad else 0
    log_file = folder / f"{job.job}_{worst}_log.err"
    if bad:
        return _failed(job, bad[worst], log_file)
    if state in ("FAILED", "GONE", "OUT_OF_MEMORY"):
        fixes = {"OUT_OF_MEMORY": (EXIT_USER, "raise memory_gb"), "FAILED": (EXIT_OURS, f"see {log_file}")}
        status, fix = fixes.get(state, (EXIT_OURS, f"see {log_file}, then {AGAIN}"))
        return Ending(status, f"job {job.job}: ended as {state} and left no outcome{_last(log_file)}; {fix}", log_file)
    hints = {
        "TIMEOUT": "; it had not saved by then: raise warn_s or time_min",
        "COMPLETED": "; it was stopped, and could not be queued again",
    }
    line = f"job {job.job} ended as {state}{hints.get(state, '')}; {AGAIN}"
    return Ending(EXIT_STOPPED, line, log_file)


def _blame(outcome: Outcome) -> int:
    return BLAME.index(outcome.status) if outcome.status in BLAME else BLAME.index(EXIT_OURS)


def _failed(job: Job, outcome: Outcome, log_file: Path) -> Ending:
    """Return the ending of a job whose most telling task failed or stopped."""
    if outcome.status == EXIT_STOPPED:
        return Ending(EXIT_STOPPED, f"job {job.job} was not queued again ({outcome.note}); {AGAIN}", log_file)
    given = [line for line in _tail(log_file) if line.startswith("error: ")]
    if given:
        return Ending(outcome.status, given[-1].removeprefix("error: "), log_file)
    how = f"was ended by signal {outcome.signal}" if outcome.signal else f"ended with status {outcome.status}"
    fix = "raise memory_gb if it ran out of memory" if outcome.signal else "mend that and run again"
    return Ending(outcome.status, f"job {job.job}: {how}{_last(log_file)}; see {log_file}, {fix}", log_file)


def _last(log_file: Path) -> str:
    lines = [line for line in _tail(log_file) if line.strip()]
    return f" ({' '.join(lines[-1].split())[:300]})" if lines else ""


def _tail(path: Path) -> list[str]:
    """Return the last lines of a log, which may be large or not be there."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            return stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []

"""Runs a command of stages 2 to 4 as Slurm jobs: hands it over, waits, puts the parts together."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechllm.errors import EXIT_STOPPED, ConfigError, DataError, Stopped
from speechllm.folders import DECODE_RECORD, only_writer
from speechllm.runtime import on_signals, read_json, write_json
from speechllm.slurm.settings import load
from speechllm.slurm.submit import Job, check_slurm, own_folder, submit
from speechllm.slurm.watch import Watch, ask_squeue

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import FrameType

    from speechllm.slurm.settings import SlurmSettings
    from speechllm.slurm.watch import Ending

log = logging.getLogger(__name__)

KINDS = ("dump", "train", "decode", "baseline")
RECORD = "jobs.json"
MARKS = {"dump": "dump.json", "decode": DECODE_RECORD, "baseline": DECODE_RECORD}
"""In a folder that is whole, the file that says so."""


@dataclass(frozen=True)
class Order:
    """A command that is to run as jobs."""

    kind: str
    arguments: tuple[str, ...]
    """The command line behind ``speechllm``."""
    out: Path
    """The folder that it writes."""

    @property
    def folder(self) -> Path:
        """Return the folder of its logs and orders."""
        return self.out / "slurm" / self.kind


def check_kind(kind: str) -> None:
    """Refuse a command that does not run as a job.

    Raises:
        ConfigError: it is none of `KINDS`.
    """
    if kind not in KINDS:
        raise ConfigError(f"speechllm slurm: {kind}", "does not run as a job", f"choose one of {', '.join(KINDS)}")


def order(arguments: Sequence[str], options: Mapping[str, Any]) -> Order:
    """Return the order of a command line whose `options` are already read.

    Raises:
        ConfigError: it names a part.
    """
    kind = arguments[0]
    if options.get("part") is not None:
        raise ConfigError("speechllm slurm: --part", "the jobs share out the parts themselves", "leave it out")
    return Order(kind, tuple(arguments), Path(options["exp" if kind == "train" else "out"]))


def run(what: Order, conf: Path) -> int:
    """Run a command as jobs and return its exit status; the fault of a job is one line on stderr.

    A finished folder is looked at here, and no job is handed over; jobs of the same command that are still in the queue
    are waited for. Where several jobs made parts, this process becomes the command that puts them together.

    Raises:
        UserError: the settings are at fault, or Slurm.
        Stopped: the jobs were stopped before they were done, or this command was; the jobs then go on.
    """
    settings = load(conf)
    if _is_whole(what):
        _become(what)
    check_slurm()
    own_folder(what.folder)
    with only_writer(what.folder), _stop_event() as stop:
        jobs = _still_queued(what) or _hand_over(what, settings, conf)
        endings = Watch(jobs, what.folder, settings).wait(stop)
    failed = [one for one in endings if one.status]
    if failed:
        return _report(failed)
    if len(jobs) > 1:
        _become(what)
    return 0


def _is_whole(what: Order) -> bool:
    """Return whether the command has nothing left to do but to compare; of training only its own machine can tell."""
    mark = what.out / MARKS[what.kind] if what.kind in MARKS else None
    return mark is not None and mark.is_file() and read_json(mark).get("complete") is True


def _become(what: Order) -> None:
    """Let this process be the plain command."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "speechllm", *what.arguments])  # noqa: S606 - no shell is wanted


def _hand_over(what: Order, settings: SlurmSettings, conf: Path) -> list[Job]:
    jobs = submit(what.kind, what.arguments, settings, what.folder, conf)
    content = {"command": list(what.arguments), "folder": str(Path.cwd()), "jobs": [asdict(job) for job in jobs]}
    write_json(what.folder / RECORD, content)
    for job in jobs:
        log.info("slurm submitted %s job=%s tasks=%d logs=%s", what.kind, job.job, job.tasks, what.folder)
    return jobs


def _still_queued(what: Order) -> list[Job]:
    """Return the jobs of an earlier call for the same command, if one of them is not over.

    Raises:
        DataError: jobs of another command write to the same folder.
    """
    path = what.folder / RECORD
    content: dict[str, Any] = read_json(path) if path.is_file() else {"jobs": []}
    jobs = [Job(**job) for job in content["jobs"]]
    states = (ask_squeue(jobs) if jobs else None) or {}
    alive = [job for job in jobs if job.job in states and not states[job.job].is_over]
    if not alive:
        return []
    if content["command"] != list(what.arguments) or content["folder"] != str(Path.cwd()):
        was = " ".join(content["command"])
        raise DataError(what.folder, f"job {alive[0].job} is at work here on '{was}'", "wait for it, or scancel it")
    for job in alive:
        log.info("slurm waiting again job=%s logs=%s", job.job, what.folder)
    return jobs


@contextlib.contextmanager
def _stop_event() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set."""
    event = threading.Event()

    def request(_number: int, _frame: FrameType | None) -> None:
        event.set()

    with on_signals((signal.SIGINT, signal.SIGTERM), request):
        yield event


def _report(failed: Sequence[Ending]) -> int:
    """Print the line of the job that tells most, and return its status.

    Raises:
        Stopped: none failed, but some were stopped.
    """
    worst = min(failed, key=lambda one: (one.status == EXIT_STOPPED, -one.status))
    for one in failed:
        log.info("slurm failed status=%d log=%s", one.status, one.log_file)
    if worst.status == EXIT_STOPPED:
        raise Stopped(worst.line)
    sys.stderr.write(f"error: {worst.line}\n")
    return worst.status

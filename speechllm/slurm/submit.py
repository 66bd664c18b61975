"""Hands commands over to Slurm, through submitit."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from speechllm.errors import ConfigError, DataError
from speechllm.runtime import hash_texts
from speechllm.slurm.settings import PartsSettings, TrainSettings
from speechllm.slurm.work import WARNING, work

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from submitit.core.core import PicklingExecutor

    from speechllm.slurm.settings import SlurmSettings

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")  # say where Slurm is, not which job this is
BASELINE_REQUEUES = 3  # most begin anew each time, so that a time limit which is too short would never be seen
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Job:
    """A job, or one of an array."""

    job: str
    """Number; of one of an array NUMBER_INDEX."""
    tasks: int
    name: str
    """Name in the queue: with it a number that was given out again is no longer ours."""


def job_name(kind: str, folder: Path) -> str:
    """Return the name of the jobs of a stage, another for each folder."""
    return f"speechllm-{kind}-{hash_texts([str(folder.resolve())])[:8]}"


def commands(kind: str, arguments: Sequence[str], settings: SlurmSettings) -> list[list[str]]:
    """Return the command line of each job."""
    if kind not in ("dump", "decode"):
        return [[*arguments]]
    stage = settings.dump if kind == "dump" else settings.decode
    # the number of processes belongs to the machine that the job gets
    more = ["--nj", str(stage.cpus)] if kind == "dump" else []
    if stage.parts == 1:
        return [[*arguments, *more]]
    return [[*arguments, *more, "--part", f"{number}/{stage.parts}"] for number in range(1, stage.parts + 1)]


def parameters(kind: str, settings: SlurmSettings, name: str) -> dict[str, Any]:
    """Return what submitit is to ask sbatch for."""
    stage = {"dump": settings.dump, "train": settings.train}.get(kind, settings.decode)
    nodes, processes = (stage.nodes, stage.processes_per_node) if isinstance(stage, TrainSettings) else (1, 1)
    options = {**settings.options, **stage.options}
    asked: dict[str, Any] = {
        "job_name": name,
        "partition": stage.partition or settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "time": stage.time_min,
        "nodes": nodes,
        "ntasks_per_node": processes,
        "cpus_per_task": stage.cpus,
        "gpus_per_node": stage.gpus or None,
        "mem": f"{round(1024 * stage.memory_gb)}M" if stage.memory_gb else None,
        "array_parallelism": stage.parts if isinstance(stage, PartsSettings) else 1,
        # a line that fails ends the job; without lines of the user's there is nothing to fail
        "setup": ["set -eo pipefail", *settings.setup] if settings.setup else None,
        # srun takes the cores from nowhere else since Slurm 22.05. One task's end does not end the others at once:
        # what is left to save is saved first (see work)
        "srun_args": [f"--cpus-per-task={stage.cpus}", "--kill-on-bad-exit=0", "--wait=0"],
        "additional_parameters": {
            "requeue": True,
            "signal": f"{WARNING.name.removeprefix('SIG')}@{settings.warn_s}",
            **{key: value for key, value in options.items() if value is not False},
        },
    }
    return {"wckey": None, **{key: value for key, value in asked.items() if value is not None}}


def check_slurm() -> None:
    """Refuse to go on where Slurm or submitit is missing.

    Raises:
        ConfigError: one of them is.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        what = f"there is no {missing[0]} on this machine"
        raise ConfigError("slurm", what, "run on a machine of the cluster, or with --launcher local")
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise ConfigError("slurm", "submitit is not installed", "pip install -e .[slurm]") from error


def own_folder(folder: Path) -> None:
    """Make the folder of logs and orders, which nobody else may write: the jobs run what lies there.

    Raises:
        DataError: it belongs to somebody else.
        ConfigError: its name means something else to Slurm.
    """
    if any(sign in str(folder.resolve()) for sign in "%\n\r\\"):
        raise ConfigError(folder, "has a name that Slurm would fill in (%) or cut", "rename it")
    folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise DataError(folder, "belongs to another user", "remove it or choose another folder")
    folder.chmod(0o700)


def submit(kind: str, arguments: Sequence[str], settings: SlurmSettings, folder: Path, conf: Path) -> list[Job]:
    """Hand over the jobs of a stage, whose logs and outcomes go to `folder`; several are one array.

    Raises:
        ConfigError: Slurm refuses them; its reason is named.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder.resolve())
    name = job_name(kind, folder)
    try:
        executor.update_parameters(**parameters(kind, settings, name))
        with _outside_of_jobs():
            return hand_over(executor, kind, commands(kind, arguments, settings), settings, folder)
    except (FailedJobError, FailedSubmissionError) as error:
        reason = str(error).strip().splitlines() or ["no reason given"]
        raise ConfigError(conf, f"sbatch refuses the job ({reason[-1]})", "mend what it names") from error


def hand_over(
    executor: PicklingExecutor, kind: str, lines: Sequence[list[str]], settings: SlurmSettings, folder: Path
) -> list[Job]:
    """Hand command lines over to one of submitit's executors."""
    requeues = min(settings.requeues, BASELINE_REQUEUES) if kind == "baseline" else settings.requeues
    fixed = (dict(settings.environment), str(folder.resolve()), requeues, kind == "train")
    jobs = executor.map_array(work, lines, *([value] * len(lines) for value in fixed))
    return [Job(job.job_id, job.num_tasks, job_name(kind, folder)) for job in jobs]


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Take out what says which job this process is in, so that a job can hand over another."""
    hidden = [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_")) and name not in KEPT]
    kept = {name: os.environ.pop(name) for name in [*hidden, *RANK_VARIABLES] if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)

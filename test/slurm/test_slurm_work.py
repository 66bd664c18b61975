"""What runs inside a job: a command, told to save in time, and its job queued again."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
import submitit
from stand_in import calls, install, write

from speechllm.slurm.settings import SlurmSettings
from speechllm.slurm.submit import hand_over
from speechllm.slurm.watch import ending
from speechllm.slurm.work import Outcome, Place, outcome_path, rank_variables, read_outcomes, this_place, work

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install(tmp_path / "cluster", monkeypatch)


def test_a_rank_knows_the_others_by_the_names_of_torchrun() -> None:
    place = Place("4711", task=5, tasks=8, local=1, nodes=2, first_host="node07")
    assert rank_variables(place) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": "14711",
    }
    assert rank_variables(Place("4711", tasks=8))["MASTER_ADDR"] == "127.0.0.1"
    ports = [int(rank_variables(Place(job))["MASTER_PORT"]) for job in ("1", "19999", "20000", "87654321", "12_3")]
    assert all(1024 < port < 32768 for port in ports)


def test_the_place_is_what_slurm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "12",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[07-08]",
        "SLURM_RESTART_COUNT": "3",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert this_place() == Place("12", task=5, tasks=8, local=1, nodes=2, first_host="node07", restarts=3)


@pytest.fixture
def program(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return what makes this process task 0 of a running job, whose command is a script of bash."""
    write(cluster / "squeue", "echo RUNNING\n")
    for name, value in {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "12", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("speechllm.slurm.work.POLL_S", 0.02)
    monkeypatch.setattr("speechllm.slurm.work.SLURM_PAUSE_S", 0.0)

    def install(body: str) -> Path:
        script = write(tmp_path / "program", f"#!/bin/bash\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setattr("speechllm.slurm.work.sys.executable", str(script))
        (tmp_path / "logs").mkdir(exist_ok=True)
        return tmp_path / "logs"

    return install


def _work(logs: Path, requeues: int = 5, *, ranks: bool = False, environment: dict[str, str] | None = None) -> int:
    """Return the exit status of a task."""
    try:
        work(["train", "--x y"], environment or {}, str(logs), requeues, ranks)
    except SystemExit as ended:
        return int(str(ended.code))
    return 0


def _outcome(logs: Path) -> Outcome:
    return read_outcomes(logs, "12", 1)[0]


def _signal_soon(number: signal.Signals, ready: Path) -> None:
    def send() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


TELLS = 'trap "exit 75" TERM; touch "$0.ready"; for _ in {1..500}; do sleep 0.02; done'


def test_a_task_runs_its_command_and_leaves_its_status(program: Callable[[str], Path], tmp_path: Path) -> None:
    logs = program(f'printf "%s\\n" "$@" "$RANK" "$WORLD_SIZE" "$NAMED" >"{tmp_path}/seen"')
    outcome_path(logs, "12", 0).write_text('{"status": 2, "restarts": 0}', encoding="utf-8")
    assert _work(logs, ranks=True, environment={"NAMED": "$(reboot)"}) == 0
    seen = (tmp_path / "seen").read_text(encoding="utf-8").split("\n")
    assert seen == ["-m", "speechllm", "train", "--x y", "0", "1", "$(reboot)", ""]
    assert _outcome(logs) == Outcome(0)


@pytest.mark.parametrize(("body", "status", "number"), [("exit 2", 2, 0), ("exit 1", 1, 0), ("kill -KILL $$", 1, 9)])
def test_a_failing_command_is_final(
    program: Callable[[str], Path], cluster: Path, body: str, status: int, number: int
) -> None:
    logs = program(body)
    assert _work(logs) == status
    assert _outcome(logs) == Outcome(status, signal=number)
    assert calls(cluster) == []


@pytest.mark.parametrize("number", [signal.SIGURG, signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_lets_the_command_save_and_the_job_is_queued_again(
    program: Callable[[str], Path], cluster: Path, tmp_path: Path, number: signal.Signals
) -> None:
    logs = program(TELLS)
    _signal_soon(number, tmp_path / "program.ready")
    assert _work(logs) == 0
    assert read_outcomes(logs, "12", 1) == {}
    assert calls(cluster)[-1] == "scontrol requeue 12"


def test_a_command_that_misses_the_first_signal_is_told_again(
    program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speechllm.slurm.work.REPEAT_S", 0.2)
    logs = program(TELLS.replace("exit 75", "((n++ == 2)) && exit 75"))
    _signal_soon(signal.SIGURG, tmp_path / "program.ready")
    assert _work(logs) == 0
    assert read_outcomes(logs, "12", 1) == {}


def test_a_command_that_saves_nothing_goes_on_later_too(
    program: Callable[[str], Path], cluster: Path, tmp_path: Path
) -> None:
    logs = program(TELLS.replace('trap "exit 75" TERM; ', ""))
    _signal_soon(signal.SIGURG, tmp_path / "program.ready")
    assert _work(logs) == 0
    assert "scontrol requeue 12" in calls(cluster)


@pytest.mark.parametrize(
    ("scontrol", "restarts", "note"),
    [
        ("echo no >&2; exit 1", "0", "scontrol failed (no)"),
        (":", "5", "it has been queued again 5 times already"),
    ],
)
def test_what_must_not_or_cannot_be_queued_again_ends_with_75(
    program: Callable[[str], Path],
    cluster: Path,
    monkeypatch: pytest.MonkeyPatch,
    scontrol: str,
    restarts: str,
    note: str,
) -> None:
    write(cluster / "scontrol", scontrol + "\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    logs = program("exit 75")
    assert _work(logs) == 75
    assert _outcome(logs) == Outcome(75, int(restarts), note=note)


@pytest.mark.parametrize("squeue", ["echo COMPLETING", "echo", "echo slow >&2; exit 1"])
def test_what_slurm_is_ending_already_is_left_to_it(program: Callable[[str], Path], cluster: Path, squeue: str) -> None:
    write(cluster / "squeue", squeue + "\n")
    logs = program("exit 75")
    assert _work(logs) == 0
    assert list(logs.iterdir()) == []
    assert not [call for call in calls(cluster) if call.startswith("scontrol")]


def test_only_the_first_task_queues_the_job_again(
    program: Callable[[str], Path], cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    logs = program("exit 75")
    assert _work(logs) == 0
    assert list(logs.iterdir()) == []
    assert calls(cluster) == []


def test_a_task_does_not_outlive_one_that_failed_and_its_job_is_not_queued_again(
    program: Callable[[str], Path], cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setattr("speechllm.slurm.work.LOOK_S", 0.05)
    monkeypatch.setattr("speechllm.slurm.work.GRACE_S", 0.1)
    logs = program("sleep 60 & wait")
    write(outcome_path(logs, "12", 1), '{"status": 2, "restarts": 0}')
    assert _work(logs) == 1
    assert read_outcomes(logs, "12", 2) == {0: Outcome(1, signal=9), 1: Outcome(2)}
    program("exit 75")
    assert _work(logs) == 75
    assert read_outcomes(logs, "12", 2)[0].note == "another task failed"
    assert not [call for call in calls(cluster) if call.startswith("scontrol")]


def test_outcomes_of_before_the_job_was_queued_again_do_not_count(tmp_path: Path) -> None:
    write(outcome_path(tmp_path, "12", 0), '{"status": 0, "restarts": 2}')
    write(outcome_path(tmp_path, "12", 1), '{"status": 2, "restarts": 1}')
    write(outcome_path(tmp_path, "12", 2), '{"status": 0, "rest')
    write(outcome_path(tmp_path, "123", 1), '{"status": 0, "restarts": 2}')
    assert read_outcomes(tmp_path, "12", 3) == {0: Outcome(0, 2)}


def test_the_tasks_of_a_job_of_submitit_run_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = tmp_path / "logs"
    executor = submitit.LocalExecutor(logs)
    executor.update_parameters(tasks_per_node=2, timeout_min=1)
    started: list[submitit.Job[None]] = []

    def keep(function: Callable[..., None], *given: list[object]) -> list[submitit.Job[None]]:
        started.extend(submitit.LocalExecutor.map_array(executor, function, *given))
        return started

    monkeypatch.setattr(executor, "map_array", keep)
    jobs = hand_over(executor, "train", [["validate", str(tmp_path / "nowhere")]], SlurmSettings(), logs)
    started[0].wait()
    outcomes = read_outcomes(logs, jobs[0].job, 2)
    assert outcomes == {0: Outcome(2), 1: Outcome(2)}
    ended = ending(jobs[0], "FAILED", outcomes, logs)
    assert (ended.status, ended.log_file) == (2, logs / f"{jobs[0].job}_0_log.err")
    assert ended.line.startswith(f"{tmp_path}/nowhere: no such data directory; ")
    assert "submitit" in (logs / f"{jobs[0].job}_1_log.out").read_text(encoding="utf-8")

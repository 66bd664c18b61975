"""How a job ended, from what squeue says and what its tasks left."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import pytest
from stand_in import QUICK, install, write

from speechllm.errors import ConfigError
from speechllm.slurm.settings import load
from speechllm.slurm.submit import Job
from speechllm.slurm.watch import Ending, State, Watch, ending, parse_squeue
from speechllm.slurm.work import Outcome, outcome_path

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install(tmp_path / "cluster", monkeypatch)


JOB = Job("12", 1, "speechllm-train-0")
PAIR = Job("12", 2, "speechllm-train-0")


def test_lines_of_squeue_are_read_and_other_jobs_passed_over() -> None:
    text = "12|RUNNING|None|mine\n13_0|PENDING|Priority|mine\n13_1|COMPLETED|(null)|mine\n14|RUNNING|None|no\n\nodd\n"
    assert parse_squeue(text, "mine") == {
        "12": State("RUNNING"),
        "13_0": State("PENDING", "Priority"),
        "13_1": State("COMPLETED"),
    }


@pytest.mark.parametrize(
    ("outcomes", "state", "log", "status", "line"),
    [
        ({0: Outcome(0)}, "COMPLETED", "", 0, ""),
        ({0: Outcome(2)}, "FAILED", "x\nerror: a: b; c\nsrun: y\n", 2, "a: b; c"),
        (
            {0: Outcome(1)},
            "FAILED",
            "Traceback\nValueError: z\n",
            1,
            "job 12: ended with status 1 (ValueError: z); ",
        ),
        ({0: Outcome(1, signal=9)}, "FAILED", "", 1, "job 12: was ended by signal 9; see "),
        ({0: Outcome(75, note="it is gone")}, "COMPLETED", "", 75, "job 12 was not queued again (it is gone); run"),
        ({}, "CANCELLED", "", 75, "job 12 ended as CANCELLED; run the same command again to go on"),
        ({}, "TIMEOUT", "", 75, "job 12 ended as TIMEOUT; it had not saved by then: raise warn_s or time_min; run"),
        ({}, "COMPLETED", "", 75, "job 12 ended as COMPLETED; it was stopped, and could not be queued again; run the"),
        ({}, "NODE_FAIL", "", 75, "job 12 ended as NODE_FAIL; run the same command"),
        ({}, "OUT_OF_MEMORY", "", 2, "job 12: ended as OUT_OF_MEMORY and left no outcome; raise memory_gb"),
        ({}, "FAILED", "module: no cuda\n", 1, "job 12: ended as FAILED and left no outcome (module: no cuda); see "),
        ({}, "GONE", "", 1, "job 12: ended as GONE and left no outcome; see "),
    ],
)
def test_each_ending_has_its_status_and_its_line(
    tmp_path: Path, outcomes: dict[int, Outcome], state: str, log: str, status: int, line: str
) -> None:
    write(tmp_path / "12_0_log.err", log)
    ended = ending(JOB, state, outcomes, tmp_path)
    assert ended.status == status
    assert ended.line.startswith(line)
    assert bool(ended.line) == bool(line)


def test_of_several_tasks_the_users_fault_tells_most(tmp_path: Path) -> None:
    write(tmp_path / "12_0_log.err", "RuntimeError: connection closed\n")
    write(tmp_path / "12_1_log.err", "error: u7: is too long; cut it\n")
    ended = ending(PAIR, "FAILED", {0: Outcome(1), 1: Outcome(2)}, tmp_path)
    assert ended == Ending(2, "u7: is too long; cut it", tmp_path / "12_1_log.err")


def _watch(tmp_path: Path, text: str = QUICK) -> Watch:
    (tmp_path / "logs").mkdir(exist_ok=True)
    return Watch([JOB], tmp_path / "logs", load(write(tmp_path / "slurm.yaml", text)))


def test_a_cancelled_job_is_over_at_once_and_without_accounting(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speechllm.slurm.watch.GRACE_S", math.inf)  # for which it does not wait
    write(cluster / "squeue", f"echo '12|CANCELLED|None|{JOB.name}'\n")
    endings = _watch(tmp_path).wait(threading.Event())
    assert [one.status for one in endings] == [75]


def test_a_forgotten_job_is_over_after_a_while(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speechllm.slurm.watch.GRACE_S", 0.5)
    write(cluster / "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    assert [one.status for one in _watch(tmp_path).wait(threading.Event())] == [1]


def test_an_outcome_ends_the_waiting_whatever_the_queue_says(cluster: Path, tmp_path: Path) -> None:
    write(cluster / "squeue", "exit 1\n")
    looking = _watch(tmp_path)
    write(outcome_path(tmp_path / "logs", "12", 0), '{"status": 0, "restarts": 0}')
    assert looking.wait(threading.Event()) == [Ending(0)]


def test_a_queue_that_does_not_answer_is_given_up(cluster: Path, tmp_path: Path) -> None:
    write(cluster / "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(ConfigError, match=r"slurm: squeue has not answered for \d+ s; job 12 may go on; run the same"):
        _watch(tmp_path, QUICK + "patience_s: 1\n").wait(threading.Event())


def test_a_job_that_is_queued_again_is_waited_for(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("speechllm.slurm.watch.GRACE_S", 0.2)
    states = ["RUNNING|None", "NODE_FAIL|None", "PENDING|BeginTime", "RUNNING|None", "COMPLETED|None"]
    write(cluster / "states", "".join(f"12|{state}|{JOB.name}\n" for state in states))
    write(cluster / "squeue", f'head -n 1 "{cluster}/states"; sed -i 1d "{cluster}/states"\n')
    looking = _watch(tmp_path)
    with caplog.at_level("INFO", logger="speechllm"):
        for _ in states:
            looking.look()
            assert not looking.endings
    shown = [record.getMessage() for record in caplog.records]
    assert shown == [
        "slurm job=12 state=RUNNING",
        "slurm job=12 state=NODE_FAIL",
        "slurm job=12 state=PENDING reason=BeginTime",
        "slurm job=12 state=RUNNING",
        "slurm job=12 state=COMPLETED",
    ]

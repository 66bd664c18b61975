"""``speechllm slurm``: one status and one line, whatever became of the jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import QUICK, calls, install, write

from speechllm import cli
from speechllm.slurm.run import Order
from speechllm.slurm.run import run as run_order
from speechllm.slurm.submit import job_name
from speechllm.slurm.work import outcome_path

TOP = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install(tmp_path / "cluster", monkeypatch)


def _sent(cluster: Path) -> int:
    return sum(line.startswith("sbatch ") for line in calls(cluster))


@pytest.fixture
def order(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a command line of training; sbatch ends the job at once, with status $ENDS and an error line."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "slurm.yaml", QUICK)
    logs = tmp_path / "exp/slurm/train"
    write(
        cluster / "sbatch",
        f'echo "error: conf: is wrong; mend it" >"{logs}/7_0_log.err"\n'
        f'echo "{{\\"status\\": $ENDS}}" >"{logs}/7_0_outcome.json"; echo "Submitted batch job 7"\n',
    )
    return ["slurm", "--", "train", "--conf", "c.yaml", "--train", "a", "--valid", "b", "--exp", "exp"]


@pytest.mark.parametrize(("ends", "out", "err"), [("0", "exp\n", ""), ("2", "", "error: conf: is wrong; mend it\n")])
def test_the_status_of_the_job_is_that_of_the_command(
    order: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ends: str, out: str, err: str
) -> None:
    monkeypatch.setenv("ENDS", ends)
    assert cli.run(order) == int(ends)
    assert capsys.readouterr() == (out, err)


def test_wrong_options_are_seen_before_a_job_is_sent(
    order: list[str], cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, message in [
        ([*order, "--lr", "1"], "speechllm slurm: No such option: --lr; see --help"),
        (
            [*order[:2], "score"],
            "speechllm slurm: score: does not run as a job; choose one of dump, train",
        ),
        (
            [*order[:2], "decode", "--exp", "e", "--data", "d", "--out", "o", "--part", "1/2"],
            "speechllm slurm: --part: the jobs share out the parts themselves; leave it out",
        ),
        (["slurm", "--conf", "none.yaml", *order[1:]], "none.yaml: no such file; copy egs/TEMPLATE/asr1/slurm.yaml"),
    ]:
        assert cli.run(given) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert calls(cluster) == []


def test_what_is_missing_is_named(
    order: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        assert cli.run(order) == 2
    assert capsys.readouterr().err == "error: slurm: submitit is not installed; pip install -e .[slurm]\n"
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.run(order) == 2
    assert capsys.readouterr().err == (
        "error: slurm: there is no sbatch on this machine; run on a machine of the cluster, or with --launcher local\n"
    )


def test_jobs_that_are_still_queued_are_waited_for_and_not_sent_twice(
    order: list[str], cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = job_name("train", tmp_path / "exp/slurm/train")
    write(cluster / "sbatch", 'echo "Submitted batch job 7"\n')
    looked = f"echo '7|RUNNING|None|{name}'\n"
    write(cluster / "squeue", f"kill -TERM {os.getpid()}\n{looked}")
    assert cli.run(order) == 75
    write(cluster / "squeue", looked)
    assert capsys.readouterr().err == (
        "stopped: job 7 goes on without this command; the same command waits for it again, 'scancel 7' ends it\n"
    )
    with_other_options = [*order, "--ngpu", "2"]
    assert cli.run(with_other_options) == 2
    assert "job 7 is at work here on 'train --conf c.yaml" in capsys.readouterr().err
    write(outcome_path(tmp_path / "exp/slurm/train", "7", 0), '{"status": 0, "restarts": 0}')
    assert cli.run(order) == 0
    assert _sent(cluster) == 1
    write(cluster / "squeue", "echo '7|RUNNING|None|of-somebody-else'\n")
    monkeypatch.setenv("ENDS", "0")
    write(
        cluster / "sbatch", f'echo "{{\\"status\\": 0}}" >{tmp_path}/exp/slurm/train/8_0_outcome.json; echo "job 8"\n'
    )
    assert cli.run(order) == 0
    assert _sent(cluster) == 2


class Became(Exception):  # noqa: N818 - this process would be another program by then
    """The process became another."""


def test_parts_are_put_together_by_the_plain_command_and_a_whole_folder_sends_no_job(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def became(_path: str, command: list[str]) -> None:
        raise Became(" ".join(command[1:]))

    monkeypatch.setattr("speechllm.slurm.run.os.execv", became)
    monkeypatch.chdir(tmp_path)
    conf = write(tmp_path / "slurm.yaml", QUICK + "dump: {parts: 2}\n")
    logs = tmp_path / "out/slurm/dump"
    ends = "".join(f'echo "{{\\"status\\": 0}}" >{logs}/7_{part}_0_outcome.json\n' for part in (0, 1))
    write(cluster / "sbatch", ends + 'echo "Submitted batch job 7"\n')
    what = Order("dump", ("dump", "--out", "out"), tmp_path / "out")
    with pytest.raises(Became, match=r"^-m speechllm dump --out out$"):
        run_order(what, conf)
    assert _sent(cluster) == 1
    write(tmp_path / "out/dump.json", json.dumps({"complete": True, "record": {}}))
    with pytest.raises(Became):
        run_order(what, conf)
    assert _sent(cluster) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["cloud"], "no launcher cloud; use local or slurm"),
        (["slurm", "--ngpu", "2"], "--ngpu goes with --launcher local; set gpus of train in slurm.yaml"),
    ],
)
def test_launchers_that_the_recipe_does_not_know_are_refused(options: list[str], message: str) -> None:
    command = [str(TOP / "run.sh"), "--launcher", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (2, f"error: run.sh: {message}\n")


def test_scoring_and_the_command_line_load_neither_torch_nor_submitit() -> None:
    code = "import sys, speechllm.cli, speechllm.slurm.run; sys.exit(bool({'torch', 'submitit'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0

"""The real run.sh on a real Slurm; `tools/slurm_once.sh` starts one on this machine and runs this file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import copied
import pytest
from copied import TIME_LIMIT_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.recipe,
    pytest.mark.skipif("SLURM_CONF" not in os.environ, reason="needs a Slurm: tools/slurm_once.sh --install"),
]

CLUSTER = """
poll_s: 0.5
warn_s: 30
dump: {cpus: 1, time_min: 15, parts: 2}
train: {cpus: 1, time_min: 15}
decode: {cpus: 1, time_min: 15, parts: 2}
"""
LONG = """
extends: debug.yaml
train: {epochs: 150, accumulate: 2, batch_tokens: 100, validate_every: 300, save_every: 300}
"""
TRAINED = "model/trained.safetensors"
SCORES = "decode_greedy/debug_train/score.json"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which conf/debug was run once without Slurm; its dump and experiment are put aside."""
    copy = copied.copy_tree(tmp_path_factory.mktemp("clone"))
    recipe = copy / "egs/jsut/asr1"
    (recipe / "slurm.yaml").write_text(CLUSTER, encoding="utf-8")
    (recipe / "conf/long.yaml").write_text(LONG, encoding="utf-8")
    done = copied.run(copy / "run.sh", "--conf", "debug")
    assert done.returncode == 0, done.stderr
    done = _train(copy, "long_local", launcher="local")
    assert done.returncode == 0, done.stderr
    (recipe / "exp/debug").rename(recipe / "exp/debug_local")
    shutil.copytree(recipe / "dump", recipe / "dump_local")
    return copy


@pytest.fixture
def recipe(tree: Path) -> Path:
    """The recipe's folder in the copy."""
    return tree / "egs/jsut/asr1"


def _options(exp: str, launcher: str = "slurm") -> list[str]:
    sets = ["--sets", "debug_train,debug_train,debug_train", "--exp", exp]
    return ["--conf", "long", "--stage", "3", "--stop-stage", "3", "--launcher", launcher, *sets]


def _train(tree: Path, exp: str, launcher: str = "slurm") -> subprocess.CompletedProcess[str]:
    return copied.run(tree / "run.sh", *_options(exp, launcher))


def _start(tree: Path, exp: str) -> subprocess.Popen[str]:
    return subprocess.Popen([str(tree / "run.sh"), *_options(exp)], stderr=subprocess.PIPE, text=True)


def _until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIME_LIMIT_S
    while not found():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def _steps(exp: Path) -> int:
    metrics = exp / "metrics.jsonl"
    return metrics.read_text(encoding="utf-8").count("\n") if metrics.is_file() else 0


def _job(exp: Path) -> str:
    jobs = json.loads((exp / "slurm/train/jobs.json").read_text(encoding="utf-8"))["jobs"]
    assert len(jobs) == 1
    return str(jobs[0]["job"])


def _slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _only_error(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert "Traceback" not in stderr
    return errors[0]


def test_the_recipe_as_jobs_ends_in_the_files_of_one_without(tree: Path, recipe: Path) -> None:
    shutil.rmtree(recipe / "dump")
    done = copied.run(tree / "run.sh", "--conf", "debug", "--launcher", "slurm")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" slurm submitted ") == 5  # an array of two, one, an array of two
    local, jobs = recipe / "exp/debug_local", recipe / "exp/debug"
    for name in (TRAINED, "decode_greedy/debug_train/text"):
        assert (jobs / name).read_bytes() == (local / name).read_bytes()
    scores = [json.loads((exp / SCORES).read_text(encoding="utf-8"))["metrics"] for exp in (local, jobs)]
    assert scores[0] == scores[1]
    feats = "encoder/debug_train/feats.scp"
    assert (recipe / "dump" / feats).read_text(encoding="utf-8") == (recipe / "dump_local" / feats).read_text(
        encoding="utf-8"
    )
    assert not (jobs / "decode_greedy/debug_train/.parts").exists()
    assert oct((jobs / "slurm/train").stat().st_mode & 0o777) == "0o700"
    again = copied.run(tree / "run.sh", "--conf", "debug", "--launcher", "slurm", "--stage", "2", "--stop-stage", "2")
    assert again.returncode == 0, again.stderr
    assert " slurm submitted " not in again.stderr


def test_two_tasks_train_as_one_process_does(tree: Path, recipe: Path) -> None:
    two = CLUSTER.replace("train: {", "train: {processes: 2, ")
    (recipe / "slurm.yaml").write_text(two, encoding="utf-8")
    try:
        done = _train(tree, "two")
    finally:
        (recipe / "slurm.yaml").write_text(CLUSTER, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    made = json.loads((recipe / "exp/two/model/provenance.json").read_text(encoding="utf-8"))
    assert made["processes"] == 2
    assert _losses(recipe / "exp/two") == pytest.approx(_losses(recipe / "exp/long_local"), rel=1e-3)
    logs = recipe / "exp/two/slurm/train"
    assert (logs / f"{_job(recipe / 'exp/two')}_1_log.err").is_file()


def _losses(exp: Path) -> list[float]:
    lines = (exp / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines if json.loads(line)["kind"] == "train"]


@pytest.mark.parametrize("command", ["scancel --signal=USR1", "scancel --signal=URG", "scontrol requeue"])
def test_a_job_that_is_told_to_stop_is_queued_again_and_ends_in_the_same_bits(
    tree: Path, recipe: Path, command: str
) -> None:
    exp = recipe / f"exp/told_{command.rsplit(maxsplit=1)[-1].removeprefix('--signal=')}"
    with _start(tree, exp.name) as process:
        _until(lambda: _steps(exp) > 20 or process.poll() is not None)
        _slurm(*command.split(), _job(exp))
        _, stderr = process.communicate(timeout=TIME_LIMIT_S)
    assert process.returncode == 0, stderr
    assert stderr.count("state=RUNNING") == 2
    log = (exp / f"slurm/train/{_job(exp)}_0_log.err").read_text(encoding="utf-8")
    assert (f"slurm requeued job={_job(exp)} restarts=1" in log) == command.startswith("scancel")
    assert "speech resumed step=" in log
    assert (exp / TRAINED).read_bytes() == (recipe / "exp/long_local" / TRAINED).read_bytes()
    assert _losses(exp) == _losses(recipe / "exp/long_local")


def test_a_job_that_was_cancelled_is_noticed_and_stays_cancelled(tree: Path, recipe: Path) -> None:
    exp = recipe / "exp/cancelled"
    with _start(tree, exp.name) as process:
        _until(lambda: _steps(exp) > 20 or process.poll() is not None)
        _slurm("scancel", _job(exp))
        _, stderr = process.communicate(timeout=TIME_LIMIT_S)
    assert process.returncode == 75, stderr
    assert "ended as CANCELLED; run the same command again to go on" in stderr
    _until(lambda: not _slurm("squeue", "--noheader"))
    assert not (exp / "model").exists()
    done = _train(tree, exp.name)
    assert done.returncode == 0, done.stderr
    assert (exp / TRAINED).read_bytes() == (recipe / "exp/long_local" / TRAINED).read_bytes()


def test_a_waiting_command_that_is_stopped_leaves_the_job_and_waits_for_it_again(tree: Path, recipe: Path) -> None:
    exp = recipe / "exp/left"
    with _start(tree, exp.name) as process:
        _until(lambda: _steps(exp) > 5 or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=TIME_LIMIT_S)
    job = _job(exp)
    assert process.returncode == 75, stderr
    assert f"job {job} goes on without this command" in stderr
    assert _slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip() == "RUNNING"
    done = _train(tree, exp.name)
    assert done.returncode == 0, done.stderr
    assert f"slurm waiting again job={job}" in done.stderr
    assert " slurm submitted " not in done.stderr
    assert (exp / TRAINED).read_bytes() == (recipe / "exp/long_local" / TRAINED).read_bytes()


def test_a_failing_job_gives_its_line_and_its_status(tree: Path, recipe: Path) -> None:
    shutil.copytree(recipe / "data/debug_train", recipe / "data/broken")
    text = recipe / "data/broken/text"
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    text.write_text("".join(lines[1:]), encoding="utf-8")
    options = ["--conf", "debug", "--stage", "2", "--sets", "broken,broken,broken", "--exp", "broken"]
    done = copied.run(tree / "run.sh", *options, "--launcher", "slurm")
    assert done.returncode == 2, done.stderr
    assert f"{lines[0].split()[0]} has audio but no transcript" in _only_error(done.stderr)
    assert "_log.err" in done.stderr
    assert not (recipe / "dump/encoder/broken/feats.scp").exists()


def test_what_slurm_refuses_is_one_line(tree: Path, recipe: Path) -> None:
    (recipe / "slurm.yaml").write_text(CLUSTER + "partition: nowhere\n", encoding="utf-8")
    try:
        done = _train(tree, "refused")
    finally:
        (recipe / "slurm.yaml").write_text(CLUSTER, encoding="utf-8")
    assert done.returncode == 2, done.stderr
    assert "sbatch refuses the job (sbatch: error: Batch job submission failed: Invalid partition" in _only_error(
        done.stderr
    )

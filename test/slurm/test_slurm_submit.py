"""What Slurm is asked for; small programs stand in for its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from stand_in import install, write

from speechllm.errors import ConfigError, DataError
from speechllm.slurm.settings import SlurmSettings
from speechllm.slurm.submit import Job, commands, job_name, own_folder, parameters, submit


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install(tmp_path / "cluster", monkeypatch)


def test_a_stage_that_is_shared_out_is_one_command_a_part() -> None:
    settings = SlurmSettings.model_validate({"dump": {"parts": 2, "cpus": 3}, "decode": {"parts": 2}})
    assert commands("dump", ["dump", "--nj", "64"], settings) == [
        ["dump", "--nj", "64", "--nj", "3", "--part", "1/2"],
        ["dump", "--nj", "64", "--nj", "3", "--part", "2/2"],
    ]
    assert commands("decode", ["decode"], settings) == [["decode", "--part", "1/2"], ["decode", "--part", "2/2"]]
    alone = SlurmSettings.model_validate({})
    for kind in ("train", "decode", "baseline"):
        assert commands(kind, [kind, "-x"], alone) == [[kind, "-x"]]


def _script(cluster: Path, kind: str, settings: dict[str, object], folder: Path) -> tuple[list[Job], list[str]]:
    jobs = submit(kind, [kind], SlurmSettings.model_validate(settings), folder, Path("slurm.yaml"))
    return jobs, (cluster / "script").read_text(encoding="utf-8").splitlines()


def test_training_asks_for_its_nodes_and_gpus(cluster: Path, tmp_path: Path) -> None:
    settings = {
        "partition": "gpu",
        "account": "lab-7",
        "warn_s": 90,
        "setup": ["module load cuda"],
        "options": {"exclusive": True, "mail-type": "NONE", "comment": "a b"},
        "train": {
            "nodes": 2,
            "gpus": 4,
            "cpus": 6,
            "memory_gb": 1.5,
            "time_min": 90,
            "options": {"mail-type": "FAIL", "exclusive": False},
        },
    }
    jobs, lines = _script(cluster, "train", settings, tmp_path / "logs")
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--partition=gpu", "--account=lab-7", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"} <= asked
    assert {"--cpus-per-task=6", "--mem=1536M", "--time=90", "--requeue", "--signal=URG@90"} <= asked
    assert {"--mail-type=FAIL", "--comment='a b'", "--open-mode=append"} <= asked
    assert not [line for line in asked if line.startswith(("--exclusive", "--wckey", "--array", "--qos"))]
    assert lines.index("set -eo pipefail") + 1 == lines.index("module load cuda")
    srun = lines[-1]
    assert lines.index("module load cuda") < lines.index(srun)
    for part in (
        "--cpus-per-task=6",
        "--kill-on-bad-exit=0",
        f"{tmp_path}/logs/%j_%t_log.err",
        "submitit.core._submit",
    ):
        assert part in srun
    assert jobs == [Job("7", 8, job_name("train", tmp_path / "logs"))]


def test_parts_are_an_array_of_jobs_with_one_task(cluster: Path, tmp_path: Path) -> None:
    jobs, lines = _script(cluster, "decode", {"decode": {"parts": 3, "partition": "cpu"}}, tmp_path / "logs")
    assert "#SBATCH --array=0-2%3" in lines
    assert "#SBATCH --partition=cpu" in lines
    assert [(job.job, job.tasks) for job in jobs] == [("7_0", 1), ("7_1", 1), ("7_2", 1)]
    assert len(list((tmp_path / "logs").glob("7_?_submitted.pkl"))) == 3


def test_what_sbatch_says_is_handed_on(cluster: Path, tmp_path: Path) -> None:
    write(cluster / "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1\n")
    with pytest.raises(ConfigError, match=r"slurm.yaml: sbatch refuses the job \(sbatch: error: invalid partition\)"):
        _script(cluster, "train", {}, tmp_path / "logs")


def test_a_job_hands_over_another_without_its_own_variables(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(cluster / "sbatch", f'env >"{cluster}/env"; echo "Submitted batch job 7"\n')
    inside = {
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "9",
        "SLURM_CONF": "/where",
        "WORLD_SIZE": "9",
        "SUBMITIT_EXECUTOR": "x",
    }
    for name, value in inside.items():
        monkeypatch.setenv(name, value)
    submit("train", ["train"], SlurmSettings.model_validate({}), tmp_path / "logs", Path("slurm.yaml"))
    seen = {line.split("=", 1)[0] for line in (cluster / "env").read_text(encoding="utf-8").splitlines()}
    assert seen & inside.keys() == {"SLURM_CONF"}
    assert os.environ["SLURM_JOB_ID"] == "1"


def test_false_options_are_left_out_and_the_stage_overrides() -> None:
    settings = SlurmSettings.model_validate({"options": {"exclusive": True}, "dump": {"options": {"exclusive": False}}})
    assert "exclusive" not in parameters("dump", settings, "x")["additional_parameters"]
    assert parameters("baseline", settings, "x")["additional_parameters"]["exclusive"] is True


def test_the_folder_of_orders_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir(mode=0o777)
    own_folder(tmp_path / "logs")
    assert oct((tmp_path / "logs").stat().st_mode & 0o777) == "0o700"
    with pytest.raises(ConfigError, match="has a name that Slurm would fill in"):
        own_folder(tmp_path / "100%j")
    monkeypatch.setattr("speechllm.slurm.submit.os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(DataError, match="belongs to another user; remove it"):
        own_folder(tmp_path / "logs")

"""Two processes train what one does: the same losses, the same bits, whatever falls to each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tiny
from safetensors.torch import load_file
from scenes import children, wait_until_filled

from speechllm.config import load as configs

if TYPE_CHECKING:
    from collections.abc import Callable

TIME_LIMIT_S = 300
TRIES = 4
BATCHES = 3  # an epoch: steps of two batches and of one
LENGTHS = {f"u{number}": 6_000 + 1_700 * number for number in range(7)}


@dataclass(frozen=True)
class Setting:
    """A configuration and its data, in a folder of their own."""

    folder: Path
    conf: Path
    data: Path

    def command(self, exp: str, *options: str) -> list[str]:
        arguments = ["train", "--conf", self.conf, "--train", self.data, "--valid", self.data]
        return [sys.executable, "-m", "speechllm", *map(str, arguments), "--exp", str(self.folder / exp), *options]

    def train(self, exp: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(exp, *options),
            capture_output=True,
            text=True,
            check=False,
            timeout=TIME_LIMIT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def losses(self, exp: str) -> list[object]:
        lines = (self.folder / exp / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [[record["step"], record["loss"]] for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("ranks")
    settings = {
        "epochs": 8,
        "batch_tokens": 40,
        "accumulate": 2,
        "packing": True,
        "peak_lr": 1e-2,
        "lora_lr": 1e-2,
        "validate_every": 3,
        "save_every": 1,
    }
    lora = {"rank": 4, "alpha": 8, "dropout": 0.2}
    config = tiny.config(tiny.wavlm(folder / "encoder"), tiny.llama(folder / "lm"), train=settings, lora=lora)
    configs.dump(config, folder / "conf.yaml")
    return Setting(folder, folder / "conf.yaml", tiny.data_folder(folder / "sounds", LENGTHS))


@pytest.fixture(scope="module")
def alone(setting: Setting) -> Setting:
    done = setting.train("one")
    assert done.returncode == 0, done.stderr
    assert f"batches={BATCHES}" in done.stderr
    return setting


def assert_same(setting: Setting, exp: str) -> None:
    assert setting.losses(exp) == setting.losses("one")
    wanted = load_file(setting.folder / "one/model/trained.safetensors")
    found = load_file(setting.folder / exp / "model/trained.safetensors")
    assert all((value == found[name]).all() for name, value in wanted.items())


def test_35_two_processes_whose_shares_differ_end_in_the_bits_of_one(alone: Setting) -> None:
    done = alone.train("two", "--ngpu", "2")
    assert done.returncode == 0, done.stderr
    assert_same(alone, "two")
    provenance = json.loads((alone.folder / "two/model/provenance.json").read_text(encoding="utf-8"))
    assert provenance["processes"] == 2


def test_27_a_run_of_two_that_was_stopped_goes_on_as_one(alone: Setting) -> None:
    exp, status, stderr = struck(alone, "both", lambda pid: os.kill(pid, signal.SIGTERM))
    assert status == 75, stderr
    assert not (alone.folder / exp / "model").exists()
    assert alone.train(exp).returncode == 0
    assert_same(alone, exp)


def struck(setting: Setting, name: str, strike: Callable[[int], None]) -> tuple[str, int, str]:
    """Return the folder, exit status and words of a run of two that met `strike` after a step of its training."""
    for number in range(TRIES):  # this test may be so late that all is done
        exp = f"{name}{number}"
        with subprocess.Popen(setting.command(exp, "--ngpu", "2"), stderr=subprocess.PIPE, text=True) as process:
            wait_until_filled(setting.folder / exp / "metrics.jsonl", process)
            with contextlib.suppress(ProcessLookupError, IndexError):
                strike(process.pid)
            _, stderr = process.communicate(timeout=TIME_LIMIT_S)
        if process.returncode:
            break
    return exp, process.returncode, stderr


def test_27_a_run_of_two_one_of_which_is_killed_tells_it_and_goes_on_to_the_same(alone: Setting) -> None:
    exp, status, stderr = struck(alone, "bereft", lambda pid: os.kill(children(pid)[1], signal.SIGKILL))
    assert status == 2, stderr
    what = "process 1 of this run was killed, as the system does where memory is full"
    line = f"error: memory: {what}; free some, and run again: it goes on from the last saved state"
    gone = f"error: {alone.folder / exp}: another process of this run has ended; mend it and run again"
    assert [one for one in stderr.splitlines() if " INFO " not in one] == [gone, line]
    assert alone.train(exp, "--ngpu", "2").returncode == 0
    assert_same(alone, exp)


def test_two_processes_that_share_the_language_models_weights_end_in_the_bits_of_one(alone: Setting) -> None:
    done = alone.train("shared", "--ngpu", "2", "--set", "train.shard=true")
    assert done.returncode == 0, done.stderr
    assert_same(alone, "shared")


def test_torchrun_starts_the_processes_as_well(alone: Setting) -> None:
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    arguments = alone.command("torchrun")[1:]
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert_same(alone, "torchrun")


def test_more_processes_than_batches_a_step_are_refused_in_one_line(setting: Setting) -> None:
    refused = setting.train("three", "--ngpu", "3")
    assert refused.returncode == 2
    wanted = "error: train.accumulate: is 2, too few batches a step for 3 processes; raise it, or use fewer processes"
    assert refused.stderr.strip().splitlines() == [wanted]

"""Signals at any moment: the same command goes on, and ends in the bits of a run that nothing disturbed.

Moments of kill -9 are drawn by chance over the whole life of a run. Those of `CALLS` are counted in function calls once
the models are loaded, so they fall anywhere in Python: the CTC head's loop, steps, validation and decoding. Those of
`FILES` are counted in operations on the files of the run, so they fall into the writing of states, of the best
parameters and of the model folder. Those of `CLOCK` are struck from outside after a while, within loading too.
SIGTERM and SIGUSR1, which ask for a stop, come in every part of a run, and at moments drawn by chance too.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import faulty
import pytest
from faulty import Ended, Setting, Trap

from speechllm.errors import EXIT_STOPPED

if TYPE_CHECKING:
    from pathlib import Path

SEED = int(os.environ.get("SPEECHLLM_KILL_SEED", "20"))
DRAWN = random.Random(SEED)  # noqa: S311 - moments, no secrets
CALLS = sorted(DRAWN.random() for _ in range(9))
FILES = sorted(DRAWN.random() for _ in range(7))
CLOCK = sorted(DRAWN.random() for _ in range(4))
CHAIN = [DRAWN.uniform(0.1, 0.4) for _ in range(6)]
LOADING, TRAINING = r"/exp/\.lock$", r"/\.dropped\.tsv"
STOPS = [(LOADING, DRAWN.random()), (LOADING, DRAWN.random()), *((TRAINING, DRAWN.random()) for _ in range(4))]

LENGTHS = {f"u{number}": 8_000 + 1_500 * number for number in range(7)}
TRAIN = {
    "epochs": 5,
    "batch_tokens": 40,
    "packing": True,
    "accumulate": 2,
    "peak_lr": 3e-2,
    "lora_lr": 3e-2,
    "adapter_from": 0.3,
    "validate_every": 3,
    "valid_utts": 3,
    "save_every": 2,
    "average": 2,
    "augment": {"speeds": [0.9, 1.0, 1.1], "time_masks": 1, "noise": 0.1},
}
FIELDS = {
    "projector": {"kind": "ctc", "hidden": 8, "epochs": 2, "batch_frames": 80, "dropout": 0.2},
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.2},
    "train": TRAIN,
    "decode": {"tokens_per_s": 2, "extra_tokens": 6},
}
STOPPED = re.compile(r"stopped: (ctc|speech) saved at step (\d+) of (\d+); run again to go on")
CALLS_LINE = re.compile(r"^calls (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed, and how long it was in calls, in file operations and in seconds."""

    setting: Setting
    exp: Path
    calls: int
    """Once the models are loaded."""
    files: int
    seconds: float

    def steps(self, folder: str) -> int:
        """Return the number of steps of one of the two loops."""
        lines = (self.exp / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return max(int(json.loads(line)["step"]) for line in lines)

    def assert_goes_on_to_the_same(self, exp: Path, note: str) -> None:
        """Run the killed command again, and compare all that it left."""
        done = self.setting.run(exp)
        assert done.status == 0, f"{note}: {done.output}"
        faulty.assert_same(exp, self.exp, note)


def counted(setting: Setting, exp: Path, trap: Trap) -> int:
    """Return how often the moment of a trap that never snaps came in a whole run."""
    done = setting.run(exp, trap=trap)
    assert done.status == 0, done.output
    found = CALLS_LINE.search(done.output)
    assert found
    return int(found[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return a run by the real command in a process of its own, measured by two others."""
    folder = tmp_path_factory.mktemp("kills")
    setting = faulty.make(folder, LENGTHS, **FIELDS)
    command = [sys.executable, "-m", "speechllm", *setting.arguments(folder / "whole")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=faulty.TIME_LIMIT_S)
    assert done.returncode == 0, done.stderr
    calls = counted(setting, folder / "calls", Trap(0, after=TRAINING, nth=0))
    began = time.monotonic()
    files = counted(setting, folder / "files", Trap(0, file="/files/", nth=0))
    whole = Whole(setting, folder / "whole", calls, files, time.monotonic() - began)
    for name in ("calls", "files"):
        faulty.assert_same(folder / name, whole.exp, name)
    return whole


def assert_killed(ended: Ended, note: str) -> None:
    assert ended.status == -signal.SIGKILL, f"{note}: {ended.output}"


def nth_call(whole: Whole, part: float) -> int:
    return 1 + int(0.97 * part * whole.calls)  # a few calls come and go between runs


@pytest.mark.parametrize("part", CALLS, ids="{:.3f}".format)
def test_26_killed_in_a_function(whole: Whole, tmp_path: Path, part: float) -> None:
    nth = nth_call(whole, part)
    note = f"seed {SEED}, killed at call {nth} of {whole.calls}"
    trap = Trap(signal.SIGKILL, after=TRAINING, nth=nth)
    assert_killed(whole.setting.run(tmp_path / "exp", trap=trap), note)
    whole.assert_goes_on_to_the_same(tmp_path / "exp", note)


@pytest.mark.parametrize("part", FILES, ids="{:.3f}".format)
def test_26_killed_at_a_file(whole: Whole, tmp_path: Path, part: float) -> None:
    nth = 1 + int(part * whole.files)
    note = f"seed {SEED}, killed at file operation {nth} of {whole.files}"
    trap = Trap(signal.SIGKILL, file="/exp/", nth=nth)
    assert_killed(whole.setting.run(tmp_path / "exp", trap=trap), note)
    whole.assert_goes_on_to_the_same(tmp_path / "exp", note)


@pytest.mark.parametrize("part", CLOCK, ids="{:.3f}".format)
def test_26_killed_by_the_clock(whole: Whole, tmp_path: Path, part: float) -> None:
    note = f"seed {SEED}, killed after {part * whole.seconds:.3f} s of {whole.seconds:.3f}"
    running = whole.setting.start(tmp_path / "exp")
    running.process.join(part * whole.seconds)
    running.strike(signal.SIGKILL)
    ended = running.wait()
    assert ended.status in {0, -signal.SIGKILL}, f"{note}: {ended.output}"  # a machine that idles now may be done
    whole.assert_goes_on_to_the_same(tmp_path / "exp", note)


def test_26_killed_again_and_again(whole: Whole, tmp_path: Path) -> None:
    """Each command that goes on is killed too, some of them before they saved anything."""
    calls = [nth_call(whole, part) for part in CHAIN]
    note = f"seed {SEED}, killed at calls {calls} of {whole.calls} in turn"
    for nth in calls:
        ended = whole.setting.run(tmp_path / "exp", trap=Trap(signal.SIGKILL, after=TRAINING, nth=nth))
        assert ended.status in {0, -signal.SIGKILL}, f"{note}: {ended.output}"  # less is left each time
    whole.assert_goes_on_to_the_same(tmp_path / "exp", note)


WRITES = {
    "state-is-begun": (r"/checkpoints/\.step_0000004[^/]*$", 1),
    "state-is-written": (r"/checkpoints/\.step_0000004[^/]*/", 3),
    "state-takes-its-name": (r"/checkpoints/step_0000004$", 1),
    "state-is-saved-and-an-older-one-goes": (r"/checkpoints/step_0000002", 2),
    "best-takes-its-name": (r"exp/best\.safetensors$", 1),
    "head-is-done": (r"/ctc/\.minutes", 1),
    "model-takes-its-name": (r"/model/trained\.safetensors$", 1),
    "model-is-finished": (r"/model/\.model\.json", 1),
    "older-states-go-at-the-end": (r"/model/model\.json$", 1),
}


@pytest.mark.parametrize(("file", "nth"), WRITES.values(), ids=WRITES)
def test_29_killed_while_writing(whole: Whole, tmp_path: Path, file: str, nth: int) -> None:
    trap = Trap(signal.SIGKILL, file=file, nth=nth)
    assert_killed(whole.setting.run(tmp_path / "exp", trap=trap), file)
    whole.assert_goes_on_to_the_same(tmp_path / "exp", file)
    assert not faulty.leftovers(tmp_path / "exp")


# Signals that ask for a stop

BACKWARD = r"torch/_tensor\.py:backward"
HEAD_IS_DONE = r"/ctc/\.minutes"
NO_STEP = {
    "while-the-data-are-read": Trap(0, call=r"speechllm/train/sets\.py:open_sets"),
    "while-the-models-are-loaded": Trap(0, call=r"speechllm/model/lm\.py:load_lm"),
    "once-the-models-are-loaded": Trap(0, file=r"/\.dropped\.tsv"),
    "between-head-and-steps": Trap(0, file=HEAD_IS_DONE),
}
WITHIN = {
    "head": Trap(0, call=BACKWARD, nth=3),
    "head's-validation": Trap(0, call=r"speechllm/model/ctc\.py:best_kana", nth=2),
    "warm-up": Trap(0, after=HEAD_IS_DONE, call=BACKWARD, nth=2),
    "step": Trap(0, after=HEAD_IS_DONE, call=BACKWARD, nth=9),
    "validation": Trap(0, after=HEAD_IS_DONE, call=r"speechllm/decode/search\.py:", nth=5),
    "saving": Trap(0, file=r"exp/checkpoints/\.step_0000002[^/]*/", nth=3),
    "best": Trap(0, file=r"exp/best\.safetensors$"),
}
AT_THE_END = {
    "before-the-model": Trap(0, file=r"exp/model/\.provenance\.json"),
    "after-the-model": Trap(0, file=r"exp/model/\.model\.json"),
}
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def assert_stopped(ended: Ended, *, may_be_done: bool = False) -> None:
    """Check that a run ended as one that was asked to, with one line that says so."""
    if may_be_done and ended.status == 0:
        return
    assert ended.status == EXIT_STOPPED, ended.output
    assert len(ended.errors) == 1, ended.output
    assert ended.errors[0].startswith("stopped: "), ended.output


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("trap", NO_STEP.values(), ids=NO_STEP)
def test_28_a_signal_where_there_is_no_step_to_save(
    whole: Whole, tmp_path: Path, trap: Trap, number: signal.Signals
) -> None:
    ended = whole.setting.run(tmp_path / "exp", trap=replace(trap, number=number))
    assert_stopped(ended)
    assert ended.errors == ["stopped: not in a training step; run again to go on"]
    if number == signal.SIGTERM:
        whole.assert_goes_on_to_the_same(tmp_path / "exp", number.name)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("trap", WITHIN.values(), ids=WITHIN)
def test_28_a_signal_saves_the_step_that_it_came_in(
    whole: Whole, tmp_path: Path, trap: Trap, number: signal.Signals
) -> None:
    exp = tmp_path / "exp"
    ended = whole.setting.run(exp, trap=replace(trap, number=number))
    assert_stopped(ended)
    told = STOPPED.fullmatch(ended.errors[0])
    assert told, ended.errors
    folder = "ctc" if told[1] == "ctc" else ""
    newest = faulty.states(exp / folder)[-1]
    assert newest.name == f"step_{int(told[2]):07d}"
    assert int(told[3]) == whole.steps(folder)
    faulty.assert_whole(newest)
    if number == signal.SIGTERM:  # what the other saves is whole, and of the same step
        whole.assert_goes_on_to_the_same(exp, number.name)


def test_28_a_signal_in_the_heads_last_step_stops_the_run_all_the_same(whole: Whole, tmp_path: Path) -> None:
    """The head's loop is over then, but hours of the other are to come."""
    trap = Trap(signal.SIGTERM, call=BACKWARD, nth=whole.steps("ctc"))
    assert_stopped(whole.setting.run(tmp_path / "exp", trap=trap))
    assert not (tmp_path / "exp/model").exists()
    whole.assert_goes_on_to_the_same(tmp_path / "exp", "last step of the head")


@pytest.mark.parametrize("trap", AT_THE_END.values(), ids=AT_THE_END)
def test_28_a_signal_at_the_end_stops_the_run_or_lets_it_end(whole: Whole, tmp_path: Path, trap: Trap) -> None:
    ended = whole.setting.run(tmp_path / "exp", trap=replace(trap, number=signal.SIGTERM))
    assert_stopped(ended, may_be_done=True)
    whole.assert_goes_on_to_the_same(tmp_path / "exp", "end")


def test_28_a_kill_behind_a_signal_behind_a_validation(whole: Whole, tmp_path: Path) -> None:
    """What a signal broke off is done first by the next run, which here does not live to save it."""
    exp = tmp_path / "exp"
    assert_stopped(whole.setting.run(exp, trap=replace(WITHIN["validation"], number=signal.SIGTERM)))
    ended = whole.setting.run(exp, trap=Trap(signal.SIGKILL, after=r"exp/best\.safetensors$", call=BACKWARD))
    assert_killed(ended, "after the validation")
    whole.assert_goes_on_to_the_same(exp, "killed after a validation that had been broken off")


@pytest.mark.parametrize(("after", "part"), STOPS, ids=lambda one: f"{one:.3f}" if isinstance(one, float) else "")
def test_28_a_signal_at_any_moment(whole: Whole, tmp_path: Path, after: str, part: float) -> None:
    nth = nth_call(whole, part)
    assert_stopped(
        whole.setting.run(tmp_path / "exp", trap=Trap(signal.SIGTERM, after=after, nth=nth)), may_be_done=True
    )
    whole.assert_goes_on_to_the_same(tmp_path / "exp", f"seed {SEED}, SIGTERM at call {nth} after {after}")

"""What comes of too little memory: before the first step of a training, in a later one, and in other commands.

The bound is a real one (RLIMIT_AS), set from outside while the process is held. The language model is wide inside, so
that a position takes half a megabyte of it and little else matters.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import faulty
import pytest
import scenes
import soundfile
import tiny
from faulty import Setting, Trap
from scenes import assert_refused
from test_train_faults import FIELDS, TRAIN, Whole, run_whole
from transformers import LlamaConfig, LlamaForCausalLM

from speechllm.config import load as configs
from speechllm.errors import EXIT_USER

if TYPE_CHECKING:
    from collections.abc import Callable

    from faulty import Ended, Running

MIB = 1 << 20
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h
LOADED = Trap(signal.SIGSTOP, call=r"speechllm/train/trainer\.py:__init__")
STEP_4 = Trap(signal.SIGSTOP, file=r"/checkpoints/\.step_0000004")
STANDS = "free some, or choose a smaller batch or model, and run again: what was there before still stands"
LATER = (
    r"there is no more in step \d+ of speech \(.+\); "
    "free some or set train.checkpointing to true, and run again: it goes on from the last saved state"
)


def giving_back(arguments: list[str], log: Path, trap: Trap | None) -> None:
    """Run the command line with blocks given back once they are free, so that what is free lies in one piece."""
    give_back()
    faulty.child(arguments, log, trap)


def giving_back_in_small_shards(arguments: list[str], log: Path, trap: Trap | None) -> None:
    give_back()
    scenes.small_shards(arguments, log, trap)


def give_back() -> None:
    malloc = ctypes.CDLL(None).mallopt
    assert malloc(M_MMAP_THRESHOLD, MIB) == malloc(M_ARENA_MAX, 1) == 1


def with_memory(mib: int, running: Running) -> Ended:
    """Return how a process ended that may take so much more than it has at the moment at which it is held."""
    running.wait_until_held()
    assert running.process.pid
    limit(running.process.pid, mib)
    running.strike(signal.SIGCONT)
    return running.wait()


def limit(pid: int, mib: int, while_: Callable[[], bool] = lambda: False) -> None:
    """Bound a process to `mib` more than the least that it has as long as something holds."""
    pages = taken(pid)
    while while_():
        pages = min(pages, taken(pid))
        time.sleep(0.002)
    bound = pages * resource.getpagesize() + mib * MIB
    resource.prlimit(pid, resource.RLIMIT_AS, (bound, bound))


def taken(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[0])


def has_two_lines(path: Path, process: subprocess.Popen[str]) -> bool:
    return process.poll() is not None or path.read_bytes().count(b"\n") > 1


def wide(folder: Path, utterances: int, **train: object) -> Setting:
    lengths = {f"u{number:02}": 8_000 for number in range(utterances)}
    setting = faulty.make(folder, lengths, **{**FIELDS, "train": {**TRAIN, **train}})
    sizes = {**tiny.LM_SIZES, "num_key_value_heads": 1, "intermediate_size": 20_000}
    tiny._save_lm(LlamaForCausalLM, LlamaConfig, sizes, setting.folder / "lm")
    return setting


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return a run of six steps whose batches take some 200 MB each."""
    return run_whole(wide(tmp_path_factory.mktemp("wide"), 60, epochs=3, batch_tokens=400))


def test_34_a_batch_that_does_not_fit_is_told_before_the_first_step_and_with_it_one_that_does(tmp_path: Path) -> None:
    setting, exp = wide(tmp_path, 60, epochs=1, batch_tokens=10_000), tmp_path / "exp"
    ended = with_memory(350, setting.start(exp, trap=LOADED, work=giving_back))
    what = r"is 10000, and a batch of \d+ positions does not fit the memory"
    fix = r"set it to (\d+), which does, or train\.checkpointing to true, or take a larger card"
    assert_refused(ended, rf"error: train\.batch_tokens: {what}; {fix}")
    fitting = re.search(r"set it to (\d+)", ended.errors[0])
    assert fitting
    assert 0 < int(fitting[1]) < 10_000
    assert not (exp / "metrics.jsonl").exists()
    options = ("--set", f"train.batch_tokens={fitting[1]}")
    done = with_memory(350, setting.start(exp, *options, trap=LOADED, work=giving_back))
    assert done.status == 0, done.output


@pytest.mark.parametrize("change", [(), ("--set", "train.checkpointing=true")], ids=["as-it-was", "taking-less"])
def test_34_memory_that_is_gone_in_a_later_step_is_told_and_costs_nothing(
    whole: Whole, tmp_path: Path, change: tuple[str, ...]
) -> None:
    exp = tmp_path / "exp"
    ended = with_memory(60, whole.setting.start(exp, trap=STEP_4, work=giving_back))
    assert_refused(ended, rf"error: memory: {LATER}")
    assert [state.name for state in faulty.states(exp)] == ["step_0000002", "step_0000004"]
    for state in faulty.states(exp):
        faulty.assert_whole(state)
    assert not faulty.leftovers(exp / "checkpoints")
    done = whole.setting.run(exp, *change)
    assert done.status == 0, done.output
    assert "speech resumed step=4 of=6" in done.output
    names = [name for name in faulty.contents(whole.exp) if not (change and name.endswith("config.yaml"))]
    faulty.assert_same(exp, whole.exp, exp.name, names)


def test_34_memory_that_only_the_second_of_two_processes_lacks_is_told_too(tmp_path: Path) -> None:
    setting, exp = wide(tmp_path, 60, epochs=4, batch_tokens=400, accumulate=2), tmp_path / "exp"
    command = [sys.executable, "-m", "speechllm", *setting.arguments(exp, "--ngpu", "2")]
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(MIB), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **malloc}) as process:
        scenes.wait_until_filled(exp / "metrics.jsonl", process)
        limit(scenes.children(process.pid)[1], 30, while_=lambda: not has_two_lines(exp / "metrics.jsonl", process))
        _, stderr = process.communicate(timeout=faulty.TIME_LIMIT_S)
    ended = faulty.Ended(process.returncode, stderr)
    assert ended.status == EXIT_USER, stderr
    gone, told = ended.errors
    assert gone == f"error: {exp}: another process of this run has ended; mend it and run again"
    assert re.fullmatch(rf"error: memory: {LATER}", told)
    done = setting.run(exp)
    assert done.status == 0, done.output


def test_34_sounds_too_long_for_the_encoder_are_told_and_what_was_made_stays(tmp_path: Path) -> None:
    conf, out = tmp_path / "conf.yaml", tmp_path / "out"
    configs.dump(tiny.config(tiny.wavlm(tmp_path / "encoder"), tiny.llama(tmp_path / "lm")), conf)
    data = scenes.corpus(tmp_path / "corpus").data
    for utt_id in scenes.IDS[2:]:
        soundfile.write(data.parent / f"wav/{utt_id}.wav", scenes.sound(1, 60 * 16_000), 16_000)
    arguments = scenes.dump_arguments(conf, data, out)
    trap = Trap(signal.SIGSTOP, file=r"/\.tmp\.0000\.")
    ended = with_memory(60, faulty.start(arguments, tmp_path / "log", trap, giving_back_in_small_shards))
    assert_refused(ended, rf"error: memory: there is no more \(.+\); {re.escape(STANDS)}")
    assert not (out / "feats.scp").exists()
    done = faulty.start(arguments, tmp_path / "log", work=giving_back_in_small_shards).wait()
    assert done.status == 0, done.output
    assert scenes.read_table(out / "feats.scp").keys() == set(scenes.IDS)

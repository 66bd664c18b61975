"""What befalls a dump: kills, a full disk, flipped bits, a second process, another encoder.

The cases are numbered as in docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import faulty
import pytest
import scenes
import tiny
from faulty import Ended, Trap
from scenes import IDS, Disk, Limit, assert_refused, children, dump_arguments, start_dump

from speechllm.config import load as configs
from speechllm.errors import EXIT_STOPPED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TRAIN = {"epochs": 1, "valid_utts": 1}
TIMED = {".lock", "provenance.json"}
REMOVE = "remove the folder or choose another"


@dataclass(frozen=True)
class Whole:
    """A corpus, a configuration, and a dump that nothing disturbed."""

    conf: Path
    data: Path
    out: Path

    def goes_on_to_the_same(self, out: Path) -> None:
        """Run the command again, and compare all that it left."""
        done = start_dump(self.conf, self.data, out).wait()
        assert done.status == 0, done.output
        assert contents(out) == contents(self.out)

    def train(self, out: Path, *options: str) -> Ended:
        """Return how a training on `out` ended."""
        paths = {"--conf": self.conf, "--train": out, "--valid": self.out, "--exp": out.parent / "exp"}
        arguments = ["train", *(str(part) for pair in paths.items() for part in pair), *options]
        return faulty.start(arguments, out.parent / "train.log").wait()


def contents(out: Path) -> dict[str, bytes]:
    """Return what a dump is, without the times in it."""
    found = {name: content for name, content in scenes.snapshot(out).items() if name not in TIMED}
    for name in [name for name in found if re.fullmatch(r"feats\.\d+\.json", name)]:
        mark = json.loads(found[name])
        del mark["seen"]["mtime_ns"]
        found[name] = json.dumps(mark).encode()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("dumps")
    configs.dump(
        tiny.config(tiny.wavlm(folder / "encoder"), tiny.llama(folder / "lm"), train=TRAIN), folder / "conf.yaml"
    )
    made = Whole(folder / "conf.yaml", scenes.corpus(folder / "corpus").data, folder / "whole")
    done = start_dump(made.conf, made.data, made.out).wait()
    assert done.status == 0, done.output
    assert len(list(made.out.glob("*.ark"))) == len(IDS) / scenes.UTTS_PER_SHARD
    return made


@pytest.fixture
def out(whole: Whole, tmp_path: Path) -> Path:
    """Return a copy of the whole dump."""
    return shutil.copytree(whole.out, tmp_path / "out")


# Kills

MOMENTS = {
    "folder-is-noted": (r"/\.dump\.json", 1),
    "shard-is-begun": (r"/\.tmp\.0001\.", 1),
    "archive-is-begun": (r"/\.tmp\.0001\.\d+/feats\.0001\.ark$", 1),
    "places-are-written": (r"/\.tmp\.0001\.\d+/\.feats\.0001\.scp", 1),
    "archive-takes-its-name": (r"/out/feats\.0001\.ark$", 1),
    "places-take-their-name": (r"/out/feats\.0001\.scp$", 1),
    "mark-is-written": (r"/out/\.feats\.0001\.json", 1),
    "tables-are-written": (r"/out/\.utt2num_frames", 1),
    "feats.scp-is-written": (r"/out/\.feats\.scp", 1),
    "folder-is-whole": (r"/\.dump\.json", 2),
}


@pytest.mark.parametrize(("file", "nth"), MOMENTS.values(), ids=MOMENTS)
def test_21_killed_in_a_shard_the_dump_goes_on_to_the_same_bytes(
    whole: Whole, tmp_path: Path, file: str, nth: int
) -> None:
    out = tmp_path / "out"
    ended = start_dump(whole.conf, whole.data, out, trap=Trap(signal.SIGKILL, file=file, nth=nth)).wait()
    assert ended.status == -signal.SIGKILL, ended.output
    if "dump" not in file or nth == 1:
        assert not (out / "feats.scp").exists()  # so that no training takes it for whole
    kept = [path for path in out.glob("*.ark") if path.with_suffix(".json").exists()]
    before = {path: path.stat().st_ino for path in kept}
    whole.goes_on_to_the_same(out)
    assert {path: path.stat().st_ino for path in kept} == before  # what was whole was not made again
    assert faulty.leftovers(out) == []


TRIES = 5
SMALL_SHARDS = f"""
import sys
from speechllm import cli, dump
dump.UTTS_PER_SHARD = {scenes.UTTS_PER_SHARD}
sys.exit(cli.run(sys.argv[1:]))
"""


@contextlib.contextmanager
def at_work(whole: Whole, out: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """Yield the real command, held with its real pool at work, and the held processes of that, a busy one first."""
    command = [sys.executable, "-c", SMALL_SHARDS, *dump_arguments(whole.conf, whole.data, out, "--nj", "2")]
    deadline = time.monotonic() + scenes.TIME_LIMIT_S
    for _ in range(TRIES):
        with log.open("wb") as stream, subprocess.Popen(command, stderr=stream, stdout=stream) as running:
            while not (begun := list(out.glob(".tmp.*")) + list(out.glob("*.ark"))) and running.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            assert begun
            workers = [pid for pid in children(running.pid) if is_worker(pid)]
            for pid in (running.pid, *workers):
                stop(pid, signal.SIGSTOP)
            workers.sort(key=lambda pid: not any(out.glob(f".tmp.*.{pid}")))
            if workers and any(out.glob(f".tmp.*.{workers[0]}")):
                yield running, workers
                break
            running.kill()  # this test was late: all is done
            go_on(workers)
        shutil.rmtree(out)
    else:
        raise AssertionError("it was always done already")
    while any(is_worker(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stop(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def go_on(workers: Sequence[int]) -> None:
    for pid in workers:
        stop(pid, signal.SIGCONT)


def test_21_killed_with_its_processes_at_work_none_of_them_stays(whole: Whole, tmp_path: Path) -> None:
    """What the processes wrote counts only where it is whole."""
    out = tmp_path / "out"
    with at_work(whole, out, tmp_path / "log") as (running, workers):
        running.kill()
        go_on(workers)
    assert running.returncode == -signal.SIGKILL
    assert not (out / "feats.scp").exists()
    whole.goes_on_to_the_same(out)
    assert faulty.leftovers(out) == []


def test_21_where_one_of_its_processes_is_killed_the_command_tells_it_and_ends(whole: Whole, tmp_path: Path) -> None:
    """As the system does where memory is full."""
    out = tmp_path / "out"
    with at_work(whole, out, tmp_path / "log") as (running, workers):
        os.kill(workers[0], signal.SIGKILL)
        running.send_signal(signal.SIGCONT)
        go_on(workers[1:])
        running.wait(scenes.TIME_LIMIT_S)
    ended = Ended(running.returncode, (tmp_path / "log").read_text(encoding="utf-8"))
    what = "a process of this command was killed, as the system does where memory is full"
    fix = "free some, or take a smaller --nj, and run again: what is whole stays"
    assert_refused(ended, re.escape(f"error: memory: {what}; {fix}"))
    assert not (out / "feats.scp").exists()
    whole.goes_on_to_the_same(out)
    assert faulty.leftovers(out) == []


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGINT, "by the keyboard"),
        (signal.SIGTERM, "by SIGTERM; run the same command again"),
        (signal.SIGHUP, "by SIGHUP; run the same command again"),
    ],
)
def test_21_stopped_with_its_processes_at_work_it_ends_at_once_and_they_do(
    whole: Whole, tmp_path: Path, number: int, told: str
) -> None:
    out = tmp_path / "out"
    with at_work(whole, out, tmp_path / "log") as (running, workers):
        running.send_signal(number)
        running.send_signal(signal.SIGCONT)
        go_on(workers)
        running.wait(scenes.TIME_LIMIT_S)
        assert not any(is_worker(pid) for pid in workers)  # nobody writes once the lock is free
    ended = Ended(running.returncode, (tmp_path / "log").read_text(encoding="utf-8"))
    assert ended.status == EXIT_STOPPED, ended.output
    assert ended.errors == [f"stopped: {told}"]
    assert not (out / "feats.scp").exists()
    whole.goes_on_to_the_same(out)


def is_worker(pid: int) -> bool:
    """Return whether a process is one of a pool; others keep count of what the pool shares."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


# A full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk | Limit]:
    folder = tmp_path / "disk"
    with scenes.mounted(folder, "size=1m") as done:
        yield Disk(folder) if done else Limit(folder, 1_500)


FULL = {
    "archive": (r"/\.tmp\.0001\.\d+/feats\.0001\.ark$", r"\.tmp\.0001\.\d+/feats\.0001\.ark"),
    "table": (r"/out/\.utt2num_frames", r"\.utt2num_frames\.\d+\.tmp"),
}


@pytest.mark.parametrize(("moment", "file"), FULL.values(), ids=FULL)
def test_22_a_full_disk_is_told_and_the_shards_that_are_whole_are_kept(
    whole: Whole, tmp_path: Path, disk: Disk | Limit, moment: str, file: str
) -> None:
    if isinstance(disk, Limit):  # no table is as large as what the process says
        moment, file = FULL["archive"]
    out = disk.folder / "out"
    log = tmp_path / "log"
    arguments = dump_arguments(whole.conf, whole.data, out)
    running = faulty.start(arguments, log, Trap(signal.SIGSTOP, file=moment), scenes.small_shards)
    running.wait_until_held()
    before = {path.name: path.read_bytes() for path in out.glob("feats.*")}
    assert before
    told = disk.fill(running)
    running.strike(signal.SIGCONT)
    fix = "make room and run again: what was there before still stands"
    assert_refused(running.wait(), rf"error: {re.escape(str(out))}/{file}: {told}; {fix}")
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not (out / "feats.scp").exists()
    disk.make_room()
    done = faulty.start(arguments, log, None, scenes.small_shards).wait()
    assert done.status == 0, done.output
    assert contents(out) == contents(whole.out)
    assert faulty.leftovers(out) == []


# Flipped bits


def test_23_a_bit_that_flipped_is_named_by_the_reader_and_mended_by_the_next_dump(whole: Whole, out: Path) -> None:
    """Neither size nor time of the archive tell of it."""
    place = scenes.read_table(out / "feats.scp")["u3"]
    ark = out / place.partition(":")[0]
    scenes.flip_at(ark, -1)
    ended = whole.train(out)
    what = r"u3 is not what was written there \(its CRC-32 is [0-9a-f]{8}, not [0-9a-f]{8}\); run stage 2 again"
    assert_refused(ended, rf"error: {re.escape(f'{out}/{place}')}: {what}")
    other = {path.name: path.stat().st_ino for path in out.glob("*.ark") if path != ark}
    whole.goes_on_to_the_same(out)
    assert {name: (out / name).stat().st_ino for name in other} == other


# Two at once


def test_24_a_second_dump_into_one_folder_is_refused_and_the_first_goes_on(whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start_dump(whole.conf, whole.data, out, trap=Trap(signal.SIGSTOP, file=r"/\.tmp\.0001\."))
    first.wait_until_held()
    before = contents(out)
    second = start_dump(whole.conf, whole.data, out, log="second.log").wait()
    assert_refused(second, re.escape(f"error: {out}: another process is writing here; wait for it to end"))
    assert contents(out) == before
    first.strike(signal.SIGCONT)
    done = first.wait()
    assert done.status == 0, done.output
    assert contents(out) == contents(whole.out)


def test_24_a_lock_that_a_killed_dump_left_is_none(whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "out"
    held = start_dump(whole.conf, whole.data, out, trap=Trap(signal.SIGSTOP, file=r"/\.tmp\.0001\."))
    held.wait_until_held()
    held.strike(signal.SIGKILL)
    assert held.wait().status == -signal.SIGKILL
    assert (out / ".lock").exists()
    whole.goes_on_to_the_same(out)


# Another encoder


def another_layer(whole: Whole, folder: Path) -> Path:
    configs.dump(configs.load(whole.conf, ("encoder.layer=1",)), folder / "layer.yaml")
    return folder / "layer.yaml"


@pytest.mark.parametrize("complete", [True, False], ids=["whole", "killed"])
def test_25_an_old_dump_is_not_mixed_with_another_configuration(
    whole: Whole, out: Path, tmp_path: Path, *, complete: bool
) -> None:
    if not complete:
        shutil.rmtree(out)
        trap = Trap(signal.SIGKILL, file=r"/\.tmp\.0001\.")
        assert start_dump(whole.conf, whole.data, out, trap=trap).wait().status == -signal.SIGKILL
    before = scenes.snapshot(out)
    ended = start_dump(another_layer(whole, tmp_path), whole.data, out).wait()
    what = "holds output made with layer = None, now it is 1"
    assert_refused(ended, re.escape(f"error: {out}: {what}; {REMOVE}"))
    assert scenes.snapshot(out) == before
    whole.goes_on_to_the_same(out)


def test_25_other_weights_under_the_old_name_are_refused(whole: Whole, out: Path) -> None:
    before = scenes.snapshot(out)
    weights = whole.conf.parent / "encoder/model.safetensors"
    blob = weights.read_bytes()
    with faulty.changed(weights, blob[:-1] + bytes([blob[-1] ^ 1])):
        ended = start_dump(whole.conf, whole.data, out).wait()
    what = r"holds output made with encoder_fingerprint = [0-9a-f]{16}, now it is [0-9a-f]{16}"
    assert_refused(ended, rf"error: {re.escape(str(out))}: {what}; {REMOVE}")
    assert scenes.snapshot(out) == before


def test_25_training_refuses_a_dump_of_another_configuration(whole: Whole, out: Path, tmp_path: Path) -> None:
    ended = whole.train(out, "--set", "encoder.layer=1")
    what = "was dumped with layer = None, the model wants 1"
    fix = "run stage 2 with this configuration, into another folder"
    assert_refused(ended, re.escape(f"error: {out}: {what}; {fix}"))
    assert not (tmp_path / "exp/model").exists()

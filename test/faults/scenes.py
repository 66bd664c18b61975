"""What the tests of this folder share: command lines as a user gives them, small corpora, full disks, flipped bits."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import faulty
import numpy as np
import soundfile
import tiny
from faulty import Ended, Running

from speechllm import cli
from speechllm.errors import EXIT_USER

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from faulty import Trap
    from numpy.typing import NDArray

TIME_LIMIT_S = 300
UTTS_PER_SHARD = 2
IDS = ("u0", "u1", "u2", "u3")
BAD = "u2"
TEXTS = ("今日はいい天気です。", "明日は雨が降ります。", "これは3冊の本です。", "東京から大阪まで電車で行きます。")


def speechllm(*arguments: object) -> Ended:
    """Return how a command line ended that was run in this process, which spares it the import of torch."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = cli.run([str(argument) for argument in arguments])
    return Ended(status, said.getvalue())


def process(*arguments: object, **environment: str) -> Ended:
    """Return how a command line ended that ran in a process of its own."""
    command = [sys.executable, "-m", "speechllm", *map(str, arguments)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=TIME_LIMIT_S,
        env={**os.environ, **environment},
    )
    return Ended(done.returncode, done.stdout.decode("utf-8", "replace"))


def script(path: Path, *arguments: object, cwd: Path, **environment: str) -> Ended:
    """Return how a script of a recipe ended, which was run in `cwd`."""
    command = [sys.executable, str(path), *map(str, arguments)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=TIME_LIMIT_S,
        env={**os.environ, **environment},
        cwd=cwd,
    )
    return Ended(done.returncode, done.stdout)


def snapshot(exp: Path) -> dict[str, bytes]:
    return {str(path.relative_to(exp)): path.read_bytes() for path in sorted(exp.rglob("*")) if path.is_file()}


def assert_refused(ended: Ended, line: str) -> None:
    """Check that a command ended with 2 and exactly this line, `line` being a pattern."""
    assert ended.status == EXIT_USER, ended.output
    assert len(ended.errors) == 1, ended.output
    assert re.fullmatch(line, ended.errors[0]), ended.errors[0]


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, where its values are."""
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


def flip_at(path: Path, place: int) -> None:
    """Change one bit of a file and nothing that `stat` tells of it."""
    status = path.stat()
    blob = bytearray(path.read_bytes())
    blob[place] ^= 1
    path.write_bytes(blob)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def wait_until_filled(path: Path, process: subprocess.Popen[str]) -> None:
    """Return once a process has written to a file, or has ended."""
    deadline = time.monotonic() + TIME_LIMIT_S
    while not (path.is_file() and path.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that still run; none where it has ended itself."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    return []


# Corpora


@dataclass(frozen=True)
class Corpus:
    """A data directory of four utterances, the sound of one of which is spoilt."""

    data: Path

    @property
    def wav(self) -> Path:
        """Return the sound of `BAD`."""
        return self.data.parent / "wav" / f"{BAD}.wav"

    def table(self, name: str) -> Path:
        return self.data / name

    def name_instead(self, path: Path) -> Path:
        """Let wav.scp name another file for `BAD`, and return it."""
        self.change("wav.scp", str(self.wav), str(path))
        return path

    def change(self, name: str, old: str, new: str) -> None:
        """Change a table."""
        text = self.table(name).read_text(encoding="utf-8")
        assert old in text
        self.table(name).write_text(text.replace(old, new), encoding="utf-8")


def sound(seed: int, num_samples: int = 8_000) -> NDArray[np.float32]:
    """Return noise [s]."""
    noise: NDArray[np.float32] = 0.1 * np.random.default_rng(seed).standard_normal(num_samples, dtype=np.float32)
    return noise


def corpus(folder: Path) -> Corpus:
    """Write a sound corpus below `folder`."""
    (folder / "wav").mkdir(parents=True)
    (folder / "data").mkdir()
    for seed, utt_id in enumerate(IDS):
        soundfile.write(folder / "wav" / f"{utt_id}.wav", sound(seed), 16_000, subtype="PCM_16")
    write_table(folder / "data/wav.scp", {utt_id: f"{folder}/wav/{utt_id}.wav" for utt_id in IDS})
    write_table(folder / "data/text", dict(zip(IDS, TEXTS, strict=True)))
    write_table(folder / "data/utt2spk", dict.fromkeys(IDS, "s"))
    return Corpus(folder / "data")


def write_table(path: Path, table: Mapping[str, str]) -> None:
    path.write_text("".join(f"{key} {value}\n" for key, value in table.items()), encoding="utf-8")


def read_table(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}


# Dumps


def small_shards(arguments: list[str], log: Path, trap: Trap | None) -> None:
    """Run the command line as `faulty.child` does, with shards of two utterances that this process makes itself."""
    from speechllm import dump

    vars(dump).update(UTTS_PER_SHARD=UTTS_PER_SHARD, worker_pool=tiny.AtOnce, ThreadPoolExecutor=tiny.AtOnce)
    faulty.child(arguments, log, trap)


def dump_arguments(conf: Path, data: Path, out: Path, *options: str) -> list[str]:
    return ["dump", "--conf", str(conf), "--data", str(data), "--out", str(out), *options]


def start_dump(conf: Path, data: Path, out: Path, *options: str, trap: Trap | None = None, log: str = "log") -> Running:
    """Return a dump that has begun in a process of its own, its output in `log` beside the folder of its output."""
    return faulty.start(dump_arguments(conf, data, out, *options), out.parent / log, trap, small_shards)


# Disks


class Disk:
    """A small file system, which can be filled up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, _running: Running) -> str:
        """Leave no room for what comes next, and return what a writer will be told."""
        with (self.folder / "filler").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(4096))
        return "No space left on device"

    def make_room(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", str(self.folder)], check=True)


class Limit:
    """Stands in where no file system may be mounted: a bound on the size of every file that is written."""

    def __init__(self, folder: Path, largest: int = 16_384) -> None:
        self.folder, self.largest = folder, largest
        folder.mkdir(exist_ok=True)

    def fill(self, running: Running) -> str:
        assert running.process.pid
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (self.largest, self.largest))
        return "File too large"

    def make_room(self) -> None:
        """Do nothing: the bound went with the process."""


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """Mount a file system in memory for a while; yield whether that was possible."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        done = False
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "-l", str(folder)], check=True)

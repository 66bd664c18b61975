"""Trainings that are disturbed: each is the command line in a process of its own, struck at a moment of our choice.

Importing torch takes seconds, so one process imports everything once and each training is forked from it; it runs
`speechllm.cli.run` and ends with its exit status. A moment is named by what the training does (its n-th operation on a
file, its n-th call of a function) and not by the clock, so that a slow machine meets the same one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechllm import cli

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from multiprocessing.context import ForkServerProcess
    from types import FrameType

TIME_LIMIT_S = 300
POLL_S = 0.005
IMPORTED_ONCE = (
    "peft",
    "pyopenjtalk",
    "soundfile",
    "torch",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.wavlm.modeling_wavlm",
    "speechllm.decode.batched",
    "speechllm.score.errors",
    "speechllm.stages",
    "speechllm.text.normalize",
    "speechllm.train.launch",
    "speechllm.train.run",
)
FILE_EVENTS = frozenset({"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"})
TIMES = frozenset({"minutes", "memory_gib"})  # what of a record depends on the clock or on the process
RESULTS = ("metrics.jsonl", "best.safetensors", "model/trained.safetensors")
UNCOUNTED = re.compile(r"tensorboard/|\.lock$|provenance\.json$|ctc/minutes$")  # hold times, or nothing


@dataclass(frozen=True)
class Trap:
    """The moment at which a training strikes itself, and with which signal."""

    number: int
    file: str = ""
    """Pattern of paths; the moment is the `nth` operation on one of them."""
    call: str = ""
    """Pattern of ``file:function``; the moment is the `nth` call of one of them. Without either, of any function."""
    nth: int = 1
    after: str = ""
    """Pattern of paths; counting begins at the first operation on one of them."""


@dataclass
class _Armed:
    """A trap in the process that will fall into it."""

    trap: Trap
    count: int = 0
    begun: bool = False
    codes: dict[object, bool] = field(default_factory=dict)

    def on_event(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in FILE_EVENTS:
            return
        for path in _paths(arguments):
            self.begun = self.begun or re.search(self.trap.after, path) is not None
            if self.trap.file and self.begun and re.search(self.trap.file, path):
                self._step()

    def on_call(self, frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or not self.begun:
            return
        code = frame.f_code
        if code not in self.codes:
            self.codes[code] = re.search(self.trap.call, f"{code.co_filename}:{code.co_name}") is not None
        if self.codes[code]:
            self._step()

    def _step(self) -> None:
        self.count += 1
        if self.count != self.trap.nth:
            return
        if self.trap.number == signal.SIGSTOP:
            signal.raise_signal(signal.SIGSTOP)  # in this thread: the process's main thread may be late
        else:
            os.kill(os.getpid(), self.trap.number)


def _paths(arguments: tuple[object, ...]) -> list[str]:
    return [os.fsdecode(one) for one in arguments[:2] if isinstance(one, str | bytes | os.PathLike)]


def child(arguments: list[str], log: Path, trap: Trap | None) -> None:
    """Run the command line as a process of its own does, with its output in `log`."""
    gc.freeze()  # what was imported is never looked through again
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(descriptor, number)
    if trap is not None:
        armed = _Armed(trap, begun=not trap.after)
        sys.addaudithook(armed.on_event)
        if not trap.file:
            sys.setprofile(armed.on_call)
    status = cli.run(arguments)
    sys.setprofile(None)
    if trap is not None:
        sys.stderr.write(f"\ncalls {armed.count}\n")
    sys.exit(status)


Child = Callable[[list[str], Path, Trap | None], None]
STARTED: list[ForkServerProcess] = []


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (minus the signal that killed it) and what it wrote."""

    status: int
    output: str

    @property
    def errors(self) -> list[str]:
        """Return what a user is told: the lines that are no log."""
        return [line for line in self.output.splitlines() if line.startswith(("error:", "stopped:", "Traceback"))]


class Running:
    """A training that is under way."""

    def __init__(self, process: ForkServerProcess, log: Path) -> None:
        self.process, self.log = process, log

    def wait_until_held(self) -> None:
        """Return once the process has stopped itself with SIGSTOP."""
        deadline = time.monotonic() + TIME_LIMIT_S
        while (state := _state_of(self.process.pid)) != "T":
            assert state, self.log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, "the process never came to its moment"
            time.sleep(POLL_S)

    def strike(self, number: int) -> None:
        assert self.process.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self) -> Ended:
        """Return how it ended."""
        self.process.join(TIME_LIMIT_S)
        if self.process.exitcode is None:
            self.strike(signal.SIGKILL)
            raise AssertionError(f"still running: {self.log.read_text(encoding='utf-8')}")
        return Ended(self.process.exitcode, self.log.read_text(encoding="utf-8"))


def _state_of(pid: int | None) -> str:
    """Return the letter of a process's state, T for one that is held; nothing where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return ""


def start(arguments: list[str], log: Path, trap: Trap | None = None, work: Child = child) -> Running:
    """Return a command line that has begun; its output goes to `log`. `work` is what the process does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED_ONCE))
    log.unlink(missing_ok=True)
    process = context.Process(target=work, args=(arguments, log, trap))
    process.start()
    STARTED.append(process)
    return Running(process, log)


@atexit.register  # and so before multiprocessing waits for what is held
def end_all() -> None:
    """Kill what a test that failed has left."""
    for process in STARTED:
        if process.is_alive():
            process.kill()


@dataclass(frozen=True)
class Setting:
    """A configuration and its data, in a folder of their own."""

    folder: Path
    conf: Path
    train: Path
    valid: Path

    def arguments(self, exp: Path, *options: str) -> list[str]:
        paths = {"--conf": self.conf, "--train": self.train, "--valid": self.valid, "--exp": exp}
        return ["train", *(str(part) for pair in paths.items() for part in pair), *options]

    def start(
        self, exp: Path, *options: str, trap: Trap | None = None, log: Path | None = None, work: Child = child
    ) -> Running:
        """Return a training that has begun; its output goes to `log`, beside `exp` unless named."""
        return start(self.arguments(exp, *options), log or exp.parent / f"{exp.name}.log", trap, work)

    def run(self, exp: Path, *options: str, trap: Trap | None = None, log: Path | None = None) -> Ended:
        """Return how a training ended."""
        return self.start(exp, *options, trap=trap, log=log).wait()


def make(folder: Path, lengths: Mapping[str, int], **fields: Any) -> Setting:
    """Return a setting of tiny models and of sounds of so many samples; the validation set holds the first three."""
    import tiny

    from speechllm.config import load as configs

    config = tiny.config(tiny.wavlm(folder / "encoder"), tiny.llama(folder / "lm"), **fields)
    configs.dump(config, folder / "conf.yaml")
    train = tiny.data_folder(folder / "train", lengths)
    valid = tiny.data_folder(folder / "valid", dict(list(lengths.items())[:3]))
    return Setting(folder, folder / "conf.yaml", train, valid)


def contents(exp: Path) -> dict[str, bytes]:
    """Return what must be the same of two runs: every file's bytes, the records' without the times in them."""
    found = {}
    for path in sorted(exp.rglob("*")):
        name = str(path.relative_to(exp))
        if path.is_file() and not UNCOUNTED.search(name):
            found[name] = _timeless(path) if path.name in {"metrics.jsonl", "state.json"} else path.read_bytes()
    return found


def _timeless(path: Path) -> bytes:
    """Return the records of a file without what depends on the clock."""
    records = [json.loads(line) for line in _json_lines(path)]
    for record in records:
        record.pop("sha256", None)  # of times, among others; the files it is of are compared themselves
        record.get("progress", {}).pop("seconds", None)
    kept = [{key: value for key, value in record.items() if key not in TIMES} for record in records]
    return "\n".join(json.dumps(record, sort_keys=True) for record in kept).encode()


def _json_lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def assert_same(exp: Path, wanted: Path, note: str, names: Collection[str] | None = None) -> None:
    """Check that a run left every file that another left, or those of `names`, with the same bits."""
    found, due = contents(exp), contents(wanted)
    differing = [name for name in names or due if found.get(name) != due[name]]
    assert not differing, f"{note}: {differing}"


def states(exp: Path) -> list[Path]:
    """Return the saved states, the oldest first."""
    return sorted((exp / "checkpoints").glob("step_*"))


def assert_whole(state: Path) -> None:
    """Check the sums that a state holds of its files."""
    sums = json.loads((state / "state.json").read_text(encoding="utf-8"))["sha256"]
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        assert hashlib.sha256((state / name).read_bytes()).hexdigest() == sums[name]


def leftovers(exp: Path) -> list[str]:
    """Return what was begun under a temporary name and never finished."""
    return [str(path.relative_to(exp)) for path in sorted(exp.rglob("*tmp*"))]


@contextlib.contextmanager
def changed(path: Path, data: bytes) -> Iterator[None]:
    """Let a file hold other bytes for a while."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)

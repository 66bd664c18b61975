"""The process that unpacks files from outside: it forks one of its own for each file, bounded, and kills it when told.

``python -m speechllm.serve.unpacker FD`` waits at a socket for jobs. A job is a JSON record and one end of a pair of
sockets: on it goes the answer, and when its other end is closed the job is killed. A fresh Python would cost a third
of a second for each file; a fork of this small, single-threaded one costs 10 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from speechllm.data import audio
from speechllm.data.streaming import Forward
from speechllm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

BLOCK_FRAMES = 1 << 16
MAX_JOB_BYTES = 1 << 15
MAX_REASON_CHARS = 300
MAX_OPEN_FILES = 64
HEADER_BYTES = 1 << 12  # more than a WAV header takes
SAMPLE_BYTES = 4
READY = b"ready"
STDERR = 2


@dataclass(frozen=True)
class Job:
    """A file to unpack, and what that may use."""

    source: str
    target: str
    max_seconds: float
    max_decoded_bytes: int
    memory_bytes: int
    time_s: float


class _TooLongError(Exception):
    """The sound is longer, or unpacks to more, than it may."""


class _NoRoomError(Exception):
    """What was unpacked cannot be written: the disk is full, for example."""


def serve(control: socket.socket) -> None:
    """Work off the jobs that come through `control`, side by side, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keyboard's is for the server
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        control.send(READY)
        while True:
            found = [key for key, _ in selector.select()]
            # the ended first, each once: a new job may get the descriptors of an old one
            for one in {key.data for key in found if key.data is not None}:
                for number in one.numbers:
                    selector.unregister(number)
                one.end()
            if any(key.fileobj is control for key in found):
                job, answers = _next_job(control)
                if answers is None:
                    break
                one = _fork(job, answers)
                for number in one.numbers:
                    selector.register(number, selectors.EVENT_READ, one)
        for one in {key.data for key in selector.get_map().values() if key.data is not None}:
            one.end()


@dataclass(frozen=True)
class _Running:
    """A process at work: its descriptor becomes readable when it ends, its socket when nobody waits for it."""

    pid: int
    pid_number: int
    answers: socket.socket

    @property
    def numbers(self) -> tuple[int, int]:
        return self.pid_number, self.answers.fileno()

    def end(self) -> None:
        """Kill it if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pid_number, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pid_number)
        with contextlib.suppress(OSError):  # the server has closed its end
            # for a sibling too that was forked a moment ago and has not closed its copy yet
            self.answers.shutdown(socket.SHUT_RDWR)
        self.answers.close()


def _next_job(control: socket.socket) -> tuple[bytes, socket.socket | None]:
    """Return a job and where its answer goes; no socket when the server is gone."""
    job, numbers, _, _ = socket.recv_fds(control, MAX_JOB_BYTES, 1)
    return (job, socket.socket(fileno=numbers[0])) if numbers else (job, None)


def _fork(job: bytes, answers: socket.socket) -> _Running:
    pid = os.fork()
    if pid:
        return _Running(pid, os.pidfd_open(pid), answers)
    try:
        _close_all_but(answers.fileno())
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, STDERR)  # decoders write their complaints there
        answers.sendall(json.dumps(_work(Job(**json.loads(job)))).encode())
    finally:
        os._exit(0)


def _close_all_but(number: int) -> None:
    """Close what came along: a decoder that was taken over reaches no socket of another one."""
    for opened in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if opened > STDERR and opened != number:
            with contextlib.suppress(OSError):  # the list's own has gone
                os.close(opened)


def _work(job: Job) -> dict[str, object]:
    """Unpack a file inside the limits; return a record of how it went."""
    _restrict(job)
    try:
        return {"kind": "ok", "duration_s": _copy(job)}
    except _TooLongError as error:
        return {"kind": "long", "what": str(error)}
    except _NoRoomError:
        return {"kind": "no_room"}
    except DataError as error:
        return {"kind": "broken", "what": error.what[:MAX_REASON_CHARS]}
    except (OSError, MemoryError, soundfile.SoundFileError, ValueError, RuntimeError) as error:
        return {"kind": "broken", "what": f"cannot be decoded ({type(error).__name__})"}


def _restrict(job: Job) -> None:
    """Bound memory, processor time, open files and what is written."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, used + job.memory_bytes),
        (resource.RLIMIT_CPU, int(job.time_s) + 1),
        (resource.RLIMIT_FSIZE, job.max_decoded_bytes + HEADER_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))


def _copy(job: Job) -> float:
    """Return the seconds that were written."""
    source = Path(job.source)
    info = _inspect(source, job)
    num_samples = 0
    with _writing():
        stream = soundfile.SoundFile(job.target, "w", info.sample_rate_hz, 1, subtype="FLOAT", format="WAV")
    try:
        for block in _blocks(source, info, job):
            num_samples += len(block)
            if num_samples * SAMPLE_BYTES > job.max_decoded_bytes:
                raise _TooLongError(f"unpacks to more than {job.max_decoded_bytes} bytes")
            with _writing():
                stream.write(block)
    finally:
        with _writing():
            stream.close()
    return num_samples / info.sample_rate_hz


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Take what goes wrong inside as no fault of the file that is read.

    Raises:
        _NoRoomError: soundfile says so by an error of the system, or by an assertion where too little was written.
    """
    try:
        yield
    except (OSError, soundfile.SoundFileError, AssertionError) as error:
        raise _NoRoomError from error


def _blocks(source: Path, info: audio.AudioInfo, job: Job) -> Iterator[NDArray[np.float32]]:
    """Yield the samples [s] of the mean channel, block by block; what the header says is not believed."""
    seen = 0
    with Forward(str(source)) as stream:
        # not `stream.blocks`: its buffer keeps the block before where the file ends early
        while len(block := stream.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
            seen += len(block)
            _check_length(seen, info.sample_rate_hz, job)
            if not np.isfinite(block).all():
                raise DataError(source, "holds samples that are NaN or infinite", "")
            yield block.mean(axis=1)
    if not info.least_samples <= seen <= info.num_samples:
        raise DataError(source, f"is cut short: {seen} of {info.num_samples} samples are there", "")


def _inspect(source: Path, job: Job) -> audio.AudioInfo:
    with contextlib.suppress(soundfile.SoundFileError, RuntimeError, TypeError):  # `audio.inspect` says what is wrong
        header = soundfile.info(str(source))
        _check_length(header.frames, header.samplerate, job)
    info = audio.inspect(source)
    if info.num_samples * info.num_channels * SAMPLE_BYTES > job.max_decoded_bytes:
        raise _TooLongError(f"unpacks to more than {job.max_decoded_bytes} bytes")
    return info


def _check_length(num_samples: int, sample_rate_hz: int, job: Job) -> None:
    if num_samples > job.max_seconds * sample_rate_hz:
        raise _TooLongError(f"is longer than {job.max_seconds:g} s")


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as given:
        serve(given)

"""Commands in wav.scp, run only where the user allows it: no shell, programs of a list, bounded time and output.

Kaldi hands such a value to a shell (https://kaldi-asr.org/doc/io.html). Here it is cut into words, each program must be
one that reads sound, and what the last one writes becomes a file, which is then read like any other.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from speechllm.errors import DataError
from speechllm.runtime import atomic_path, hash_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import IO

PROGRAMS = ("cat", "ffmpeg", "flac", "gzip", "mpg123", "opusdec", "sox", "sph2pipe", "wvunpack")
MAX_PROGRAMS = 8  # of one command
LIMIT_S = 300.0  # for one command
MAX_BYTES = 4 << 30  # that one command may write: four hours of 48 kHz stereo are less
WAIT_S = 0.02
KEPT_STDERR_BYTES = 2000
WRITE_A_FILE = "write its output to a file and name that"


def commands_of(where: str, value: str) -> list[list[str]]:
    """Return the words of each program of a value such as ``sph2pipe -f wav a.sph | sox -t wav - -t wav - |``.

    Raises:
        DataError: it is no chain of programs of `PROGRAMS`, or would need a shell.
    """
    lexer = shlex.shlex(value.removesuffix("|"), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
    except ValueError as error:
        raise DataError(where, f"is a command that cannot be read ({error})", WRITE_A_FILE) from error
    chain: list[list[str]] = [[]]
    for word in words:
        if word == "|":
            chain.append([])
        elif set(word) <= set("();<>|&") or "`" in word or "$" in word:
            raise DataError(where, f"is a command with {word}, and no shell is run", WRITE_A_FILE)
        else:
            chain[-1].append(word)
    for program in [words[0] if words else "" for words in chain]:
        if program not in PROGRAMS:
            what = f"is a command of {program!r}, which is not among the programs that are run ({', '.join(PROGRAMS)})"
            raise DataError(where, what, WRITE_A_FILE)
    if len(chain) > MAX_PROGRAMS:
        raise DataError(where, f"is a command of more than {MAX_PROGRAMS} programs", WRITE_A_FILE)
    return chain


def run_all(
    commands: Mapping[str, tuple[str, str]], folder: Path, on_fault: Callable[[DataError], None]
) -> dict[str, Path]:
    """Return key -> file with what its command writes; commands are key -> (where it stands, value).

    One that is no chain of programs of `PROGRAMS`, fails, takes too long or writes too much goes to `on_fault`.
    """
    made = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = {key: pool.submit(run, where, value, folder) for key, (where, value) in commands.items()}
        try:
            for key, job in tqdm(jobs.items(), "pipes", unit="sound", delay=5, leave=False, disable=None):
                try:
                    made[key] = job.result()
                except DataError as fault:
                    on_fault(fault)
        finally:
            pool.shutdown(cancel_futures=True)
    return made


def run(where: str, value: str, folder: Path) -> Path:
    """Return a file in `folder` that holds what a command writes; a second call finds it there.

    Raises:
        DataError: as `commands_of`; or a program is not there, fails, takes too long or writes too much.
    """
    chain = commands_of(where, value)
    path = folder / f"{hash_texts([value])}.wav"
    if not path.is_file():
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            _run_chain(where, chain, stream)
    return path


def _run_chain(where: str, chain: Sequence[Sequence[str]], output: IO[bytes]) -> None:
    """Run programs one into the next, the last one into `output`."""
    with tempfile.TemporaryFile() as said, contextlib.ExitStack() as ends:
        running: list[subprocess.Popen[bytes]] = []
        for number, words in enumerate(chain, start=1):
            source = running[-1].stdout if running else subprocess.DEVNULL
            target = output if number == len(chain) else subprocess.PIPE
            running.append(_start(where, words, (source, target, said)))
            ends.callback(_end, running[-1])
            if len(running) > 1 and (before := running[-2].stdout):
                before.close()  # so that a program sees when the next one is gone
        deadline = time.monotonic() + LIMIT_S
        while any(process.poll() is None for process in running):
            if time.monotonic() > deadline:
                raise DataError(where, f"its command ran for more than {LIMIT_S:g} s", WRITE_A_FILE)
            time.sleep(WAIT_S)
        _check(where, chain, [process.returncode for process in running], said)


def _start(where: str, words: Sequence[str], streams: tuple[IO[bytes] | int | None, IO[bytes] | int, IO[bytes]]) -> Any:
    source, target, said = streams
    try:
        process = subprocess.Popen(words, stdin=source, stdout=target, stderr=said, start_new_session=True)
    except OSError as error:
        what = f"{words[0]} cannot be started ({error.strerror})"
        raise DataError(where, what, f"install it, or {WRITE_A_FILE}") from error
    with contextlib.suppress(ProcessLookupError):  # it is done already
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (MAX_BYTES, MAX_BYTES))
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program, and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _check(where: str, chain: Sequence[Sequence[str]], statuses: Sequence[int], said: IO[bytes]) -> None:
    for number, (words, status) in enumerate(zip(chain, statuses, strict=True), start=1):
        if status == 0 or (status == -signal.SIGPIPE and number < len(chain)):  # the next one had enough
            continue
        if status == -signal.SIGXFSZ:
            raise DataError(where, f"its command wrote more than {MAX_BYTES >> 20} MiB", WRITE_A_FILE)
        said.seek(0)
        told = said.read(KEPT_STDERR_BYTES).decode("utf-8", "replace").strip()
        what = f"its program {words[0]} ended with {status}" + (f" ({told})" if told else "")
        raise DataError(where, what, "mend the command; nothing of its output is used")

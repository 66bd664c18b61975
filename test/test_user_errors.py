"""A fault keeps its three parts, on one line, in whatever process it is raised."""

from __future__ import annotations

import errno
import pickle
from typing import NoReturn

import pytest

from speechllm.errors import ConfigError, DataError, Faults, ModelError, Stopped, UserError, exit_status
from speechllm.runtime import worker_pool


@pytest.mark.parametrize("kind", [UserError, ConfigError, DataError, ModelError])
def test_a_fault_survives_the_way_between_processes(kind: type[UserError]) -> None:
    sent = kind("a/b.wav:3", "is no audio", "take it out")
    received = pickle.loads(pickle.dumps(sent))  # noqa: S301 - made on the line itself
    assert type(received) is kind
    assert str(received) == "a/b.wav:3: is no audio; take it out"
    assert received.fix == "take it out"


def test_line_breaks_inside_a_fault_become_blanks() -> None:
    assert str(DataError("a", "b\nc", "d\r\n e")) == "a: b c; d e"


def test_names_from_outside_move_no_terminal() -> None:
    assert str(DataError("\x1b[2Ja.wav", "\x9b1mis\x07", "京都\u3000だ")) == r"\x1b[2Ja.wav: \x9b1mis\x07; 京都 だ"


CANNOT = f"[Errno {errno.ENOMEM}] Cannot allocate memory"
STANDS = "free some, or choose a smaller batch or model, and run again: what was there before still stands"
ENDS = [
    (DataError("a", "b", "c"), 2, "error: a: b; c"),
    (Faults([DataError("a", "b", "c"), "d: e; f"]), 2, "error: a: b; c\nerror: d: e; f"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: x: Permission denied; mend it and run again"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "error: x: File name too long; mend it and run again"),
    (
        OSError(errno.ENOSPC, "No space left on device", "x"),
        2,
        "error: x: No space left on device; make room and run again: what was there before still stands",
    ),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, f"error: memory: there is no more ({CANNOT}); {STANDS}"),
    (MemoryError(), 2, f"error: memory: there is no more (MemoryError); {STANDS}"),
    (RuntimeError("CUDA out of memory.\n"), 2, f"error: memory: there is no more (CUDA out of memory.); {STANDS}"),
    (RuntimeError("std::bad_alloc"), 2, f"error: memory: there is no more (std::bad_alloc); {STANDS}"),
    (
        OSError(errno.EIO, "Input/output error", "x"),
        2,
        "error: x: Input/output error; look after the disk and run again",
    ),
    (FileExistsError(errno.EEXIST, "File exists", "x"), 2, "error: x: File exists; name another, or move it away"),
    (
        OSError(errno.EMFILE, "Too many open files", "x"),
        2,
        "error: x: Too many open files; raise ulimit -n and run again",
    ),
    (OSError(errno.ECONNRESET, "Connection reset", "x"), 1, "error: x: Connection reset; mend it and run again"),
    (
        FileNotFoundError(errno.ENOENT, "No such file", "\x1b]0;x\x07"),
        2,
        r"error: \x1b]0;x\x07: No such file; mend it and run again",
    ),
    (Stopped("at step 3"), 75, "stopped: at step 3"),
    (KeyboardInterrupt(), 75, "stopped: by the keyboard"),
]


@pytest.mark.parametrize(("end", "status", "line"), ENDS, ids=lambda value: type(value).__name__)
def test_a_script_ends_as_the_command_line_does(
    capsys: pytest.CaptureFixture[str], end: BaseException, status: int, line: str
) -> None:
    def work() -> None:
        raise end

    assert exit_status(work) == status
    assert capsys.readouterr().err == f"{line}\n"


def test_a_fault_of_ours_is_no_line() -> None:
    def work() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        exit_status(work)


def test_a_script_may_have_a_status_of_its_own() -> None:
    assert exit_status(lambda: 3) == 3


def test_a_script_that_ends_well_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: None) == 0
    assert capsys.readouterr().err == ""


def fail(where: str) -> NoReturn:
    raise DataError(where, "holds no samples", "take it out")


def test_a_fault_in_a_worker_reaches_the_parent_and_does_not_hang() -> None:
    with worker_pool(1) as pool, pytest.raises(DataError, match=r"x\.wav: holds no samples; take it out"):
        pool.submit(fail, "x.wav").result(timeout=120)

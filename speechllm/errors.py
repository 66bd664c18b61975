"""The faults that a run can end with, each with its exit status."""

from __future__ import annotations

import errno
import sys
from concurrent.futures import BrokenExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pydantic import ValidationError

EXIT_OURS = 1
EXIT_USER = 2
EXIT_STOPPED = 75


CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
"""Characters that would have a terminal do something."""


def one_line(text: str) -> str:
    """Return a text with blanks for line breaks and escapes for other control characters: names come from outside."""
    return " ".join(text.split()).translate(CONTROLS)


def first_of(error: ValidationError) -> str:
    """Return the first fault that pydantic found, behind the dotted name of its field where it has one."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    return f"{name}: {first['msg']}" if name else first["msg"]


class UserError(Exception):
    """The user's input is at fault: says where it is, what is wrong, and what mends it.

    Shown as one line, ``error: where: what; fix``, with exit status 2.
    """

    def __init__(self, where: str | Path, what: str, fix: str) -> None:
        """Join the three parts into one line, each as `one_line` has it."""
        self.where, self.what, self.fix = one_line(str(where)), one_line(what), one_line(fix)
        super().__init__(f"{self.where}: {self.what}; {self.fix}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        """Return what rebuilds it in another process: worker processes raise these too."""
        return type(self), (self.where, self.what, self.fix)


class ConfigError(UserError):
    """A configuration file or an option is wrong."""


class DataError(UserError):
    """A data directory, an audio file, an archive or a text file is wrong."""


class ModelError(UserError):
    """A model folder is missing, incomplete, or not the one that was asked for."""


class Faults(Exception):  # noqa: N818 - carries faults, and is none itself
    """Faults that a command found while it went on with the rest: each is shown as one line, exit status 2."""

    def __init__(self, found: Sequence[object]) -> None:
        """Keep what was found; at least one."""
        self.found = tuple(found)
        super().__init__(f"{len(self.found)} faults")


class Stopped(BaseException):
    """The run was asked to stop and has saved its state; running it again goes on.

    As `KeyboardInterrupt` it is raised wherever a signal comes: no library may take it for an error of its own.
    """


TOLD = (UserError, Faults, Stopped, KeyboardInterrupt, OSError, MemoryError, BrokenExecutor)
"""What ends a command with a line, as a lack of memory does; all else is a fault of ours, with a traceback."""
NO_MEMORY = (
    "annot allocate memory",  # the system's words
    "can't allocate memory",  # torch's on the host
    "not enough memory",
    "out of memory",  # and on a GPU
    "bad_alloc",
    "could not create a primitive",  # oneDNN's
    "can't start new thread",  # Python's: there is none for its stack
)
MEND, ROOM = "mend it and run again", "make room and run again: what was there before still stands"
DISK, FILES = "look after the disk and run again", "raise ulimit -n and run again"
SYSTEM_FIXES = {
    **dict.fromkeys([errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.EISDIR], MEND),
    **dict.fromkeys([errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP], MEND),
    **dict.fromkeys([errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ROOM),
    **dict.fromkeys([errno.EIO, errno.ESTALE, errno.ETIMEDOUT], DISK),
    **dict.fromkeys([errno.EMFILE, errno.ENFILE], FILES),
    errno.EEXIST: "name another, or move it away",
}
"""What mends an error of the system that is no fault of ours."""
SHOWN = 150  # characters of what a library said


def exit_status(work: Callable[[], int | None]) -> int:
    """Return the exit status of a script whose whole work is `work`, that which it returned where it did.

    What ends it is told on stderr.
    """
    try:
        return work() or 0
    except TOLD as error:
        return told(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return told(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is no more memory, on a GPU or on the host."""
    named = isinstance(error, RuntimeError) and any(one in str(error) for one in NO_MEMORY)
    return named or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def shown(error: BaseException) -> str:
    """Return the beginning of what an error says, on one line."""
    return one_line(str(error))[:SHOWN] or type(error).__name__


def told(error: BaseException) -> int:
    """Tell on stderr what ended a command, one of `TOLD` or a lack of memory, and return its exit status."""
    if isinstance(error, Faults):
        return max(fail(str(fault), EXIT_USER) for fault in error.found)
    if is_out_of_memory(error):
        fix = "free some, or choose a smaller batch or model, and run again: what was there before still stands"
        return fail(f"memory: there is no more ({shown(error)}); {fix}", EXIT_USER)
    if isinstance(error, BrokenExecutor):
        what = "a process of this command was killed, as the system does where memory is full"
        return fail(f"memory: {what}; free some, or take a smaller --nj, and run again: what is whole stays", EXIT_USER)
    if isinstance(error, OSError):
        return _fail_of_system(error)
    if isinstance(error, UserError):
        return fail(str(error), EXIT_USER)
    sys.stderr.write(f"stopped: {str(error) or 'by the keyboard'}\n")
    return EXIT_STOPPED


def fail(message: str, status: int) -> int:
    """Tell a fault in one line on stderr, and return `status`."""
    sys.stderr.write(f"error: {one_line(message)}\n")
    return status


def _fail_of_system(error: OSError) -> int:
    where, what = error.filename or "system", error.strerror or str(error)
    fix = SYSTEM_FIXES.get(error.errno or 0)
    return fail(f"{where}: {what}; {fix or 'mend it and run again'}", EXIT_OURS if fix is None else EXIT_USER)

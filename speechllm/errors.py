"""The faults that a run can end with, each with its exit status."""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

EXIT_OURS = 1
EXIT_USER = 2
EXIT_STOPPED = 75


class UserError(Exception):
    """The user's input is at fault: says where it is, what is wrong, and what mends it.

    Shown as one line, ``error: where: what; fix``, with exit status 2.
    """

    def __init__(self, where: str | Path, what: str, fix: str) -> None:
        """Join the three parts into one line; line breaks inside them become blanks."""
        self.where = " ".join(str(where).split())
        self.what = " ".join(what.split())
        self.fix = " ".join(fix.split())
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


class Stopped(Exception):  # noqa: N818 - not an error: the user asked for it
    """The run was asked to stop and has saved its state; running it again goes on."""


TOLD = (UserError, Faults, Stopped, KeyboardInterrupt, OSError)
"""What ends a command with a line; all else is a fault of ours, with a traceback."""


def exit_status(work: Callable[[], None]) -> int:
    """Return the exit status of a script whose whole work is `work`; what ends it is told on stderr."""
    try:
        work()
    except TOLD as error:
        return told(error)
    return 0


def told(error: BaseException) -> int:
    """Tell on stderr what ended a command, one of `TOLD`, and return its exit status."""
    if isinstance(error, Faults):
        return max(fail(str(fault), EXIT_USER) for fault in error.found)
    if isinstance(error, OSError):
        return _fail_of_system(error)
    if isinstance(error, UserError):
        return fail(str(error), EXIT_USER)
    sys.stderr.write(f"stopped: {str(error) or 'by the keyboard'}\n")
    return EXIT_STOPPED


def fail(message: str, status: int) -> int:
    """Tell a fault in one line on stderr, and return `status`."""
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    return status


def _fail_of_system(error: OSError) -> int:
    theirs = isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | IsADirectoryError)
    theirs = theirs or error.errno in {errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}
    full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    where, what = error.filename or "system", error.strerror or str(error)
    fix = "make room and run again: what was there before still stands" if full else "mend it and run again"
    return fail(f"{where}: {what}; {fix}", EXIT_USER if theirs or full else EXIT_OURS)

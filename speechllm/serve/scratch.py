"""The server's folder for the files of requests: gone with the server, made again where something removed it.

The folder is locked while its server lives, so that the next one knows which were left behind by one that was killed.
systemd's cleaner of /tmp leaves a locked folder alone as well.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

LOG = logging.getLogger(__name__)
PREFIX = "speechllm-serve-"
TRIES = 10
NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What a file system says that cannot lock a folder: NFS, for example."""


class Scratch:
    """A folder of mode 0700 that is removed by `close`."""

    def __init__(self) -> None:
        """Remove what killed servers left, and make the folder."""
        _remove_abandoned(Path(tempfile.gettempdir()))
        self.path, self._lock = _make()

    def new_folder(self) -> Path:
        """Return a new folder inside, which `remove` removes.

        Raises:
            OSError: it cannot be made.
        """
        try:
            return self._new()
        except FileNotFoundError:  # a cleaner of /tmp removed the outer one
            path, lock = _make()
            LOG.warning("event=folder_made_again was=%s now=%s", self.path, path)
            self._unlock()
            self.path, self._lock = path, lock
            return self._new()

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        remove(self.path)
        self._unlock()

    def _new(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.path))

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


def remove(folder: Path) -> None:
    """Remove a folder; a process that is being killed may make one more file in it meanwhile."""
    for _ in range(TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def _make() -> tuple[Path, int | None]:
    """Return a new folder and the descriptor that locks it; none where there are no locks."""
    for _ in range(TRIES):
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            number = _locked(path)
        except (FileNotFoundError, BlockingIOError):  # a server that starts now took it for left behind
            continue
        except OSError as error:
            if error.errno in NO_LOCKS:
                return path, None
            path.rmdir()
            raise
        if path.exists():
            return path, number
        os.close(number)
    raise FileNotFoundError(errno.ENOENT, "removed again and again", f"{tempfile.gettempdir()}/{PREFIX}*")


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of this user's servers that live no more."""
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it is gone, in use, or another user's
            number = _locked(path)
            try:
                if os.fstat(number).st_uid == os.geteuid():
                    shutil.rmtree(path)
                    LOG.info("event=left_behind_removed folder=%s", path)
            finally:
                os.close(number)


def _locked(path: Path) -> int:
    """Return the descriptor that locks a folder until it is closed.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: it is gone, no folder, or not ours to open; or there are no locks.
    """
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(number)
        raise
    return number

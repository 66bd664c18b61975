"""How many connections a server holds open, and what it says when the system gives it no more."""

from __future__ import annotations

import errno
import logging
import resource
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from speechllm.serve.limits import ApiError, busy, network

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from speechllm.serve.limits import Limits

LOG = logging.getLogger(__name__)
MOST_FILES = 1 << 16  # what a server can use; the system may allow a billion
SPARE_FILES = 32  # standard streams, the event loop, the listening socket, the unpacker, the lock, and some to spare
FILES_EACH = 3  # a connection, the file of its request, and its way to the unpacker
IDLE_CONNECTIONS = 64  # besides two for each place
NO_FILES = (errno.EMFILE, errno.ENFILE)
NO_ACCEPT = (*NO_FILES, errno.ENOBUFS, errno.ENOMEM)
SAID_EVERY_S = 1.0


def raise_open_files() -> None:
    """Let this process open as many files as the system lets it, up to `MOST_FILES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if resource.RLIM_INFINITY != soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_connections(limits: Limits) -> int:
    """Return how many connections may be open: two for each place and some more, as far as open files allow."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2 * limits.max_queue + IDLE_CONNECTIONS
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, (soft - SPARE_FILES) // FILES_EACH))


@dataclass
class Seldom:
    """Says a thing at most once a second, with how often it happened since it was said last."""

    clock: Callable[[], float] = time.monotonic
    _count: int = 0
    _next_s: float = float("-inf")

    def warn(self, event: str, reason: str) -> None:
        """Write a line, or count that there was none."""
        self._count += 1
        now = self.clock()
        if now >= self._next_s:
            LOG.warning("event=%s times=%d reason=%s", event, self._count, reason)
            self._count, self._next_s = 0, now + SAID_EVERY_S


@dataclass
class Connections:
    """The connections that are open: bounded for all together, and to three quarters of that for one address."""

    most: int
    _open: Counter[str] = field(default_factory=Counter)
    _refused: Seldom = field(default_factory=Seldom)

    def add(self, address: str) -> bool:
        """Count a connection, and return whether it may stay; either way it is to be removed at its end."""
        client = network(address)
        self._open[client] += 1
        if self._open.total() <= self.most and self._open[client] <= max(1, self.most * 3 // 4):
            return True
        self._refused.warn("connection_closed", "too_many_are_open")
        return False

    def remove(self, address: str) -> None:
        """Take back what `add` counted."""
        client = network(address)
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]


def accept_failures() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """Return a handler for an event loop's exceptions that tells of connections it cannot take in one line.

    asyncio calls it for each of them, thousands in a second, and would write a traceback for each.
    """
    failed = Seldom()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in NO_ACCEPT and "accept" in str(context.get("message")):
            failed.warn("accept_failed", errno.errorcode[error.errno])
        else:
            loop.default_exception_handler(context)

    return handle


def lack_of_files(error: BaseException) -> ApiError | None:
    """Return the error that tells a client of a lack of open files; None where it is none."""
    if isinstance(error, OSError) and error.errno in NO_FILES:
        return busy(503, "The server has no more files to open now.", "no_files")
    return None

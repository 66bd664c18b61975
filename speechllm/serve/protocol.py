"""uvicorn's HTTP protocol with what it lacks: a bound on connections, and a time for the beginning of each request."""

from __future__ import annotations

import fcntl
import struct
import termios
from typing import TYPE_CHECKING

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

    from uvicorn.protocols.http.h11_impl import RequestResponseCycle

    from speechllm.serve.connections import Connections

ABORT = "abort"
"""Where a request's state holds what ends its connection at once, whatever is still to be sent."""


def guarded(headers_s: float, connections: Connections) -> type[H11Protocol]:
    """Return the protocol that ends a connection on which no request has begun for `headers_s` seconds.

    One that is too many is ended at once, without an answer.

    A client that sends its headers byte by byte, or goes on sending a body that was refused, is ended by it too. One
    that still takes in its last answer is not, as long as it does.
    """

    class Guarded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.app_state = {**self.app_state, ABORT: transport.abort}
            self._address = transport.get_extra_info("peername", ("",))[0]
            if connections.add(self._address):
                self._watch(None)
            else:
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            connections.remove(self._address)

        def on_response_complete(self) -> None:
            answered = self.cycle  # a request that waits behind it begins in the next line
            super().on_response_complete()
            self._watch(answered)

        def _watch(self, cycle: RequestResponseCycle | None) -> None:
            self.loop.call_later(headers_s, self._check, cycle, _unsent(self.transport))

        def _check(self, cycle: RequestResponseCycle | None, unsent_before: int) -> None:
            if self.cycle is not cycle:  # a request has begun since
                return
            if _unsent(self.transport) < unsent_before:
                self._watch(cycle)
            else:
                self.transport.abort()

    return Guarded


def _unsent(transport: asyncio.Transport) -> int:
    """Return the bytes that the client has not taken in: ours, and those that wait in the system."""
    number = transport.get_extra_info("socket").fileno()
    if number < 0:  # the connection has ended
        return 0
    (queued,) = struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4)))
    return transport.get_write_buffer_size() + int(queued)

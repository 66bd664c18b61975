"""uvicorn's server with an end that its clients are told of: it would cancel their requests, which answers with 500."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import uvicorn

from speechllm.serve.connections import accept_failures

if TYPE_CHECKING:
    import socket
    from types import FrameType

    from speechllm.serve.service import Service

LAST_S = 1  # to tell those who still wait
HANGS_S = 30  # after which uvicorn cancels what should have ended


class Server(uvicorn.Server):
    """A server that refuses requests once it is stopped, and answers 503 to those that do not end in time."""

    def __init__(self, config: uvicorn.Config, service: Service, stop_s: int) -> None:
        """Take the seconds that what is at work has at the stop; what does not read its answer has one more."""
        config.timeout_graceful_shutdown = stop_s + HANGS_S
        super().__init__(config)
        self._service, self._stop_s = service, stop_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at a signal."""
        self._service.stop()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        asyncio.get_running_loop().set_exception_handler(accept_failures())
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for what is at work, as long as there is time."""
        self._service.stop()
        loop = asyncio.get_running_loop()
        self._next = loop.call_later(self._stop_s, self._end_all)
        try:
            await super().shutdown(sockets)
        finally:
            self._next.cancel()

    def _end_all(self) -> None:
        """Have those who wait told, and give the answers their time from now on: a busy machine may be late here."""
        self._service.end_all()
        self._next = asyncio.get_running_loop().call_later(LAST_S, self._cut_off)

    def _cut_off(self) -> None:
        """End the connections that are left: their clients take no answer in."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

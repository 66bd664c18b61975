"""uvicorn's HTTP protocol with a time limit for the beginning of each request, which it has none for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

    from uvicorn.protocols.http.h11_impl import RequestResponseCycle


def guarded(headers_s: float) -> type[H11Protocol]:
    """Return the protocol that ends a connection on which no request has begun for `headers_s` seconds.

    A client that sends its headers byte by byte, or goes on sending a body that was refused, is ended by it too.
    """

    class Guarded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def _watch(self) -> None:
            self.loop.call_later(headers_s, self._check, self.cycle)

        def _check(self, cycle: RequestResponseCycle | None) -> None:
            if self.cycle is cycle:  # no request has begun since
                self.transport.abort()

    return Guarded

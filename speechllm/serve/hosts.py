"""Who may be addressed: a server for this machine alone answers to this machine's names alone.

A page of another site can have its own name point at 127.0.0.1 once it is loaded (DNS rebinding). Its requests are
then of one origin with the server as the browser sees it; only the name in `Host` tells.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse

from speechllm.serve.limits import ApiError

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Receive, Scope, Send

HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:]+))(?::\d{0,5})?", re.ASCII)


def is_loopback(address: str) -> bool:
    """Return whether an address reaches this machine only from itself."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def names_this_machine(host: str, others: Collection[str] = ()) -> bool:
    """Return whether a `Host` header names localhost, a loopback address or one of `others`, with any port."""
    found = HOST.fullmatch(host.lower())
    if not found:
        return False
    name = found[1] or found[2]
    return name == "localhost" or name in others or is_loopback(name)


class LocalOnly:
    """Refuses what was addressed to a name that is none of this machine's own.

    A request of HTTP/1.0 may have no `Host`; no browser sends one.
    """

    def __init__(self, app: ASGIApp, others: Collection[str] = ()) -> None:
        """Stand before `app`; `others` are names that it is known by, those of a web server in front for example."""
        self._app, self._others = app, {name.lower() for name in others}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 403."""
        hosts = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"]
        if all(names_this_machine(host, self._others) for host in hosts):
            await self._app(scope, receive, send)
            return
        message = "This server is for its own machine: address it as localhost, or start it with --allow-host NAME."
        error = ApiError(403, message, code="other_host")
        await JSONResponse(error.body(), error.status)(scope, receive, send)

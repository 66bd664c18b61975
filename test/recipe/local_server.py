"""A web server on this machine for the tests: sends parts of files, and breaks off where it is told to."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Site:
    """What is served, how, and what was asked for."""

    files: dict[str, bytes]
    address: str = ""
    cut_after: list[int] = field(default_factory=list)
    """So many bytes of each answer, in turn, until the connection is closed; whole answers when it is used up."""
    sends_parts: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Path and ``Range`` of every request."""


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Site]:
    """Serve `files`, by path, on 127.0.0.1."""
    site = Site(files)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(self, site)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        site.address = f"http://127.0.0.1:{server.server_port}"
        yield site
        server.shutdown()
        thread.join()


def _answer(handler: http.server.BaseHTTPRequestHandler, site: Site) -> None:
    wanted = handler.headers.get("Range", "")
    site.asked.append((handler.path, wanted))
    content = site.files.get(handler.path)
    if content is None:
        handler.send_error(HTTPStatus.NOT_FOUND)
        return
    etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    part = re.fullmatch(r"bytes=(\d+)-", wanted)
    start = 0
    if part and site.sends_parts and handler.headers.get("If-Range", etag) == etag:
        start = int(part[1])
        if start >= len(content):
            handler.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.end_headers()
            return
        handler.send_response(HTTPStatus.PARTIAL_CONTENT)
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    else:
        handler.send_response(HTTPStatus.OK)
    handler.send_header("Content-Length", str(len(content) - start))
    handler.send_header("ETag", etag)
    handler.end_headers()
    length = site.cut_after.pop(0) if site.cut_after else len(content)
    handler.wfile.write(content[start : start + length])

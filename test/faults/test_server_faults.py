"""What clients do to a server that runs as a process of its own. Cases as in docs/reliability.md; more in test/serve.

Its times are shorter than those by default, so that no test waits a minute; all else is as the command line has it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import tiny
from untrained import make

sys.path += [str(Path(__file__).parents[1] / name) for name in ("serve", "decode")]
import spoken
from bombs import flac_bomb
from running import PATH, RATE_HZ, Running, wait_until, wav
from test_serve_limits import HEAD, TAIL, drip, request, status_of

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BYTES = 400_000
MORE_MEMORY = 120 << 20  # that the server itself may take for any of this; a bomb holds 210 MB
LAUNCH = """
import functools, sys
from speechllm import cli
from speechllm.serve import limits
limits.Limits = functools.partial(limits.Limits, upload_s=2, headers_s=2, decode_s=4)
sys.exit(cli.run(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Server:
    """A server that answers at `port`."""

    process: subprocess.Popen[bytes]
    port: int
    temporary: Path
    sound: bytes
    client: httpx.Client

    def post(self, data: bytes, **fields: str) -> httpx.Response:
        return self.client.post(PATH, files={"file": ("a.wav", data)}, data=fields)

    def raw(self, data: bytes) -> contextlib.closing[object]:
        raise NotImplementedError

    def busy(self) -> int:
        """Return the number of requests that hold a place."""
        return int(self.client.get("/health").json()["requests"])

    def assert_well(self) -> None:
        """Check that nothing is left of earlier requests, and that a good one is answered."""
        wait_until(lambda: self.busy() == 0)
        assert [path for path in self.temporary.rglob("*") if path.is_file()] == []
        answer = self.post(self.sound)
        assert (answer.status_code, bool(answer.json()["text"])) == (200, True), answer.text

    def peak_memory(self) -> int:
        """Return the most bytes that the process itself has held so far."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    def unpacking(self) -> list[int]:
        """Return the processes that unpack a file now: grandchildren of the server."""
        return [child for one in children(self.process.pid) for child in children(one)]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    made = make(folder, tiny.llama(folder / "lm"), {"u": 8_000})
    temporary, log = folder / "tmp", folder / "log"
    temporary.mkdir()
    bounds = ["--max-bytes", MAX_BYTES, "--max-seconds", 60, "--max-queue", 4, "--rate", 0]
    arguments = ["serve", "--model", made.exp / "model", "--port", 0, *bounds]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-c", LAUNCH, *map(str, arguments)], stderr=stream, env=environment)
    try:
        wait_until(lambda: b"url=" in log.read_bytes() or process.poll() is not None, seconds=200)
        url = log.read_text(encoding="utf-8").partition("url=")[2].split()[0]
        bounds_of_client = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        with httpx.Client(base_url=url, timeout=60, trust_env=False, limits=bounds_of_client) as client:
            server = Server(process, httpx.URL(url).port or 0, temporary, wav(spoken.recording([0.3])[0]), client)
            server.assert_well()
            yield server
            server.assert_well()
        assert b"Traceback" not in log.read_bytes()
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    assert status == 75, log.read_text(encoding="utf-8")
    assert list(temporary.iterdir()) == []

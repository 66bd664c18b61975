"""What clients do to a server that runs as a process of its own. Cases as in docs/reliability.md; more in test/serve.

Two servers: one as the command line has it, and a hasty one for the tests in which a time runs out, so that none waits
a minute. A decoder of either stops by itself at a sound that ends in `HANG`, as a fault of its own would hold it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import tiny
from scenes import children
from untrained import make

sys.path += [str(Path(__file__).parents[1] / name) for name in ("serve", "decode")]
import spoken
from bombs import flac_bomb
from running import PATH, wait_until, wav
from test_serve_limits import HEAD, TAIL, drip, request, status_of

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BYTES = 400_000
MORE_MEMORY = 120 << 20  # that the server itself may take for any of this; a bomb holds 210 MB
HANG = b"and hang"
DECODE = f"""
import os, pathlib, signal, socket, sys
from speechllm.serve import unpacker
copy = unpacker._copy
def hold(job):
    if pathlib.Path(job.source).read_bytes().endswith({HANG!r}):
        os.kill(os.getpid(), signal.SIGSTOP)
    return copy(job)
unpacker._copy = hold
with socket.socket(fileno=int(sys.argv[1])) as given:
    unpacker.serve(given)
"""
LAUNCH = f"""
import functools, json, subprocess, sys, types
from speechllm import cli
from speechllm.serve import decoding, limits
def start(command, **options):
    return subprocess.Popen([sys.executable, "-P", "-c", {DECODE!r}, command[-1]], **options)
decoding.subprocess = types.SimpleNamespace(**{{**vars(subprocess), "Popen": start}})
limits.Limits = functools.partial(limits.Limits, **json.loads(sys.argv[1]))
sys.exit(cli.run(sys.argv[2:]))
"""
HASTY = {"upload_s": 2, "headers_s": 2, "decode_s": 3}


@dataclass(frozen=True)
class Server:
    """A server that answers at `port`."""

    process: subprocess.Popen[bytes]
    port: int
    temporary: Path
    sound: bytes
    client: httpx.Client
    log: Path

    def post(self, data: bytes, **fields: str) -> httpx.Response:
        return self.client.post(PATH, files={"file": ("a.wav", data)}, data=fields)

    def raw(self, data: bytes) -> socket.socket:
        """Return a connection on which `data` was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), 30)
        connection.sendall(data)
        return connection

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
        """Return the most bytes that the process itself has held since `forget_peak_memory`."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    def forget_peak_memory(self) -> None:
        """Let `peak_memory` begin anew, see proc(5)."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5", encoding="utf-8")

    def unpacking(self) -> list[int]:
        """Return the processes that unpack a file now: grandchildren of the server."""
        return [child for one in children(self.process.pid) for child in children(one)]

    def held(self) -> int:
        """Wait for the process that hangs over a file, and return it."""
        wait_until(lambda: any(map(is_stopped, self.unpacking())))
        (pid,) = filter(is_stopped, self.unpacking())
        return pid

    def left(self) -> int:
        """Return how many clients it has seen leave."""
        return self.log.read_bytes().count(b"code=client_gone")


def is_stopped(pid: int) -> bool:
    """Return whether a process is there, and stopped by a signal."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        return "State:\tT" in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make(folder, tiny.llama(folder / "lm"), {"u": 8_000}).exp / "model"


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with launched(model, tmp_path_factory.mktemp("server"), {}) as server:
        yield server


@pytest.fixture(scope="module")
def hasty(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with launched(model, tmp_path_factory.mktemp("hasty"), HASTY) as server:
        yield server


@contextlib.contextmanager
def launched(model: Path, folder: Path, limits: dict[str, int]) -> Iterator[Server]:
    """Run a server with limits that the command line has no options for; check that it is well before and after."""
    with stopped_after(model, folder, limits) as server:
        yield server
        server.assert_well()


@contextlib.contextmanager
def stopped_after(
    model: Path, folder: Path, limits: dict[str, int], *, most_files: int | None = None, status: int = 75
) -> Iterator[Server]:
    """Run a server that may open so many files; check that it is well before, and ends with a status."""
    temporary, log = folder / "tmp", folder / "log"
    temporary.mkdir(exist_ok=True)
    bounds = ["--max-bytes", MAX_BYTES, "--max-seconds", 60, "--max-queue", 4, "--rate", 0]
    arguments = [json.dumps(limits), "serve", "--model", model, "--port", 0, *bounds]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with log.open("wb") as stream:
        bounded = [] if most_files is None else ["prlimit", f"--nofile={most_files}:{most_files}"]
        command = [*bounded, sys.executable, "-c", LAUNCH, *map(str, arguments)]
        process = subprocess.Popen(command, stderr=stream, env=environment)
    try:
        wait_until(lambda: b"url=" in log.read_bytes() or process.poll() is not None, seconds=200)
        url = log.read_text(encoding="utf-8").partition("url=")[2].split()[0]
        bounds_of_client = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        with httpx.Client(base_url=url, timeout=60, trust_env=False, limits=bounds_of_client) as client:
            port, sound = httpx.URL(url).port or 0, wav(spoken.recording([0.3])[0])
            server = Server(process, port, temporary, sound, client, log)
            server.assert_well()
            yield server
    finally:
        process.send_signal(signal.SIGTERM)
        ended = process.wait(60)
    assert b"Traceback" not in log.read_bytes()
    assert ended == status, log.read_text(encoding="utf-8")
    assert status < 0 or list(temporary.iterdir()) == []


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# 47: sizes


def test_47_a_body_that_is_too_large_is_refused_whatever_it_says_of_its_length(server: Server) -> None:
    """The first says so, and is not read; the second says nothing; the third says less."""
    with server.raw(request(10**9, "Expect: 100-continue")) as connection:
        assert status_of(connection) == 413

    def chunks() -> Iterator[bytes]:
        yield HEAD
        for _ in range(50):
            yield bytes(10_000)

    kind = {"Content-Type": "multipart/form-data; boundary=xxboundaryxx"}
    assert code_of(server.client.post(PATH, content=chunks(), headers=kind)) == (413, "request_too_large")
    body = HEAD + server.sound + TAIL
    with server.raw(request(len(HEAD) + 20) + body) as connection:
        assert status_of(connection) == 400
    with server.raw(request(len(body)) + body + bytes(100_000)) as connection:
        assert status_of(connection) == 200
    server.assert_well()


@pytest.mark.parametrize("lengths", [["-5"], ["9" * 30], ["5", "6"], ["0x10"]])
def test_47_a_content_length_that_lies_is_refused(server: Server, lengths: list[str]) -> None:
    lines = [f"Content-Length: {length}" for length in lengths]
    with server.raw(request(None, *lines) + HEAD) as connection:
        assert status_of(connection) in {400, 413}
    server.assert_well()


# 48: a small file that unpacks to a large one


@pytest.mark.parametrize("claimed", [None, 0, 10**9, 2**36 - 1])
def test_48_a_decompression_bomb_is_refused_and_takes_no_memory(server: Server, claimed: int | None) -> None:
    bomb = flac_bomb(1602, claimed)
    assert len(bomb) < 56_000
    server.forget_peak_memory()
    before = server.peak_memory()
    assert code_of(server.post(bomb)) == (413, "recording_too_long")
    server.assert_well()
    assert server.peak_memory() - before < MORE_MEMORY


def test_48_a_bomb_that_claims_a_second_is_unpacked_for_a_second(server: Server) -> None:
    answer = server.post(flac_bomb(1602, 16_000), response_format="verbose_json")
    assert (answer.status_code, answer.json()["duration"], answer.json()["text"]) == (200, 1.0, "")
    server.assert_well()


# 49: a file that hangs the decoder


def test_49_a_decoder_that_hangs_is_killed_and_the_server_answers_meanwhile(hasty: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(hasty.post, hasty.sound + HANG)
        held = hasty.held()
        assert hasty.post(hasty.sound).status_code == 200
        assert code_of(answer.result()) == (422, "broken_file")
    assert "took longer than 3 s to decode" in answer.result().text
    wait_until(lambda: not Path(f"/proc/{held}").exists())
    hasty.assert_well()


# 50: slow clients, many of them, and those that leave


def test_50_slow_clients_have_their_time_and_then_no_more(hasty: Server) -> None:
    for begin in (request(5000) + HEAD, b"GET / HTTP/1.1\r\nX-A: ", b""):
        with hasty.raw(begin) as connection:
            dripping = threading.Thread(target=drip, args=(connection,))
            dripping.start()
            if begin.startswith(b"POST"):
                assert status_of(connection) == 408
            else:
                with contextlib.suppress(ConnectionResetError):
                    assert status_of(connection) in {0, 400}
            dripping.join(60)
    hasty.assert_well()


@pytest.mark.parametrize(("addresses", "code"), [(1, "too_many_requests"), (24, "queue_full")])
def test_50_of_a_flood_each_is_answered_or_told_to_come_again(server: Server, addresses: int, code: str) -> None:
    """One address has its share of the places; many together have all."""
    good = server.post(server.sound).json()

    def ask(number: int) -> httpx.Response:
        transport = httpx.HTTPTransport(local_address=f"127.0.0.{1 + number % addresses}")
        with httpx.Client(base_url=server.client.base_url, transport=transport, timeout=60) as client:
            return client.post(PATH, files={"file": ("a.wav", server.sound)})

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    answered = [answer.json() for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(answered) >= 3
    assert refused
    assert all(answer == good for answer in answered)
    assert {code_of(answer) for answer in refused} == {(429, code)}
    assert {answer.headers["retry-after"] for answer in refused} == {"5"}
    server.assert_well()


def test_50_who_leaves_takes_his_request_with_him(server: Server) -> None:
    """One leaves while sending, one while his file is unpacked, one whenever it is."""
    seen = server.left()
    with server.raw(request(100_000) + HEAD + server.sound):
        wait_until(lambda: server.busy() > 0)
    wait_until(lambda: server.left() == seen + 1)
    hanging, sound = (HEAD + data + TAIL for data in (server.sound + HANG, server.sound))
    with server.raw(request(len(hanging)) + hanging):
        held = server.held()
    wait_until(lambda: server.left() == seen + 2)  # told by the client's end, not by that of the decoder's time
    wait_until(lambda: not Path(f"/proc/{held}").exists())
    server.raw(request(len(sound)) + sound).close()
    server.assert_well()


def test_50_many_idle_connections_and_few_files_leave_the_server_well(model: Path, tmp_path: Path) -> None:
    with stopped_after(model, tmp_path, {}, most_files=96) as server, contextlib.ExitStack() as stack:
        for number in range(300):
            idle = stack.enter_context(socket.socket())
            idle.settimeout(0)
            idle.bind((f"127.0.0.{2 + number % 3}", 0))
            idle.connect_ex(("127.0.0.1", server.port))
        time.sleep(2)
        assert len(server.log.read_bytes().splitlines()) < 20
        stack.close()
        wait_until(lambda: answers(server))
        server.assert_well()


def answers(server: Server) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return server.busy() == 0
    return False


# 51: a server that is stopped or killed while it has work


def test_a_stop_tells_those_who_wait_and_is_no_fault(model: Path, tmp_path: Path) -> None:
    """The body of one never ends; the decoder of the other hangs."""
    with ThreadPoolExecutor(2) as pool, stopped_after(model, tmp_path, {}) as server:
        hanging = pool.submit(server.post, server.sound + HANG)
        server.held()
        endless = server.raw(request(100_000) + HEAD)
        wait_until(lambda: server.busy() == 2)
        server.process.send_signal(signal.SIGTERM)
        assert code_of(hanging.result()) == (503, "stopping")
        with endless:
            answer = endless.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"code":"stopping"' in answer


def test_what_a_killed_server_held_is_removed_by_the_next(model: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    with (
        stopped_after(model, tmp_path, {}, status=-signal.SIGKILL) as server,
        server.raw(request(100_000) + HEAD + server.sound),
    ):
        wait_until(lambda: any(path.is_file() for path in temporary.rglob("*")))
        server.process.kill()
    (left,) = temporary.iterdir()
    with stopped_after(model, tmp_path, {}):
        assert not left.exists()

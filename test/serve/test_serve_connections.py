"""Many idle connections, and few files that may be open: the server goes on and its log stays short."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import socket
import time
from typing import TYPE_CHECKING

import httpx
import pytest
from running import FakeModel, Running, numbered, serving, wait_until, wav

from speechllm.serve import connections, decoding, server
from speechllm.serve.connections import Connections, Seldom, accept_failures, most_connections, raise_open_files
from speechllm.serve.limits import Limits

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Never

SOUND = wav(numbered(3))
LIMITS = Limits(rate_per_min=0, headers_s=600)


def connected(port: int, address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 30, source_address=(address, 0))


def is_ended(connection: socket.socket) -> bool:
    """Return whether the server has closed a connection by now."""
    connection.settimeout(0)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:  # told once; from then on its end is
        return True


def test_connections_beyond_the_bounds_are_closed_at_once_and_others_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "most_connections", lambda _: 8)
    began = time.monotonic()
    with serving(FakeModel(), LIMITS) as running, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connected(running.port, "127.0.0.3")) for _ in range(12)]
        wait_until(lambda: is_ended(idle[-1]))
        assert [is_ended(one) for one in idle] == [False] * 6 + [True] * 6
        assert running.alive()  # from 127.0.0.1
        others = [stack.enter_context(connected(running.port, f"127.0.0.{number}")) for number in (4, 5, 6)]
        wait_until(lambda: is_ended(others[-1]))
        assert [is_ended(one) for one in others] == [False, False, True]
        for one in idle:
            one.close()
        wait_until(lambda: is_answered(running))
    assert 1 <= caplog.text.count("event=connection_closed") <= time.monotonic() - began + 1


def is_answered(running: Running) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return running.client.get("/health").status_code == 200
    return False


def test_what_is_counted_is_given_back() -> None:
    counted = Connections(4)
    assert [counted.add(address) for address in ("a", "a", "a", "a", "b")] == [True] * 3 + [False] * 2
    for address in ("a", "a", "b"):
        counted.remove(address)
    assert [counted.add(address) for address in ("b", "b", "c")] == [True, True, False]
    assert Connections(1).add("a")


@pytest.mark.parametrize(
    ("soft", "most"), [(1 << 16, 384), (1024, 330), (96, 21), (32, 1), (resource.RLIM_INFINITY, 384)]
)
def test_connections_leave_files_for_requests(monkeypatch: pytest.MonkeyPatch, soft: int, most: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert most_connections(Limits()) == most


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1024, 1 << 20), [(1 << 16, 1 << 20)]),
        ((1024, resource.RLIM_INFINITY), [(1 << 16, resource.RLIM_INFINITY)]),
        ((256, 512), [(512, 512)]),
        ((1 << 18, 1 << 20), []),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), []),
    ],
)
def test_the_server_may_open_what_the_system_lets_it(
    monkeypatch: pytest.MonkeyPatch, before: tuple[int, int], after: list[tuple[int, int]]
) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: before)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: made.append(limits))
    raise_open_files()
    assert made == after


def test_connections_that_cannot_be_taken_in_are_told_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    context = {
        "message": "socket.accept() out of system resource",
        "exception": OSError(errno.EMFILE, "Too many open files"),
    }
    loop = asyncio.new_event_loop()
    with contextlib.closing(loop):
        loop.set_exception_handler(accept_failures())
        for _ in range(1000):
            loop.call_exception_handler(context)
        (line,) = caplog.records
        assert line.getMessage() == "event=accept_failed times=1 reason=EMFILE"
        assert line.exc_info is None
        loop.call_exception_handler({"message": "something else", "exception": ValueError("x")})
    assert "something else" in caplog.text


def test_what_is_said_seldom_counts_what_was_not_said(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    seldom = Seldom(lambda: now[0])
    for now[0] in (0.0, 0.5, 0.9, 1.0):
        seldom.warn("x", "y")
    assert [record.getMessage() for record in caplog.records] == [
        "event=x times=1 reason=y",
        "event=x times=3 reason=y",
    ]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_no_files_to_open_is_told_and_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(_: Path) -> Never:
        raise OSError(number, "Too many open files")

    with serving(FakeModel(), LIMITS) as running:
        monkeypatch.setattr(decoding, "is_audio", refuse)
        answer = running.post(SOUND)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_files")
        assert answer.headers["retry-after"] == "5"
        assert not [record for record in caplog.records if record.exc_info]
        number = errno.EIO  # any other is a fault of ours
        answer = running.post(SOUND)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "failed")
        monkeypatch.undo()
        assert running.alive()


def test_the_loop_of_a_server_has_the_handler(caplog: pytest.LogCaptureFixture) -> None:
    """The system has no more files: the connection waits, and the log has a line."""
    with serving(FakeModel(), LIMITS) as running, contextlib.ExitStack() as stack:
        used = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = socket.socket()
        stack.enter_context(waiting)
        lowest = waiting.fileno()
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, used)
        with (free := socket.socket()):
            most = free.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(most, lowest), used[1]))
        waiting.connect(("127.0.0.1", running.port))
        wait_until(lambda: "event=accept_failed" in caplog.text)
        resource.setrlimit(resource.RLIMIT_NOFILE, used)
        assert running.alive()
    assert "Traceback" not in caplog.text
    assert "socket.accept()" not in caplog.text
    assert connections.SAID_EVERY_S == 1.0

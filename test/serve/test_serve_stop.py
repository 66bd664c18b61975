"""A server that is stopped tells those who wait, whatever they wait for, and logs no fault."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import uvicorn
from bombs import flac_bomb
from running import PATH, FakeModel, numbered, serving, wait_until, wav
from test_serve_limits import BOUNDARY, HEAD, TAIL, children, field, listening, request, walk_much

from speechllm.serve import server
from speechllm.serve.limits import Limits

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

SOUND = wav(numbered(3))
LIMITS = Limits(max_seconds=14_000, rate_per_min=0)
STOPPING = ["503", "server_error", "stopping"]


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STOP_S", 1)


@contextlib.contextmanager
def no_fault_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert "Exception in ASGI" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]
    assert "Cancel " not in caplog.text  # by uvicorn: it answers 500


def told(connection: socket.socket) -> list[str]:
    """Return the status, type and code of the answer that comes."""
    head, _, body = b"".join(iter(lambda: connection.recv(1 << 16), b"")).partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert b"retry-after: 5" in head.lower()
    return [head.split()[1].decode(), error["type"], error["code"]]


@pytest.mark.parametrize("path", [PATH, "/formats/txt"])
def test_a_body_that_never_ends_is_answered_at_the_stop(caplog: pytest.LogCaptureFixture, path: str) -> None:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Length: 90000"]
    lines += [f"Content-Type: multipart/form-data; boundary={BOUNDARY}", "", ""]
    with no_fault_logged(caplog), contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(1) as pool, serving(FakeModel(), LIMITS) as running:
            connection = stack.enter_context(running.raw("\r\n".join(lines).encode() + HEAD))
            wait_until(lambda: running.service.places.taken == 1)
            answer = pool.submit(told, connection)
            assert running.client.get("/health").status_code == 200
        assert answer.result() == STOPPING


def test_who_waits_for_a_decoder_that_hangs_is_answered_at_the_stop(caplog: pytest.LogCaptureFixture) -> None:
    body = HEAD + flac_bomb(3000) + TAIL
    with no_fault_logged(caplog), contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(1) as pool, serving(FakeModel(), LIMITS) as running:
            connection = stack.enter_context(running.raw(request(len(body)) + body))
            wait_until(lambda: len(children(running.service._unpacker)) == 1)
            os.kill(children(running.service._unpacker)[0], signal.SIGSTOP)
            answer = pool.submit(told, connection)
        assert answer.result() == STOPPING


@pytest.mark.parametrize("stream", ["false", "true"])
def test_who_waits_for_the_model_is_answered_at_the_stop(caplog: pytest.LogCaptureFixture, stream: str) -> None:
    model = FakeModel()
    model.gate.clear()
    body = field("stream", stream) + HEAD + SOUND + TAIL
    with no_fault_logged(caplog), contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(1) as pool, serving(model, LIMITS) as running:
            connection = stack.enter_context(running.raw(request(len(body)) + body))
            assert model.began.wait(30)
            found = pool.submit(lambda: b"".join(iter(lambda: connection.recv(1 << 16), b"")))
            running.server.should_exit = True
            running.thread.join(30)
            assert not running.thread.is_alive()
            assert not model.gate.is_set()  # it is at work still
        answer = found.result()
    assert answer.startswith(b"HTTP/1.1 200" if stream == "true" else b"HTTP/1.1 503")
    assert b'"code": "stopping"' in answer or b'"code":"stopping"' in answer


def test_who_does_not_read_his_answer_does_not_hold_up_the_stop(caplog: pytest.LogCaptureFixture) -> None:
    body = field("stream", "true") + HEAD + SOUND + TAIL
    serve = serving(FakeModel(), LIMITS, walk_much)
    with no_fault_logged(caplog), contextlib.ExitStack() as stack, serve as running:
        connection = stack.enter_context(listening(running, request(len(body)) + body, 1 << 12))
        assert connection.recv(4) == b"HTTP"


def test_a_request_is_refused_from_the_signal_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.Server, "handle_exit", lambda *_: None)  # which ends it a moment later
    with serving(FakeModel(), LIMITS) as running:
        running.server.handle_exit(signal.SIGTERM, None)
        answer = running.client.get("/health")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")


def test_a_machine_that_is_late_at_the_stop_tells_them_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = FakeModel()
    model.gate.clear()
    body = HEAD + SOUND + TAIL
    with no_fault_logged(caplog), contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(1) as pool, serving(model, LIMITS) as running:
            end_all = running.service.end_all

            def late() -> None:
                time.sleep(2.5)  # in the loop, past the time in which answers are taken in
                end_all()

            monkeypatch.setattr(running.service, "end_all", late)
            connection = stack.enter_context(running.raw(request(len(body)) + body))
            assert model.began.wait(30)
            answer = pool.submit(told, connection)
            running.server.should_exit = True
            running.thread.join(30)
        assert answer.result() == STOPPING

"""A server in a thread, a stand-in for the model, and sounds that say their number."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from typing import TYPE_CHECKING

import httpx
import numpy as np
import soundfile

from speechllm.data import audio
from speechllm.decode.result import NO_SPEECH, Recognized, Segment, Word
from speechllm.serve.app import create_app
from speechllm.serve.limits import Limits
from speechllm.serve.server import listen, make_server
from speechllm.serve.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from uvicorn import Server

    from speechllm.decode.hotwords import Hotwords
    from speechllm.decode.longform import Recognizer
    from speechllm.serve.queue import Ticket
    from speechllm.serve.service import Walk

RATE_HZ = audio.SAMPLE_RATE_HZ
PATH = "/v1/audio/transcriptions"
NUMBER_SCALE = 1 << 14
PART_S = 1.0


def numbered(number: int, duration_s: float = 0.2) -> NDArray[np.float32]:
    """Return a sound from which the stand-in reads `number`."""
    return np.full(round(duration_s * RATE_HZ), number / NUMBER_SCALE, np.float32)


def wav(wave: NDArray[np.float32], kind: str = "WAV", rate_hz: int = RATE_HZ) -> bytes:
    """Return the bytes of a sound file."""
    stream = io.BytesIO()
    soundfile.write(stream, wave, rate_hz, format=kind, subtype="PCM_16")
    return stream.getvalue()


class FakeModel:
    """Answers with the number in each sound, after `gate` is open; keeps what it was asked."""

    longest_s = joined_s = 30.0

    def __init__(self, *, seconds: float = 0.0, fails_at: int | None = None) -> None:
        """Take `seconds` for each batch; fail on batches with a certain number."""
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self.batches: list[list[int]] = []
        self.hotwords: list[Hotwords | None] = []
        self._seconds, self._fails_at = seconds, fails_at

    def recognize(
        self,
        waves_s: Sequence[NDArray[np.float32]],
        *,
        hotwords: Hotwords | None = None,
        beam: int | None = None,
        words: bool = True,
    ) -> list[Recognized]:
        """Return a text for each sound."""
        assert beam is None
        assert words
        numbers = [round(float(wave.mean()) * NUMBER_SCALE) for wave in waves_s]
        self.batches.append(numbers)
        self.hotwords.append(hotwords)
        self.began.set()
        assert self.gate.wait(30)
        time.sleep(self._seconds)
        if self._fails_at in numbers:
            raise RuntimeError(f"fails at {self._fails_at}")
        return [_said(number, len(wave) / RATE_HZ) for number, wave in zip(numbers, waves_s, strict=True)]

    @property
    def seen(self) -> list[int]:
        """Return the numbers that it was asked for."""
        return [number for batch in self.batches for number in batch]


def _said(number: int, duration_s: float) -> Recognized:
    if number == 0:
        return Recognized("", 1.0, flags=(NO_SPEECH,), no_speech=1.0)
    half_s = duration_s / 2
    words = (Word(f"{number}", 0.0, half_s, 0.95), Word("番", half_s, duration_s, 0.4))
    return Recognized(f"{number}番。", 0.8, words)


def walk_parts(ticket: Ticket, path: Path, hotwords: Hotwords | None) -> Iterator[Segment]:
    """Yield a segment for each second of a recording, one after another."""
    wave = audio.read(path)
    size = round(PART_S * RATE_HZ)
    for start in range(0, len(wave), size):
        part = wave[start : start + size]
        (found,) = ticket.recognize([part], hotwords=hotwords)
        start_s = start / RATE_HZ
        words = tuple(word.later(start_s) for word in found.words)
        yield Segment(start_s, start_s + len(part) / RATE_HZ, found.text, found.confidence, words, found.flags)


class Running:
    """A server that answers at `url`."""

    def __init__(self, service: Service, server: Server, thread: threading.Thread, port: int) -> None:
        """Name its parts."""
        self.service, self.server, self.thread, self.port = service, server, thread, port
        self.url = f"http://127.0.0.1:{port}"
        # one client, because each makes a TLS context; a connection a request, because the server ends idle ones
        bounds = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False, limits=bounds)

    def post(self, data: bytes, name: str = "a.wav", /, **fields: str | list[str]) -> httpx.Response:
        """Return the answer to a file."""
        return self.client.post(PATH, files={"file": (name, data)}, data=fields)

    def raw(self, data: bytes, timeout_s: float = 30) -> socket.socket:
        """Return a connection on which `data` was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout_s)
        connection.sendall(data)
        return connection

    def alive(self) -> bool:
        """Return whether it still answers a good request."""
        answer = self.post(wav(numbered(7)))
        return answer.status_code == 200 and answer.json() == {"text": "7番。"}

    def wait_free(self) -> None:
        """Wait until no request holds a place."""
        wait_until(lambda: self.service.places.taken == 0)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something holds; fail after half a minute."""
    ends_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends_at, "it never came"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(
    model: Recognizer, limits: Limits | None = None, walk: Walk = walk_parts, *, is_local: bool = False
) -> Iterator[Running]:
    """Run a server in a thread."""
    limits = limits or Limits(rate_per_min=0)
    service = Service(model, limits, name="mini", walk=walk)
    server = make_server(create_app(service, is_local=is_local), service)
    with contextlib.closing(service), listen("127.0.0.1", 0) as sock:
        service.start()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            running = Running(service, server, thread, sock.getsockname()[1])
            with running.client:
                yield running
        finally:
            if isinstance(model, FakeModel):
                model.gate.set()
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()

"""Random uploads: always an answer in OpenAI's shape, never a fault of ours, and the server lives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bombs import flac_bomb
from fuzzing import changed, often
from hypothesis import given
from hypothesis import strategies as st
from running import PATH, FakeModel, Running, numbered, serving, wav

from speechllm.serve.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

pytestmark = pytest.mark.slow

MOST_KIB = 300 << 10  # hypothesis, which keeps all that it has tried, is in the same process
REFUSED = {400, 404, 413, 415, 422}
SOUND = wav(numbered(3))
SEEDS = (SOUND, wav(numbered(3), "FLAC"), wav(numbered(3), "AIFF"), wav(numbered(3), "CAF"), flac_bomb(3, 1000))
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nmini\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    + SOUND
    + b"\r\n--b--\r\n"
)
REQUEST = (
    b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: a\r\nOrigin: http://a\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 3\r\n\r\n--b"
)
HEADERS = FORM.index(b"RIFF")


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(FakeModel(), Limits(rate_per_min=0, max_bytes=100_000, max_seconds=60, upload_s=5)) as running:
        assert running.alive()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew, see proc(5)
        before = peak_kib()
        yield running
        assert running.alive()
        running.wait_free()
        assert peak_kib() - before < MOST_KIB


def peak_kib() -> int:
    """Return the most memory that this process has held since its peak began anew."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def check(answer: httpx.Response) -> None:
    assert answer.status_code == 200 or answer.status_code in REFUSED, answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@often
@given(data=st.one_of([changed(seed, last=200) for seed in SEEDS] + [st.binary(max_size=300)]))
def test_changed_files(running: Running, data: bytes) -> None:
    check(running.post(data))


@often
@given(body=st.one_of(changed(FORM, last=HEADERS), st.binary(max_size=300)))
def test_changed_forms(running: Running, body: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    check(running.client.post(PATH, content=body, headers=headers))


@often
@given(
    fields=st.dictionaries(
        st.sampled_from(
            [
                "model",
                "language",
                "prompt",
                "response_format",
                "temperature",
                "stream",
                "timestamp_granularities[]",
                "x",
            ]
        ),
        st.text(max_size=60),
        max_size=4,
    )
)
def test_any_fields(running: Running, fields: dict[str, str]) -> None:
    check(running.post(SOUND, **fields))


@often
@given(request=st.one_of(st.binary(max_size=200), changed(REQUEST)))
def test_changed_requests(running: Running, request: bytes) -> None:
    with running.raw(request) as connection:
        connection.shutdown(1)
        answer = connection.recv(12)
    assert answer == b"" or (answer.startswith(b"HTTP/1.1 ") and not answer.startswith(b"HTTP/1.1 5"))

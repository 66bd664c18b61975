"""What is too large, too long, too slow or too much gets its status, and the server lives."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import openai
import pytest
import soundfile
from bombs import flac_bomb
from running import PATH, FakeModel, Running, numbered, serving, wait_until, wav

from speechllm.serve.limits import Limits

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from speechllm.serve.decoding import Unpacker

BOUNDARY = "xxboundaryxx"
HEAD = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'.encode()
TAIL = f"\r\n--{BOUNDARY}--\r\n".encode()
SHORT = wav(numbered(3))


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    limits = Limits(max_bytes=200_000, max_seconds=60, upload_s=1, headers_s=1, rate_per_min=0)
    with serving(FakeModel(), limits) as running:
        yield running


def request(length: int | None, *lines: str) -> bytes:
    """Return the headers of an upload."""
    size = [] if length is None else [f"Content-Length: {length}"]
    kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"
    return "\r\n".join([f"POST {PATH} HTTP/1.1", "Host: here", kind, *size, *lines, "", ""]).encode()


def status_of(connection: socket.socket) -> int:
    """Return the status that comes back; 0 if the connection ends without one."""
    line = connection.makefile("rb").readline()
    return int(line.split()[1]) if line else 0


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_hundred_at_once_each_get_their_own_text() -> None:
    model = FakeModel(seconds=0.02)
    with serving(model) as running, openai.OpenAI(base_url=running.url + "/v1", api_key="any", timeout=60) as client:

        def text(number: int) -> str:
            sound = wav(numbered(number, 0.1 + number % 7 / 2))
            return client.audio.transcriptions.create(file=("a.wav", sound), model="mini").text

        with ThreadPoolExecutor(100) as pool:
            texts = list(pool.map(text, range(1, 101)))
        parts = [
            1 + (0.1 + number % 7 / 2 > 1) + (0.1 + number % 7 / 2 > 2) + (0.1 + number % 7 / 2 > 3)
            for number in range(1, 101)
        ]
        assert texts == [f"{number}番。" * count for number, count in zip(range(1, 101), parts, strict=True)]
        running.wait_free()
    assert max(map(len, model.batches)) > 1
    assert len(model.seen) == sum(parts)


def test_a_body_that_says_it_is_too_large_is_not_read(running: Running) -> None:
    with running.raw(request(10**9, "Expect: 100-continue")) as connection:
        assert status_of(connection) == 413
    assert code_of(running.post(bytes(300_000))) == (413, "request_too_large")
    with openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError, match="larger than 200000 bytes") as refused:
            client.audio.transcriptions.create(file=("a.wav", bytes(30_000_000)), model="mini")
        assert refused.value.status_code == 413
    assert running.alive()


def test_a_body_without_a_length_is_counted(running: Running) -> None:
    def chunks() -> Iterator[bytes]:
        yield HEAD
        for _ in range(40):
            yield bytes(10_000)

    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    answer = httpx.post(running.url + PATH, content=chunks(), headers=headers)
    assert code_of(answer) == (413, "request_too_large")
    assert running.alive()


def test_a_body_longer_than_it_says_is_cut_there(running: Running) -> None:
    body = HEAD + SHORT + TAIL
    with running.raw(request(len(body)) + body + b"\0" * 100_000) as connection:
        assert status_of(connection) == 200
    with running.raw(request(len(HEAD) + 20) + body) as connection:
        assert status_of(connection) == 400
    assert running.alive()


def test_a_body_shorter_than_it_says_is_not_waited_for(running: Running) -> None:
    with running.raw(request(len(HEAD) + 5000) + HEAD + SHORT[:100]) as connection:
        assert status_of(connection) == 408
    assert running.alive()


@pytest.mark.parametrize("lengths", [["-5"], ["9" * 30], ["ten"], ["5", "6"]])
def test_a_length_that_is_none_is_refused(running: Running, lengths: list[str]) -> None:
    lines = [f"Content-Length: {length}" for length in lengths]
    with running.raw(request(None, *lines) + HEAD) as connection:
        assert status_of(connection) in {400, 413}
    assert running.alive()


def test_a_slow_body_has_its_time(running: Running) -> None:
    with running.raw(request(5000) + HEAD) as connection:
        began = threading.Thread(target=drip, args=(connection,))
        began.start()
        assert status_of(connection) == 408
        began.join(30)
    running.wait_free()
    assert running.alive()


def drip(connection: socket.socket) -> None:
    """Send a byte now and then, until the other side has enough."""
    with contextlib.suppress(OSError):
        send_on(connection)


def send_on(connection: socket.socket) -> None:
    for _ in range(300):
        connection.sendall(b"x")
        time.sleep(0.1)


def test_headers_that_never_end_have_their_time(running: Running) -> None:
    for begin in (b"", b"GET / HTTP/1.1\r\nX-A: "):
        with running.raw(begin) as connection:
            began = threading.Thread(target=drip, args=(connection,))
            began.start()
            with contextlib.suppress(ConnectionResetError):
                assert status_of(connection) in {0, 400}
            began.join(30)
    assert running.alive()


def test_a_body_that_goes_on_after_its_refusal_has_its_time(running: Running) -> None:
    with running.raw(request(10**9)) as connection:
        assert status_of(connection) == 413
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            send_on(connection)


def test_headers_that_are_too_large_are_refused(running: Running) -> None:
    with running.raw(b"GET / HTTP/1.1\r\nHost: here\r\nX-A: " + b"a" * 200_000) as connection:
        assert status_of(connection) == 400
    assert running.alive()


def test_a_bomb_is_refused_by_its_header(running: Running) -> None:
    bomb = flac_bomb(1602)
    assert len(bomb) < 56_000
    assert code_of(running.post(bomb)) == (413, "recording_too_long")


def test_a_bomb_that_hides_its_length_is_refused(running: Running) -> None:
    assert code_of(running.post(flac_bomb(1602, claimed_samples=0))) == (413, "recording_too_long")
    assert written(running) == 0
    assert running.alive()


def test_a_bomb_that_lies_about_its_length_is_unpacked_as_far_as_it_says(running: Running) -> None:
    answer = running.post(flac_bomb(1602, claimed_samples=16_000), response_format="verbose_json")
    assert (answer.status_code, answer.json()["duration"]) == (200, 1.0)
    assert written(running) == 0


def written(running: Running) -> int:
    """Return the bytes that requests have left on the disk."""
    running.wait_free()
    return sum(path.stat().st_size for path in Path(running.service._folder.name).rglob("*") if path.is_file())


def test_a_sound_of_many_channels_may_not_unpack_to_more_than_it_may() -> None:
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros((16_000, 8), np.int16), 16_000, format="FLAC", subtype="PCM_16")
    with serving(FakeModel(), Limits(max_decoded_bytes=500_000)) as running:
        answer = running.post(stream.getvalue())
    assert code_of(answer) == (413, "recording_too_long")
    assert "unpacks to more than 500000 bytes" in answer.text


def test_a_file_that_holds_the_decoder_up_is_given_up_and_its_process_killed() -> None:
    limits = Limits(max_seconds=14_000, decode_s=3, rate_per_min=0)
    with serving(FakeModel(), limits) as running, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(running.post, flac_bomb(3000))
        wait_until(lambda: len(children(running.service._unpacker)) == 1)
        (pid,) = children(running.service._unpacker)
        os.kill(pid, signal.SIGSTOP)  # from here on it hangs
        assert code_of(answer.result()) == (422, "broken_file")
        assert "took longer than 3 s to decode" in answer.result().text
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
        assert running.alive()


def children(unpacker: Unpacker) -> list[int]:
    """Return the processes that unpack now."""
    assert unpacker._process
    pid = unpacker._process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_decoder_process_that_was_killed_comes_back(running: Running) -> None:
    assert running.alive()
    process = running.service._unpacker._process
    assert process
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    assert running.alive()


def test_no_memory_for_a_decoder_is_the_files_fault() -> None:
    with serving(FakeModel(), Limits(decode_memory_bytes=0)) as running:
        assert code_of(running.post(wav(numbered(3, 20)))) == (422, "broken_file")


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"<!DOCTYPE html><title>a.wav</title>", 415, "not a sound that can be read: send WAV"),
        (b"\x1aE\xdf\xa3webm", 415, "not a sound that can be read"),
        (SHORT[:2000], 422, "is cut short: 1956 of 6400 bytes are there"),
        (SHORT[:44], 422, "is cut short"),
        (wav(np.zeros(0, np.float32)), 422, "holds no samples"),
        (b"RIFF" + os.urandom(500), 422, "is not audio that libsndfile reads"),
        (b"fLaC" + bytes(500), 422, "is not audio that libsndfile reads"),
        (wav(numbered(3), rate_hz=655_350), 422, "has a sample rate of 655350 Hz"),
        (wav(numbered(3, 61)), 413, "larger than 200000 bytes"),
        (wav(np.zeros(61 * 16_000, np.float32), "FLAC"), 413, "is longer than 60 s"),
    ],
)
def test_files_that_are_no_sound_or_a_broken_one(running: Running, data: bytes, status: int, message: str) -> None:
    answer = running.post(data)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text


def test_samples_that_are_no_numbers_are_refused(running: Running) -> None:
    stream = io.BytesIO()
    soundfile.write(stream, np.array([0.1, np.nan], np.float32), 16_000, format="WAV", subtype="FLOAT")
    answer = running.post(stream.getvalue())
    assert code_of(answer) == (422, "broken_file")
    assert "NaN or infinite" in answer.text


def test_a_flood_from_one_address_is_slowed_down() -> None:
    with serving(FakeModel(), Limits(rate_per_min=5)) as running:
        answers = [running.post(SHORT) for _ in range(8)]
    assert [answer.status_code for answer in answers[:5]] == [200] * 5
    assert 429 in {answer.status_code for answer in answers[5:]}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 12


def test_more_requests_than_places_are_told_to_come_again() -> None:
    model = FakeModel()
    model.gate.clear()
    with serving(model, Limits(max_queue=4, rate_per_min=0)) as running, ThreadPoolExecutor(3) as pool:
        held = [pool.submit(running.post, SHORT) for _ in range(3)]
        wait_until(lambda: running.service.places.taken == 3)
        refused = running.post(SHORT)
        assert code_of(refused) == (429, "too_many_requests")
        assert refused.headers["retry-after"] == "5"
        model.gate.set()
        assert [one.result().json() for one in held] == [{"text": "3番。"}] * 3
        running.wait_free()
        assert running.alive()


@pytest.mark.parametrize("stream", ["false", "true"])
def test_who_leaves_frees_the_place_and_the_line(stream: str) -> None:
    model = FakeModel()
    model.gate.clear()
    with serving(model, Limits(max_queue=4, rate_per_min=0)) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.post, SHORT)
        assert model.began.wait(30)
        option = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="stream"\r\n\r\n{stream}\r\n'.encode()
        body = option + HEAD + wav(numbered(4, 5)) + TAIL
        leaving = running.raw(request(len(body)) + body)
        wait_until(lambda: running.service.batches.waiting == 1)
        leaving.close()
        wait_until(lambda: running.service.places.taken == 1)
        assert running.service.batches.waiting == 0
        model.gate.set()
        assert first.result().json() == {"text": "3番。"}
        assert 4 not in model.seen
        assert written(running) == 0


def test_who_leaves_while_sending_leaves_nothing(running: Running) -> None:
    connection = running.raw(request(100_000) + HEAD + SHORT)
    wait_until(lambda: running.service.places.taken == 1)
    connection.close()
    assert written(running) == 0
    assert running.alive()


def test_who_leaves_while_his_file_is_unpacked_kills_its_process() -> None:
    with serving(FakeModel(), Limits(max_seconds=14_000, rate_per_min=0)) as running:
        assert running.alive()
        body = HEAD + flac_bomb(3000) + TAIL
        connection = running.raw(request(len(body)) + body)
        wait_until(lambda: len(children(running.service._unpacker)) == 1)
        connection.close()
        wait_until(lambda: not children(running.service._unpacker))
        assert written(running) == 0


def test_a_text_that_takes_too_long_is_given_up() -> None:
    model = FakeModel()
    model.gate.clear()
    with serving(model, Limits(timeout_s=0.5, rate_per_min=0)) as running:
        assert code_of(running.post(SHORT)) == (503, "timeout")
        late = running.post(SHORT, stream="true")
        assert '"code": "timeout"' in late.text
        running.wait_free()
        model.gate.set()
        assert running.alive()


def test_a_fault_of_the_model_is_ours_and_shows_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with serving(FakeModel(fails_at=6)) as running:
        answer = running.post(wav(numbered(6)))
        assert code_of(answer) == (500, "failed")
        assert "fails at" not in answer.text
        assert running.alive()
    assert "event=segment_failed" in caplog.text


def test_a_stopping_server_ends_those_who_wait() -> None:
    model = FakeModel()
    model.gate.clear()
    with serving(model, Limits(rate_per_min=0)) as running, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(running.post, SHORT)
        assert model.began.wait(30)
        running.service.check_open()
        running.service.batches.close()
        model.gate.set()
        assert waiting.result().status_code in {200, 503}
        assert code_of(running.post(SHORT)) == (503, "stopping")

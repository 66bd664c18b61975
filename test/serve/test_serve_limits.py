"""What is too large, too long, too slow or too much gets its status, and the server lives."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import resource
import signal
import socket
import subprocess
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

from speechllm.data import audio, streaming
from speechllm.decode.result import Segment
from speechllm.serve import unpacker
from speechllm.serve.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from speechllm.decode.hotwords import Hotwords
    from speechllm.serve.decoding import Unpacker
    from speechllm.serve.queue import Ticket

pytestmark = pytest.mark.slow

BOUNDARY = "xxboundaryxx"
HEAD = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'.encode()
TAIL = f"\r\n--{BOUNDARY}--\r\n".encode()
SHORT = wav(numbered(3))


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(FakeModel(), Limits(max_bytes=200_000, max_seconds=60, rate_per_min=0)) as running:
        yield running


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    """Return a server whose patience tests run out; good requests go to the other one."""
    with serving(FakeModel(), Limits(upload_s=1, headers_s=1, rate_per_min=0)) as running:
        yield running


def request(length: int | None, *lines: str) -> bytes:
    """Return the headers of an upload."""
    size = [] if length is None else [f"Content-Length: {length}"]
    kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"
    return "\r\n".join([f"POST {PATH} HTTP/1.1", "Host: localhost", kind, *size, *lines, "", ""]).encode()


def field(name: str, value: str) -> bytes:
    """Return a field of a form."""
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


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


def test_a_body_shorter_than_it_says_is_not_waited_for(hasty: Running) -> None:
    with hasty.raw(request(len(HEAD) + 5000) + HEAD + SHORT[:100]) as connection:
        assert status_of(connection) == 408


@pytest.mark.parametrize("lengths", [["-5"], ["9" * 30], ["ten"], ["5", "6"]])
def test_a_length_that_is_none_is_refused(running: Running, lengths: list[str]) -> None:
    lines = [f"Content-Length: {length}" for length in lengths]
    with running.raw(request(None, *lines) + HEAD) as connection:
        assert status_of(connection) in {400, 413}
    assert running.alive()


def test_a_slow_body_has_its_time(hasty: Running) -> None:
    with hasty.raw(request(5000) + HEAD) as connection:
        began = threading.Thread(target=drip, args=(connection,))
        began.start()
        assert status_of(connection) == 408
        began.join(30)
    hasty.wait_free()


def drip(connection: socket.socket) -> None:
    """Send a byte now and then, until the other side has enough."""
    with contextlib.suppress(OSError):
        send_on(connection)


def send_on(connection: socket.socket) -> None:
    for _ in range(300):
        connection.sendall(b"x")
        time.sleep(0.1)


def test_headers_that_never_end_have_their_time(hasty: Running) -> None:
    for begin in (b"", b"GET / HTTP/1.1\r\nX-A: "):
        with hasty.raw(begin) as connection:
            began = threading.Thread(target=drip, args=(connection,))
            began.start()
            with contextlib.suppress(ConnectionResetError):
                assert status_of(connection) in {0, 400}
            began.join(30)


def test_a_body_that_goes_on_after_its_refusal_has_its_time(hasty: Running) -> None:
    with hasty.raw(request(10**9)) as connection:
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
    return sum(path.stat().st_size for path in running.service._scratch.path.rglob("*") if path.is_file())


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
        running.service._unpacker._limits = Limits()
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


def test_a_decoder_that_crashes_is_told_while_another_runs() -> None:
    limits = Limits(max_seconds=14_000, rate_per_min=0)
    with serving(FakeModel(), limits) as running, ThreadPoolExecutor(2) as pool:
        answers, pids = [], list[int]()
        for number in (1, 2):
            answers.append(pool.submit(running.post, flac_bomb(3000)))
            wait_until(lambda number=number: len(children(running.service._unpacker)) == number)  # type: ignore[misc]
            pids += [pid for pid in children(running.service._unpacker) if pid not in pids]
            os.kill(pids[-1], signal.SIGSTOP)
        os.kill(pids[0], signal.SIGKILL)
        assert code_of(answers[0].result()) == (422, "broken_file")
        assert "made its decoder fail" in answers[0].result().text
        assert not answers[1].done()
        os.kill(pids[1], signal.SIGKILL)
        assert "made its decoder fail" in answers[1].result().text
        assert running.alive()


def test_the_end_of_a_decoder_is_told_while_a_sibling_holds_a_copy_of_its_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs.dup():  # as a sibling has one that was forked a moment ago
        process = subprocess.Popen(["sleep", "60"])
        unpacker._Running(process.pid, os.pidfd_open(process.pid), theirs).end()
        process.wait()
        ours.settimeout(10)
        assert ours.recv(1) == b""


def fill_disk(running: Running) -> None:
    """Let the next files be written to a device that is always full."""
    job = running.service._unpacker._job
    running.service._unpacker._job = lambda *paths: dataclasses.replace(job(*paths), target="/dev/full")  # type: ignore[method-assign]


def fill_disk_soon(running: Running) -> None:
    """Let the next files be written so far and no further."""
    process = running.service._unpacker._process
    assert process
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))


@pytest.mark.parametrize("fill", [fill_disk, fill_disk_soon])
def test_no_room_for_what_is_unpacked_is_not_the_files_fault(fill: Callable[[Running], None]) -> None:
    sound = wav(np.zeros(20 * 16_000, np.float32), "FLAC")
    with serving(FakeModel(), Limits(rate_per_min=0)) as running:
        assert running.post(sound).status_code == 200
        fill(running)
        answer = running.post(sound)
        assert code_of(answer) == (503, "no_room")
        assert answer.headers["retry-after"] == "5"
        broken = running.post(b"fLaC" + bytes(500))
        assert code_of(broken) == (422, "broken_file")
        assert written(running) == 0


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
        (b"RIFF" + np.random.default_rng(7).bytes(500), 422, "is not audio that libsndfile reads"),
        (b"fLaC" + bytes(500), 422, "is not audio that libsndfile reads"),
        (wav(numbered(3), rate_hz=655_350), 422, "has a sample rate of 655350 Hz"),
        (wav(numbered(3, 61)), 413, "larger than 200000 bytes"),
        (wav(np.zeros(61 * 16_000, np.float32), "FLAC"), 413, "is longer than 60 s"),
    ],
)
def test_files_that_are_no_sound_or_a_broken_one(running: Running, data: bytes, status: int, message: str) -> None:
    answer = running.post(data)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text


def mp3(wave: NDArray[np.float32], rate_hz: int = audio.SAMPLE_RATE_HZ) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, wave, rate_hz, format="MP3")
    return stream.getvalue()


@pytest.mark.parametrize("seconds", [1, 3, 20])
def test_an_mp3_that_is_cut_is_told_and_no_speech_made_up(running: Running, seconds: int) -> None:
    """A block that ends early must not keep what the block before held."""
    whole = mp3(np.random.default_rng(7).normal(0, 0.1, seconds * 16_000).astype(np.float32))
    assert running.post(whole).status_code == 200
    answer = running.post(whole[: len(whole) * 55 // 100])
    assert code_of(answer) == (422, "broken_file")
    assert "is cut short" in answer.text


@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
def test_an_mp3_unpacks_to_the_samples_that_are_read_elsewhere(tmp_path: Path, rate_hz: int) -> None:
    source, target = tmp_path / "a.mp3", tmp_path / "plain.wav"
    wave = np.random.default_rng(7).normal(0, 0.1, 9 * rate_hz).astype(np.float32)
    source.write_bytes(mp3(wave, rate_hz))
    assert unpacker._copy(unpacker.Job(str(source), str(target), 60, 10**9, 1 << 29, 60)) == 9.0
    unpacked, read = audio.read(target), np.concatenate(list(streaming.blocks(source)))
    assert np.abs(unpacked - audio.read(source)).max() < 1e-6
    assert len(unpacked) == len(read)
    assert np.abs(unpacked - read).max() < 1e-5


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
        body = field("stream", stream) + HEAD + wav(numbered(4, 5)) + TAIL
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
    with serving(model, Limits(timeout_s=2, rate_per_min=0)) as running:
        assert code_of(running.post(SHORT)) == (503, "timeout")
        late = running.post(SHORT, stream="true")
        assert '"code": "timeout"' in late.text
        running.wait_free()
        model.gate.set()
        running.service.limits = Limits(rate_per_min=0)
        assert running.alive()


@pytest.mark.parametrize("stream", ["false", "true"])
def test_the_time_for_a_text_runs_while_its_file_waits_for_a_decoder(stream: str) -> None:
    with serving(FakeModel(), Limits(decoders=0, timeout_s=0.5)) as running:
        assert code_of(running.post(SHORT, stream=stream)) == (503, "timeout")
        assert written(running) == 0


def walk_much(ticket: Ticket, path: Path, hotwords: Hotwords | None) -> Iterator[Segment]:
    """Yield more text than the buffers between a server and its client hold."""
    (found,) = ticket.recognize([audio.read(path)], hotwords=hotwords)
    for number in range(12):
        yield Segment(number, number + 1, found.text + "x" * 2_000_000, found.confidence)


def listening(running: Running, data: bytes, buffer_bytes: int) -> socket.socket:
    """Return a connection of which the system takes in no more than `buffer_bytes` unread, on which `data` was sent."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", running.port))
    connection.sendall(data)
    return connection


def test_who_does_not_read_his_events_has_his_time() -> None:
    body = field("stream", "true") + HEAD + SHORT + TAIL
    with serving(FakeModel(), Limits(timeout_s=3, rate_per_min=0), walk_much) as running:
        with listening(running, request(len(body)) + body, 1 << 12) as connection:
            assert connection.recv(1, socket.MSG_PEEK)
            running.wait_free()
            found = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert found.startswith(b"HTTP/1.1 200")
        assert found.endswith(b"x")  # the connection was ended at once, not when all was read
        assert written(running) == 0


def test_a_large_answer_reaches_a_client_that_takes_it_in_slowly() -> None:
    body = HEAD + SHORT + TAIL
    serve = serving(FakeModel(), Limits(headers_s=1, rate_per_min=0), walk_much)
    with serve as running, listening(running, request(len(body), "Connection: close") + body, 1 << 18) as connection:
        found = bytearray()
        while some := connection.recv(1 << 20, socket.MSG_WAITALL):
            found += some
            time.sleep(0.1)
    head, _, text = bytes(found).partition(b"\r\n\r\n")
    assert f"content-length: {len(text)}".encode() in head.lower()
    assert len(text) > 24_000_000


def test_a_large_answer_does_not_wait_for_a_client_that_takes_nothing_in() -> None:
    body = HEAD + SHORT + TAIL
    serve = serving(FakeModel(), Limits(headers_s=0.5, rate_per_min=0), walk_much)
    with serve as running, listening(running, request(len(body)) + body, 1 << 12) as connection:
        assert connection.recv(1, socket.MSG_PEEK)
        wait_until(lambda: not running.server.server_state.connections)
        found = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    assert 0 < len(found) < 24_000_000


def test_a_request_right_behind_another_has_its_own_time() -> None:
    model = FakeModel()
    model.gate.clear()
    body = HEAD + SHORT + TAIL
    with serving(model, Limits(headers_s=0.3, rate_per_min=0)) as running:
        both = b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n" + request(len(body), "Connection: close") + body
        with running.raw(both) as connection:
            assert model.began.wait(30)
            time.sleep(1)  # longer than a connection may be idle
            model.gate.set()
            found = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert found.count(b"HTTP/1.1 200 OK") == 2
    assert found.endswith('{"text":"3番。"}'.encode())


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

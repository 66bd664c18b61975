"""The end points: OpenAI's own client, every format, every option, errors in OpenAI's shape."""

from __future__ import annotations

import io
import json
import signal
import socket
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from pydantic import ValidationError
from running import PATH, FakeModel, Running, numbered, serving, wav

from speechllm.cli import run
from speechllm.decode import formats
from speechllm.errors import ConfigError
from speechllm.serve import server
from speechllm.serve.corrected import MAX_BYTES, MAX_SEGMENTS, MAX_WORDS, parse
from speechllm.serve.limits import ApiError, Limits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from speechllm.decode.result import Transcript

TWO = wav(numbered(5, 1.5))
STOPPING = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(FakeModel()) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def test_the_openai_client_gets_the_text(client: openai.OpenAI) -> None:
    assert client.audio.transcriptions.create(file=("a.wav", TWO), model="mini").text == "5番。5番。"


def test_the_openai_client_gets_words_and_segments_with_times(client: openai.OpenAI) -> None:
    found = client.audio.transcriptions.create(
        file=("a.wav", TWO),
        model="whisper-1",
        language="ja",
        temperature=0,
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )
    assert (found.language, found.duration, found.text) == ("japanese", 1.5, "5番。5番。")
    assert found.segments
    assert [(one.id, one.start, one.end, one.text) for one in found.segments] == [
        (0, 0.0, 1.0, "5番。"),
        (1, 1.0, 1.5, "5番。"),
    ]
    assert found.words
    assert [(word.word, word.start, word.end) for word in found.words][2:] == [("5", 1.0, 1.25), ("番", 1.25, 1.5)]


def test_the_openai_client_gets_the_parts_as_they_come(client: openai.OpenAI) -> None:
    events = list(client.audio.transcriptions.create(file=("a.wav", TWO), model="mini", stream=True))
    assert [event.type for event in events] == ["transcript.text.delta"] * 2 + ["transcript.text.done"]
    assert [event.delta for event in events if event.type == "transcript.text.delta"] == ["5番。", "5番。"]
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == "5番。5番。"


def test_the_openai_client_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mini"]
    assert client.models.retrieve("mini").owned_by == "speechllm"
    with pytest.raises(openai.NotFoundError, match="This server has the model 'mini'"):
        client.models.retrieve("other")


def test_the_openai_client_understands_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.audio.transcriptions.create(file=("a.wav", TWO), model="other")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.APIStatusError) as wrong:
        client.audio.transcriptions.create(file=("a.wav", b"<html>"), model="mini")
    assert (wrong.value.status_code, wrong.value.code, wrong.value.type) == (
        415,
        "unsupported_format",
        "invalid_request_error",
    )


def test_subtitles_and_plain_text(running: Running) -> None:
    assert running.post(TWO, response_format="text").text == "5番。5番。\n"
    srt = running.post(TWO, response_format="srt")
    assert srt.text.startswith("1\n00:00:00,000 --> 00:00:01,000\n5番。\n\n2\n")
    assert srt.headers["content-type"] == "application/x-subrip; charset=utf-8"
    assert running.post(TWO, response_format="vtt").text.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n5番。\n")


def test_words_are_left_out_of_verbose_json_unless_asked_for(running: Running) -> None:
    answer = running.post(TWO, response_format="verbose_json").json()
    assert "words" not in answer
    assert answer["segments"][0] | {"confidence": 0.8, "flags": [], "avg_logprob": -0.2231} == answer["segments"][0]
    words = running.post(TWO, response_format="verbose_json", **{"timestamp_granularities[]": "word"}).json()
    assert "segments" not in words
    assert words["words"][1] == {"word": "番", "start": 0.5, "end": 1.0, "confidence": 0.4}


def test_a_silent_recording_has_an_empty_text_and_its_flag(running: Running) -> None:
    answer = running.post(wav(numbered(0)), response_format="verbose_json").json()
    assert answer["text"] == ""
    assert answer["segments"][0]["flags"] == ["no_speech"]
    assert answer["segments"][0]["no_speech_prob"] == 1.0


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "AIFF", "CAF", "AU", "MP3"])
def test_the_kind_of_a_file_is_seen_in_it_and_not_in_its_name(running: Running, kind: str) -> None:
    subtype = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(kind, "PCM_16")
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, numbered(0, 0.5), 16_000, format=kind, subtype=subtype)
    answer = running.post(stream.getvalue(), "page.html")
    assert (answer.status_code, answer.text) == (200, '{"text":""}')


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"response_format": "xml"}, 400, "response_format", "must be json, text, srt, vtt, verbose_json."),
        ({"language": "fr"}, 400, "language", "'language' must be ja."),
        ({"temperature": "2"}, 400, "temperature", "must be a number from 0 to 1"),
        ({"temperature": "nan"}, 400, "temperature", "must be a number from 0 to 1"),
        ({"temperature": "warm"}, 400, "temperature", "must be a number from 0 to 1"),
        ({"timestamp_granularities[]": "line"}, 400, "timestamp_granularities[]", "must be word, segment."),
        ({"stream": "yes"}, 400, "stream", "must be false, true."),
        ({"model": ["mini", "mini"]}, 400, "model", "was given 2 times"),
        ({"model": "gpt-5"}, 404, "model", "has the model 'mini'"),
        ({"prompt": "あ" * 41}, 400, "prompt", "longer than 40 characters"),
        ({"prompt": " ".join(map(str, range(201)))}, 400, "prompt", "more than 200 words"),
        ({"prompt": "x" * 70_000}, 400, "prompt", "longer than 65536 bytes"),
    ],
)
def test_wrong_fields_are_named(
    running: Running, fields: dict[str, str | list[str]], status: int, param: str, message: str
) -> None:
    answer = running.post(TWO, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert message in error["message"]


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        ("application/json", b"{}", 415, "not_a_form"),
        ("multipart/form-data", b"", 415, "not_a_form"),
        ("multipart/form-data; boundary=x", b"", 400, "invalid_form"),
        ("multipart/form-data; boundary=x", b"--y\r\n", 400, "invalid_form"),
        ("multipart/form-data; boundary=x", b"--x\r\nno header\r\n\r\n--x--\r\n", 400, "invalid_form"),
        ("multipart/form-data; boundary=" + "x" * 300, b"", 400, "invalid_form"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\na\r\n" * 33 + b"--x--\r\n", 400, "invalid_form"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nmini\r\n--x--\r\n',
            400,
            "missing_file",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\r\n--x--\r\n',
            400,
            "missing_file",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="m"\r\n\r\n\xff\r\n--x--\r\n',
            400,
            None,
        ),
    ],
)
def test_what_is_no_form_is_refused(
    running: Running, content_type: str, body: bytes, status: int, code: str | None
) -> None:
    answer = httpx.post(running.url + PATH, content=body, headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_the_words_of_a_prompt_reach_the_model(running: Running) -> None:
    model = running.service.batches._recognizer
    assert isinstance(model, FakeModel)
    running.post(TWO, prompt="東京 大阪\n京都\tキョート\n東京")
    hotwords = model.hotwords[-1]
    assert hotwords
    assert [(word.surface, word.reading) for word in hotwords.words][0::2] == [
        ("東京", "トーキョー"),
        ("京都", "キョート"),
    ]
    running.post(TWO, prompt=" \n ")
    assert model.hotwords[-1] is None


def test_health_models_and_unknown_paths(running: Running) -> None:
    health = httpx.get(running.url + "/health").json()
    assert health == {"status": "ok", "model": "mini", "requests": 0, "segments_waiting": 0}
    asked = httpx.head(running.url + "/health")  # as load balancers do
    assert (asked.status_code, asked.content) == (200, b"")
    for answer, status in ((httpx.get(running.url + "/nix"), 404), (httpx.get(running.url + PATH), 405)):
        assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})


def test_pages_of_other_sites_are_refused(running: Running) -> None:
    files = {"file": ("a.wav", TWO)}
    other = httpx.post(running.url + PATH, files=files, headers={"Origin": "https://example.org"})
    assert (other.status_code, other.json()["error"]["code"]) == (403, "other_origin")
    assert httpx.post(running.url + PATH, files=files, headers={"Origin": running.url}).status_code == 200


@pytest.mark.parametrize("origin", ["null", "", "http://[", "http://[::1]x", "//"])
@pytest.mark.parametrize("path", [PATH, "/formats/txt"])
def test_an_origin_that_is_no_address_is_another_site(running: Running, origin: str, path: str) -> None:
    answer = httpx.post(running.url + path, json=CORRECTED, headers={"Origin": origin})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "other_origin")


def test_the_page_takes_nothing_from_the_network(running: Running) -> None:
    for path in ("/", "/page.js", "/page.css"):
        answer = httpx.get(running.url + path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http:" not in answer.text
        assert "https:" not in answer.text


def test_a_taken_port_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "--model", str(tmp_path), "--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"error: 127.0.0.1:{port}: cannot listen (")


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_a_host_that_is_none_is_one_line(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--host", host, "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {host}:0: cannot listen (")


def test_a_server_that_cannot_unpack_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = SimpleNamespace(from_pretrained=lambda _: FakeModel())
    monkeypatch.setitem(sys.modules, "speechllm.recognizer", SimpleNamespace(SpeechLLM=model))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    threads = set(threading.enumerate())
    handlers = [signal.signal(number, signal.SIG_IGN) for number in STOPPING]
    try:
        status = run(["serve", "--model", str(tmp_path), "--port", "0"])
        after = [signal.getsignal(number) for number in STOPPING]
    finally:
        for number, handler in zip(STOPPING, handlers, strict=True):
            signal.signal(number, handler)
    lines = [line for line in capsys.readouterr().err.splitlines() if "event=" not in line]
    assert (status, lines) == (
        1,
        ["error: system: the process that unpacks files did not start; mend it and run again"],
    )
    assert after == [signal.SIG_IGN] * 2
    assert list(tmp_path.iterdir()) == []
    assert set(threading.enumerate()) <= threads


def test_a_folder_without_a_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--model", str(tmp_path / "none"), "--port", "0"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert str(tmp_path / "none") in line


def test_missing_packages_are_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fastapi", None)
    with pytest.raises(ConfigError, match=r"serve: the package fastapi is not installed; pip install -e '\.\[serve\]'"):
        server.check_packages()


def test_answers_are_utf8_json(running: Running) -> None:
    answer = running.post(TWO)
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.content.decode("utf-8")) == {"text": "5番。5番。"}


CORRECTED = {"duration": 2, "segments": [{"text": "<はい>", "start": 0, "end": 2, "confidence": 1, "corrected": True}]}


def test_a_corrected_transcript_is_saved_as_transcribe_writes_it(running: Running) -> None:
    texts = {
        kind: running.client.post(f"/formats/{kind}", json=CORRECTED).text for kind in ("txt", "srt", "vtt", "json")
    }
    assert texts["txt"] == "<はい>\n"
    assert texts["srt"] == "1\n00:00:00,000 --> 00:00:02,000\n<はい>\n"
    assert texts["vtt"] == "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\n&lt;はい&gt;\n"
    assert json.loads(texts["json"])["segments"][0]["flags"] == ["corrected"]


PART = [{"text": "", "start": 0, "end": 0, "confidence": 1}]
WORD = {"word": "東雲", "start": 3599.123, "end": 3599.456, "confidence": 0.987}


def worded(*words: dict[str, object]) -> dict[str, object]:
    """Return a transcript of one segment."""
    return {"duration": 3600, "segments": [PART[0] | {"words": words}]}


def test_an_hour_of_fast_speech_fits_into_a_transcript(running: Running) -> None:
    """Ten words a second, in parts of five seconds."""
    words = [WORD] * 50
    part = {"text": "東雲" * 50, "start": 3595.123, "end": 3599.456, "confidence": 0.987, "words": words, "flags": []}
    data = json.dumps({"duration": 3600, "segments": [part] * 720}, ensure_ascii=False).encode()
    answer = running.client.post("/formats/txt", content=data)
    assert (answer.status_code, len(answer.text)) == (200, 720 * 101)


@pytest.mark.parametrize(
    "segments", [[{}, {}], [PART[0] | {"words": [{}, {}]}, {}], [PART[0] | {"flags": ["A", "B"]}, {}]]
)
def test_the_first_fault_of_a_transcript_is_looked_for_and_no_other(segments: list[dict[str, object]]) -> None:
    with pytest.raises(ApiError) as refused:
        parse(json.dumps({"duration": 1, "segments": segments}).encode())
    assert isinstance(refused.value.__cause__, ValidationError)
    faults = [error["loc"] for error in refused.value.__cause__.errors()]
    assert not [place for place in faults if 1 in place]
    assert faults


def test_saving_has_a_rate_and_takes_a_place() -> None:
    model = FakeModel()
    model.gate.clear()
    with serving(model, Limits(rate_per_min=3, max_queue=1)) as running, ThreadPoolExecutor(1) as pool:
        running.service.rates.clock = lambda: 0.0
        held = pool.submit(running.post, TWO)
        assert model.began.wait(30)
        answers = [running.client.post("/formats/txt", json=CORRECTED) for _ in range(3)]
        model.gate.set()
        assert held.result().status_code == 200
    codes = [(answer.status_code, answer.json()["error"]["code"]) for answer in answers]
    assert codes == [(429, "queue_full")] * 2 + [(429, "rate_limit_exceeded")]


def test_saving_holds_nobody_up(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slow(_: Transcript) -> str:
        began.set()
        return f"{go_on.wait(30)}"

    monkeypatch.setitem(formats.FORMATS, "txt", slow)
    with ThreadPoolExecutor(1) as pool:
        saved = pool.submit(running.client.post, "/formats/txt", json=CORRECTED)
        assert began.wait(30)
        assert running.client.get("/health").json()["requests"] == 1
        go_on.set()
        assert saved.result().text == "True"


@pytest.mark.parametrize(
    ("kind", "body", "status", "message"),
    [
        ("xml", b"{}", 404, "'xml' is none of txt, json, srt, vtt."),
        ("srt", b"{", 400, "Invalid JSON"),
        ("srt", b"[" * 100_000, 400, "Invalid JSON"),
        ("srt", b"{}", 400, "duration: Field required."),
        ("srt", b'{"duration": NaN, "segments": []}', 400, "duration: "),
        ("srt", json.dumps(CORRECTED).replace('"end": 2', '"end": -2').encode(), 400, "segments.0.end: "),
        ("srt", json.dumps({"duration": 1, "segments": PART * (MAX_SEGMENTS + 1)}).encode(), 400, "segments: Tuple "),
        ("srt", json.dumps(worded({}, WORD)).encode(), 400, "segments.0.words.0.word: Field required."),
        ("srt", json.dumps(worded(*[WORD] * (MAX_WORDS + 1))).encode(), 400, "segments.0.words: Tuple "),
        ("srt", b" " * (MAX_BYTES + 1), 413, "too long"),
    ],
)
def test_what_is_no_transcript_is_refused(running: Running, kind: str, body: bytes, status: int, message: str) -> None:
    answer = running.client.post(f"/formats/{kind}", content=body)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text

"""The end points: OpenAI's own client, every format, every option, errors in OpenAI's shape."""

from __future__ import annotations

import io
import json
import socket
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from running import PATH, FakeModel, Running, numbered, serving, wav

from speechllm.cli import run
from speechllm.errors import ConfigError
from speechllm.serve import server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TWO = wav(numbered(5, 1.5))


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
    for answer, status in ((httpx.get(running.url + "/nix"), 404), (httpx.get(running.url + PATH), 405)):
        assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})


def test_pages_of_other_sites_are_refused(running: Running) -> None:
    files = {"file": ("a.wav", TWO)}
    other = httpx.post(running.url + PATH, files=files, headers={"Origin": "https://example.org"})
    assert (other.status_code, other.json()["error"]["code"]) == (403, "other_origin")
    assert httpx.post(running.url + PATH, files=files, headers={"Origin": running.url}).status_code == 200


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


@pytest.mark.parametrize(
    ("kind", "body", "status", "message"),
    [
        ("xml", b"{}", 404, "'xml' is none of txt, json, srt, vtt."),
        ("srt", b"{", 400, "Invalid JSON"),
        ("srt", b"[" * 100_000, 400, "Invalid JSON"),
        ("srt", b"{}", 400, "duration: Field required."),
        ("srt", b'{"duration": NaN, "segments": []}', 400, "duration: "),
        ("srt", json.dumps(CORRECTED).replace('"end": 2', '"end": -2').encode(), 400, "segments.0.end: "),
        ("srt", b" " * (17 << 20), 413, "too long"),
    ],
)
def test_what_is_no_transcript_is_refused(running: Running, kind: str, body: bytes, status: int, message: str) -> None:
    answer = running.client.post(f"/formats/{kind}", content=body)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text

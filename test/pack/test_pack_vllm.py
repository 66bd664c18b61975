"""The export for vLLM: what is sent is what the model reads; a stand-in for the server answers with its own texts."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar

import packing_model
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from speechllm import SpeechLLM, cli
from speechllm.data import audio
from speechllm.model.assemble import load_model
from speechllm.model.speechllm import pad_frames
from speechllm.pack import vllm_client
from speechllm.pack.vllm import PromptMaker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module", params=["conv_mlp", "ctc"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    exp = packing_model.experiment(folder, projector={"kind": request.param, "hidden": 8})
    assert cli.run(["pack", "--exp", str(exp), "--out", str(folder / "packed"), "--export", "vllm"]) == 0
    return folder / "packed"


class Completions(BaseHTTPRequestHandler):
    """Answers as vLLM does: reads the tensor as its source says (weights only), writes greedily."""

    folder: ClassVar[Path]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions"
        embeds_ld = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True)), weights_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder / "lm")
        tokens = model.generate(inputs_embeds=embeds_ld[None], max_new_tokens=body["max_tokens"], do_sample=False)
        text = AutoTokenizer.from_pretrained(self.folder / "lm").decode(tokens[0], skip_special_tokens=True)
        answer = json.dumps({"choices": [{"index": 0, "text": text}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its own name
        """Say nothing."""


@pytest.fixture
def server(exported: Path) -> Iterator[str]:
    Completions.folder = exported
    running = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


def test_the_vectors_sent_are_those_that_the_model_reads(exported: Path) -> None:
    maker, model = PromptMaker.from_pretrained(exported), load_model(exported, device="cpu")
    waves = [packing_model.speech(sentence) for sentence in packing_model.SENTENCES]
    frames_beh, frames_b = pad_frames(maker.encoder.encode(waves), torch.device("cpu"))
    with torch.no_grad():
        spliced = model.splice(frames_beh, frames_b, None)
    for embeds_ld, row, mask in zip(maker.embeds(waves), spliced.embeds_bld, spliced.mask_bl, strict=True):
        torch.testing.assert_close(embeds_ld, row[mask])
        request = maker.request(waves[0])
    sent = torch.load(io.BytesIO(base64.b64decode(str(request["prompt_embeds"]))), weights_only=True)
    assert torch.equal(sent, maker.embeds(waves[:1])[0])
    assert request["temperature"] == 0
    assert "repetition_penalty" not in request


def test_the_client_prints_the_texts_of_the_model(
    exported: Path, server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wave = packing_model.speech(packing_model.SENTENCES[0])
    audio.write_wav(tmp_path / "one.wav", wave, 16_000)
    wanted = SpeechLLM.from_pretrained(exported, "cpu").recognize([audio.read(tmp_path / "one.wav")])[0].text
    assert wanted
    capsys.readouterr()
    assert vllm_client.main(exported, ["--url", server, str(tmp_path / "one.wav")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/one.wav\t{wanted}\n"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "error: --url: 'file:///etc/passwd' is no http address; give http://HOST:PORT"),
        ("http://127.0.0.1:9", "error: http://127.0.0.1:9/v1/completions: gives no answer"),
    ],
)
def test_a_server_that_is_not_there_is_one_line(
    url: str, message: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio.write_wav(tmp_path / "one.wav", packing_model.speech(packing_model.SENTENCES[0]), 16_000)
    assert vllm_client.main(exported, ["--url", url, str(tmp_path / "one.wav")]) == 2
    assert message in capsys.readouterr().err


def test_the_script_serves_the_merged_model(exported: Path, tmp_path: Path) -> None:
    stand_in = tmp_path / "bin/vllm"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    stand_in.chmod(0o755)
    env = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    command = [str(exported / "vllm/serve.sh"), "--port", "8001"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=60)
    said = done.stdout.splitlines()
    assert said[0] == "serve"
    assert (exported / "vllm" / said[1]).resolve() == exported / "lm"
    assert "--enable-prompt-embeds" in said
    assert said[said.index("--max-model-len") + 1] == "256"
    assert said[-2:] == ["--port", "8001"]

"""A real, tiny model behind the server: the text is that of `transcribe`, whoever else asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pyopenjtalk
import pytest
import tiny
import torch
from running import PATH, serving, wait_until

from speechllm.data import audio
from speechllm.model.assemble import assemble, origin_of, save_model
from speechllm.recognizer import SpeechLLM
from speechllm.serve.limits import Limits
from speechllm.serve.server import model_name
from speechllm.serve.service import longform_walk

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

RATES_HZ = (48_000, 24_000, 16_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("served")
    encoder, lm = tiny.wavlm(base / "wavlm"), tiny.llama(base / "llama")
    decode = {"extra_tokens": 6, "tokens_per_s": 4.0}
    config = tiny.config(encoder, lm, decode=decode, lora={"rank": 4, "alpha": 16})
    origin = origin_of(config, 16, tiny.found(encoder).fingerprint, tiny.TEXTS)
    model = assemble(config, origin, "float32")
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for value in model.trainable_state().values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.5)
    save_model(base / "exp" / "tiny" / "model", model, config, origin)
    return base / "exp" / "tiny" / "model"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sentences that a synthesiser speaks, with pauses between, at several rates."""
    spoken, rate_hz = pyopenjtalk.tts("今日はいい天気です。")
    other, _ = pyopenjtalk.tts("明日は、東京から大阪まで電車で行きます。")
    pause = np.zeros(2 * rate_hz)
    paths = []
    for to_hz, wave in zip(RATES_HZ, (spoken, other, np.concatenate([spoken, pause, other])), strict=True):
        path = tmp_path_factory.mktemp("sounds") / "a.wav"
        audio.write_wav(path, audio.resample((wave / 32768).astype(np.float32), rate_hz, to_hz), to_hz)
        paths.append(path)
    return paths


def test_the_server_gives_the_text_of_transcribe(folder: Path, sounds: list[Path]) -> None:
    model = SpeechLLM.from_pretrained(folder)
    expected = [model.transcribe(path) for path in sounds]
    assert all(transcript.text for transcript in expected)
    with serving(model, Limits(rate_per_min=0), walk=longform_walk) as running, ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda path: running.post(path.read_bytes(), response_format="verbose_json").json(), sounds * 2)
        )
    for answer, transcript in zip(answers, expected * 2, strict=True):
        assert answer["text"] == transcript.text
        assert [(one["start"], one["end"], one["text"]) for one in answer["segments"]] == [
            (round(one.start_s, 3), round(one.end_s, 3), one.text) for one in transcript.segments
        ]


def test_the_command_serves_until_it_is_stopped(folder: Path, sounds: list[Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "speechllm", "serve", "--model", str(folder), "--port", "0"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream, env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        wait_until(lambda: "url=" in log.read_text() or process.poll() is not None, seconds=120)
        url = log.read_text().split("url=")[1].split()[0]
        assert httpx.get(url + "/v1/models", timeout=60).json()["data"][0]["id"] == model_name(folder) == "tiny"
        answer = httpx.post(url + PATH, files={"file": sounds[0].read_bytes()}, timeout=60)
        assert answer.json() == {"text": SpeechLLM.from_pretrained(folder).transcribe(sounds[0]).text}
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(60)
    assert status == 75
    assert log.read_text().splitlines()[-1] == "stopped: by the keyboard"
    assert not list(tmp_path.glob("speechllm-serve-*"))

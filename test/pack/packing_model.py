"""A tiny trained model as an experiment folder, and speech for it to hear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyopenjtalk
import tiny
import torch

from speechllm.data.audio import SAMPLE_RATE_HZ, resample
from speechllm.model import hub
from speechllm.model.assemble import assemble, origin_of, save_model
from speechllm.runtime import write_json
from speechllm.score.run import ScoreOptions, score_files

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SENTENCES = ("今日はいい天気です。", "東京から大阪まで電車で行きます。", "明日は雨が降ります。")
TRAINING = {
    "minutes": 1.5,
    "device": "cpu",
    "trained_on": {"training set": "tiny_train", "training hours": 0.01, "training utterances": 3},
}


def experiment(folder: Path, **fields: object) -> Path:
    """Return an experiment whose model is random, its adapter and its projector loud enough to be heard."""
    encoder, language = tiny.whisper(folder / "encoder"), tiny.llama(folder / "lm")
    chosen: dict[str, object] = {"lm": {"name": str(language), "dtype": "float32", "cut_vocabulary": True}}
    if "ctc" in str(fields.get("projector")):  # a random model writes more than was heard, which counts as invented
        chosen["decode"] = {"extra_tokens": 2, "tokens_per_s": 1.0}
    config = tiny.config(encoder, language, **{**chosen, **fields})
    origin = origin_of(config, 16, hub.fingerprint(encoder), tiny.TEXTS)
    model = assemble(config, origin, "float32").eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.trainable_state().values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
        if config.projector.kind == "ctc":  # so that it hears something
            model.trainable_state()["projector.head.out.bias"][0] = -50.0
    exp = folder / "tiny_exp"
    save_model(exp / "model", model, config, origin)
    write_json(exp / "model/provenance.json", TRAINING)
    return exp


def score(folder: Path, training: dict[str, object]) -> Path:
    """Return a score file of texts that a model with this training wrote."""
    folder.mkdir(parents=True)
    (folder / "text").write_text("u1 今日はいい天気です\nu2 東京から大阪へ行きます\n", encoding="utf-8")
    ref = folder / "ref"
    ref.write_text("u1 今日はいい天気です\nu2 東京から大阪まで行きます\n", encoding="utf-8")
    write_json(folder / "provenance.json", {"training": training})
    score_files(ref, folder / "text", folder, ScoreOptions())
    return folder / "score.json"


def speech(sentence: str) -> NDArray[np.float32]:
    """Return a sentence [s] at 16 kHz, spoken by Open JTalk."""
    wave, rate_hz = pyopenjtalk.tts(sentence)
    return resample((wave / 32768).astype(np.float32), rate_hz, SAMPLE_RATE_HZ)

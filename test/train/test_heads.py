"""Heads beside a trained model: what is trained and written, what a second run does, and whose they may be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
import torch

from speechllm.cli import run
from speechllm.config.schema import HeadsConfig
from speechllm.data import archive, kaldi
from speechllm.data.dataset import FeatureSet
from speechllm.decode.align import kana_log_probs
from speechllm.decode.draft import draft
from speechllm.dump import dump
from speechllm.errors import ModelError
from speechllm.model.assemble import assemble, load_model, origin_of, save_model
from speechllm.model.ctc import KANA
from speechllm.model.heads import HEADS_FILE, HEADS_RECORD, Heads, load_heads, new_heads, save_heads
from speechllm.model.state import load_tensors
from speechllm.text.prompt import encode
from speechllm.train import heads as training

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from speechllm.config.schema import Config
    from speechllm.model.speechllm import SpeechLlm
    from speechllm.train.task import Outcome
    from speechllm.train.tasks import Ready

TRAIN = {"a": 40_000, "b": 34_000, "c": 52_000, "d": 36_000}
VALID = {"v": 30_000, "w": 41_000}
HEADS = {"hidden": 8, "epochs": 2, "batch_frames": 300}
CTC = {"kind": "ctc", "hidden": 8}


@dataclass(frozen=True)
class Bases:
    """Base models and the features of two sets."""

    encoder: Path
    lm: Path
    train: Path
    valid: Path

    def config(self, projector: Mapping[str, object]) -> Config:
        return tiny.config(self.encoder, self.lm, projector=projector, heads=HEADS)

    def trained(self, exp: Path, projector: Mapping[str, object], seed: int = 1) -> Path:
        """Write a model as training would leave it, and return the experiment."""
        config = self.config(projector).model_copy(update={"seed": seed})
        origin = origin_of(config, 16, tiny.found(self.encoder).fingerprint, tiny.TEXTS)
        save_model(exp / "model", assemble(config, origin, "float32"), config, origin)
        return exp

    def arguments(self, exp: Path) -> list[str]:
        return ["heads", "--exp", str(exp), "--train", str(self.train), "--valid", str(self.valid)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    base = tmp_path_factory.mktemp("bases")
    made = Bases(tiny.wavlm(base / "wavlm"), tiny.llama(base / "llama"), base / "train", base / "valid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speechllm.dump.worker_pool", tiny.HerePool)
        for samples, store in ((TRAIN, made.train), (VALID, made.valid)):
            data = tiny.data_folder(base / f"in_{store.name}", samples)
            dump(made.config(CTC).encoder, "cpu", data, store, workers=1)
    return made


@pytest.fixture(scope="module")
def plain(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an experiment without a kana head of its own, with heads."""
    exp = bases.trained(tmp_path_factory.mktemp("plain"), {"kind": "linear"})
    assert run(bases.arguments(exp)) == 0
    return exp


def loaded(exp: Path) -> tuple[Heads, SpeechLlm]:
    model = load_model(exp / "model")
    heads = load_heads(exp / "model", model)
    assert heads is not None
    return heads, model


def test_a_model_without_kana_gets_both_heads(plain: Path) -> None:
    heads, model = loaded(plain)
    assert heads.kana is not None
    assert heads.tokens is not None
    assert heads.kana.out.out_features == len(KANA) + 1
    said = {token for text in tiny.TEXTS[:4] for token in encode(model.lm.tokenizer, text)}
    assert set(heads.token_ids) == said
    frames_beh = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(1))
    probs = kana_log_probs(model, frames_beh, [30], heads)
    assert probs is not None
    assert probs[0].shape == (15, len(KANA) + 1)
    assert set(draft(heads, frames_beh, [30])[0]) <= said
    assert not any(value.requires_grad for value in heads.tokens.parameters())


def test_a_model_with_a_kana_head_gets_the_other_alone(bases: Bases, tmp_path: Path) -> None:
    exp = bases.trained(tmp_path / "exp", CTC)
    assert run(bases.arguments(exp)) == 0
    heads, _ = loaded(exp)
    assert heads.kana is None
    assert heads.tokens is not None
    assert {name.split(".")[0] for name in load_tensors(exp / "model" / HEADS_FILE)} == {"tokens"}


def test_training_lowers_the_loss(plain: Path) -> None:
    for name in ("kana", "tokens"):
        lines = (plain / "heads" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [entry["loss"] for entry in map(json.loads, lines) if entry["kind"] == "valid"]
        assert len(losses) == HEADS["epochs"]
        assert losses[-1] < losses[0]


def test_a_second_run_does_nothing_and_a_lost_file_is_made_again(bases: Bases, plain: Path, tmp_path: Path) -> None:
    exp = shutil.copytree(plain, tmp_path / "exp")
    before = {path.name: path.stat().st_mtime_ns for path in (exp / "model").iterdir()}
    assert run(bases.arguments(exp)) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (exp / "model").iterdir()} == before
    whole = (exp / "model" / HEADS_FILE).read_bytes()
    (exp / "model" / HEADS_FILE).unlink()
    (exp / "model" / HEADS_RECORD).unlink()
    assert load_heads(exp / "model", load_model(exp / "model")) is None
    assert run(bases.arguments(exp)) == 0
    assert (exp / "model" / HEADS_FILE).read_bytes() == whole


def test_a_run_that_was_stopped_ends_in_the_same_bits(
    bases: Bases, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = bases.trained(tmp_path / "exp", {"kind": "linear"})
    honest = training.HeadTask.loss
    steps: list[str] = []

    def dies(self: training.HeadTask, ready: Ready) -> Outcome:
        steps.append(self.name)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return honest(self, ready)

    monkeypatch.setattr(training.HeadTask, "loss", dies)
    assert run(bases.arguments(exp)) == 75
    assert not (exp / "model" / HEADS_RECORD).exists()
    monkeypatch.setattr(training.HeadTask, "loss", honest)
    assert run(bases.arguments(exp)) == 0
    assert (exp / "model" / HEADS_FILE).read_bytes() == (plain / "model" / HEADS_FILE).read_bytes()


def test_a_signal_while_the_sets_are_opened_is_a_stop(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = bases.trained(tmp_path / "exp", {"kind": "linear"})
    monkeypatch.setattr(training, "open_sets", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    assert run(bases.arguments(exp)) == 75
    assert capsys.readouterr().err.endswith("stopped: not in a training step; run again to go on\n")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(arguments) == 2
    return capsys.readouterr().err


def test_another_models_heads_are_not_gone_on_with(
    bases: Bases, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = shutil.copytree(plain, tmp_path / "exp")
    said = refused([*bases.arguments(exp), "--set", "heads.epochs=3"], capsys)
    assert f"error: {exp / 'heads'}: holds output made with settings.epochs = 2, now it is 3" in said
    shutil.rmtree(exp / "model")
    bases.trained(exp, {"kind": "linear"}, seed=2)
    assert f"error: {exp / 'heads'}: holds output made with model = " in refused(bases.arguments(exp), capsys)


def test_what_cannot_be_trained_is_refused_in_one_line(
    bases: Bases, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = bases.arguments(tmp_path / "nothing")
    assert "holds no trained model (model.json is missing); run stage 3 first" in refused(nothing, capsys)
    sounds = bases.train.parent / "in_train" / "data"
    wrong = ["heads", "--exp", str(plain), "--train", str(sounds), "--valid", str(bases.valid)]
    said = refused(wrong, capsys)
    assert said == f"error: {sounds}: holds no features (feats.scp is missing); name a dump (stage 2)\n"
    said = refused([*bases.arguments(plain), "--set", "seed=2"], capsys)
    assert said == "error: --set: seed=2 is of the model, which is trained; change heads.* alone\n"


def test_features_of_another_encoder_are_refused(
    bases: Bases, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(bases.train, tmp_path / "other")
    record = json.loads((other / "dump.json").read_text(encoding="utf-8"))
    record["record"]["layer"] = 1
    (other / "dump.json").write_text(json.dumps(record), encoding="utf-8")
    arguments = ["heads", "--exp", str(plain), "--train", str(other), "--valid", str(bases.valid)]
    assert f"error: {other}: was dumped with layer = 1, the model wants None" in refused(arguments, capsys)
    (other / "dump.json").write_text('{"record": {}}', encoding="utf-8")
    assert f"error: {other}/dump.json: does not say what was dumped; run stage 2 again" in refused(arguments, capsys)


def test_features_of_another_width_are_refused(
    bases: Bases, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bases.train, other)
    (other / "utt2crc").unlink()
    frames = {key: np.ones((count, 3), np.float32) for key, count in FeatureSet(other).store.frames.items()}
    archive.write_archive(other / "feats.0000.ark", iter(frames.items()))
    (other / "feats.scp").write_bytes((other / "feats.0000.scp").read_bytes())
    arguments = ["heads", "--exp", str(plain), "--train", str(other), "--valid", str(other)]
    assert f"error: {other}: holds features of 3 channels, the model reads " in refused(arguments, capsys)
    arguments = ["heads", "--exp", str(plain), "--train", str(bases.train), "--valid", str(other)]
    assert f"error: {other}: holds features of 3 channels, {bases.train} of " in refused(arguments, capsys)
    arguments = ["decode", "--exp", str(plain), "--data", str(other), "--out", str(tmp_path / "out")]
    assert f"error: {other}: holds features of 3 channels, the model reads " in refused(arguments, capsys)


FAULTS = {
    "frames": (
        {"frames": {"encoder": "x", "layer": None, "pad_to_30s": False, "width": 16}},
        "frames with encoder = x",
    ),
    "format": ({"format": 9}, "has format 9, this version reads 1"),
    "token": ({"tokens": ["no such token"]}, "was trained for a language model that has the token 'no such token'"),
    "list": ({"tokens": 5}, "has no list of tokens"),
    "settings": ({"settings": {"hidden": 10**9}}, "says nothing readable of its settings"),
    "shapes": ({"settings": HEADS | {"hidden": 4096}}, "kana.conv1.bias is (8,), not (4096,)"),
    "keys": ({"kana": False}, "has the unknown tensor kana.conv1.bias"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_heads_that_are_not_the_models_are_refused(plain: Path, tmp_path: Path, name: str) -> None:
    exp = shutil.copytree(plain, tmp_path / "exp")
    changed, said = FAULTS[name]
    path = exp / "model" / HEADS_RECORD
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8")
    with pytest.raises(ModelError, match=re.escape(said)):
        loaded(exp)


def test_damaged_weights_are_refused(plain: Path, tmp_path: Path) -> None:
    exp = shutil.copytree(plain, tmp_path / "exp")
    (exp / "model" / HEADS_FILE).write_bytes(b"\x80\x04pickle")
    with pytest.raises(ModelError, match="is no readable safetensors file"):
        loaded(exp)


def test_what_is_saved_is_what_is_loaded(plain: Path, tmp_path: Path) -> None:
    exp = shutil.copytree(plain, tmp_path / "exp")
    first, model = loaded(exp)
    settings = HeadsConfig(hidden=5, stride=1)
    torch.manual_seed(4)
    made = new_heads(settings, 16, first.token_ids[:3], kana=False)
    record = json.loads((exp / "model" / HEADS_RECORD).read_text(encoding="utf-8"))
    save_heads(exp / "model", made, settings, record["frames"], record["tokens"][:3])
    again = load_heads(exp / "model", model)
    assert again is not None
    assert again.token_ids == first.token_ids[:3]
    assert made.tokens is not None
    assert again.tokens is not None
    for name, value in made.tokens.state_dict().items():
        assert torch.equal(value, again.tokens.state_dict()[name])


def test_readings_and_tokens_are_what_the_heads_learn(bases: Bases, plain: Path) -> None:
    _, model = loaded(plain)
    text = kaldi.read_table(bases.train / "text")["a"]
    assert training.KANA_SPELLING.text(training.KANA_SPELLING.symbols("今日は")) == "キョーワ"
    ids = sorted(set(encode(model.lm.tokenizer, text)))
    spelling = training.token_spelling(model.lm.tokenizer, ids)
    assert spelling.text(spelling.symbols(text)) == text
    assert spelling.symbols("") == []

"""Stage 4: what it writes, what it does not do twice, and how it goes on after a kill."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch

from speechllm.data import kaldi
from speechllm.decode.batched import Decoder
from speechllm.decode.run import PARTIAL, decode_dir
from speechllm.dump import dump
from speechllm.errors import ConfigError, DataError, ModelError, UserError
from speechllm.model.assemble import TRAINED_FILE, Origin, assemble, origin_of, read_model, save_model
from speechllm.model.state import load_tensors, save_tensors
from speechllm.runtime import read_json
from speechllm.text.normalize import normalize

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from speechllm.decode.batched import Decoded

SAMPLES = {"a": 9_000, "b": 4_000, "c": 12_345, "d": 5_500, "e": 7_000}
DECODE = {"batch_size": 2, "extra_tokens": 6, "tokens_per_s": 4.0}


@dataclass(frozen=True)
class Setting:
    """A model, sounds, and their features."""

    model: Path
    data: Path
    store: Path


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    base = tmp_path_factory.mktemp("decode")
    encoder, lm = tiny.wavlm(base / "wavlm"), tiny.llama(base / "llama")
    config = tiny.config(encoder, lm, decode=DECODE, lora={"rank": 4, "alpha": 16})
    made = Setting(base / "model", tiny.data_folder(base / "in", SAMPLES), base / "store")
    origin = origin_of(config, 16, tiny.found(encoder).fingerprint, tiny.TEXTS)
    model = assemble(config, origin, "float32")
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for value in model.trainable_state().values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.5)
    save_model(made.model, model, config, origin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speechllm.dump.worker_pool", tiny.HerePool)
        dump(config.encoder, "cpu", made.data, made.store, workers=1)
    return made


@pytest.fixture(scope="module")
def whole(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert decode_dir(setting.model, setting.store, out, {}) == len(SAMPLES)
    return out


class Killed(Exception):  # noqa: N818 - it stands for what no code can catch
    """The process ended here."""


def kill_after(monkeypatch: pytest.MonkeyPatch, utterances: int) -> None:
    """Let decoding end after so many utterances."""
    whole = Decoder.texts

    def cut_short(*given: Any) -> Iterator[Decoded]:
        for number, found in enumerate(whole(*given)):
            if number == utterances:
                raise Killed
            yield found

    monkeypatch.setattr(Decoder, "texts", cut_short)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_utterance_has_its_text_in_the_order_of_bytes(whole: Path) -> None:
    texts = kaldi.read_table(whole / "text")
    assert list(texts) == sorted(SAMPLES)
    assert len(set(texts.values())) > 1
    assert not (whole / PARTIAL).exists()


def test_the_best_of_the_n_best_is_the_text(whole: Path) -> None:
    texts = kaldi.read_table(whole / "text")
    entries = lines(whole / "nbest.jsonl")
    assert [entry["utt_id"] for entry in entries] == list(texts)
    for entry in entries:
        nbest = entry["nbest"]
        assert isinstance(nbest, list)
        assert nbest[0]["text"] == texts[str(entry["utt_id"])]
        assert nbest[0]["log_prob"] < 0


def test_the_speed_is_that_of_the_sound_that_was_decoded(whole: Path) -> None:
    rtf = read_json(whole / "rtf.json")
    audio_s = sum(SAMPLES.values()) / tiny.SAMPLE_RATE_HZ
    assert rtf["audio_s"] == pytest.approx(audio_s, abs=1e-3)
    assert rtf["rtf"] == pytest.approx(float(str(rtf["wall_s"])) / audio_s, rel=1e-3)
    cut = sum(not entry["nbest"][0]["ended"] for entry in lines(whole / "nbest.jsonl"))  # type: ignore[index]
    none = {"utterances": 0, "rate": 0.0}
    cut_too = {"utterances": cut, "rate": pytest.approx(cut / len(SAMPLES))}
    assert rtf["guards"] == {"no_speech": none, "loop": none, "doubtful": none, "cut": cut_too}


def test_sounds_and_their_features_give_the_same_texts(setting: Setting, whole: Path, tmp_path: Path) -> None:
    decode_dir(setting.model, setting.data, tmp_path, {})
    assert (tmp_path / "text").read_bytes() == (whole / "text").read_bytes()


@pytest.mark.parametrize("size", [1, 5])
def test_the_size_of_a_batch_changes_no_text(setting: Setting, whole: Path, tmp_path: Path, size: int) -> None:
    decode_dir(setting.model, setting.store, tmp_path, {"batch_size": size})
    assert (tmp_path / "text").read_bytes() == (whole / "text").read_bytes()


def test_a_second_run_does_nothing(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode_dir(setting.model, setting.store, tmp_path, {})
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr("speechllm.decode.run.load_model", None)  # not even the model is loaded
    assert decode_dir(setting.model, setting.store, tmp_path, {}) == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("torn", ["", '{"utt_id": "c", "nb', '{"utt_id"'], ids=["whole-lines", "torn", "torn-early"])
@pytest.mark.parametrize("place", ["store", "data"])
def test_a_killed_run_goes_on_where_it_was(
    setting: Setting, whole: Path, tmp_path: Path, place: str, torn: str
) -> None:
    source = getattr(setting, place)
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, utterances=2)
        with pytest.raises(Killed):
            decode_dir(setting.model, source, tmp_path, {})
    there = {entry["utt_id"] for entry in lines(tmp_path / PARTIAL)}
    assert len(there) == 2
    assert not (tmp_path / "text").exists()
    with (tmp_path / PARTIAL).open("a", encoding="utf-8") as stream:
        stream.write(torn)
    assert decode_dir(setting.model, source, tmp_path, {}) == 3
    assert (tmp_path / "text").read_bytes() == (whole / "text").read_bytes()
    assert [entry["utt_id"] for entry in lines(tmp_path / "nbest.jsonl")] == sorted(SAMPLES)
    rest_s = sum(SAMPLES[key] for key in SAMPLES if key not in there) / tiny.SAMPLE_RATE_HZ
    assert read_json(tmp_path / "rtf.json")["audio_s"] == pytest.approx(rest_s, abs=1e-3)


def test_a_run_that_was_killed_twice_decodes_nothing_twice(setting: Setting, whole: Path, tmp_path: Path) -> None:
    for already in (2, 4):
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, utterances=2)
            with pytest.raises(Killed):
                decode_dir(setting.model, setting.store, tmp_path, {})
        assert len(lines(tmp_path / PARTIAL)) == already
    assert decode_dir(setting.model, setting.store, tmp_path, {}) == 1
    assert (tmp_path / "text").read_bytes() == (whole / "text").read_bytes()


@pytest.mark.parametrize("complete", [True, False])
def test_another_beam_is_refused_with_the_difference(setting: Setting, tmp_path: Path, *, complete: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not complete:
            kill_after(patch, utterances=2)
        try:
            decode_dir(setting.model, setting.store, tmp_path, {})
        except Killed:
            assert not complete
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"holds output made with decode\.beam = 1, now it is 3"):
        decode_dir(setting.model, setting.store, tmp_path, {"beam": 3})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_data_are_refused_but_sounds_and_their_features_are_the_same_data(
    setting: Setting, tmp_path: Path
) -> None:
    decode_dir(setting.model, setting.store, tmp_path / "out", {})
    assert decode_dir(setting.model, setting.data, tmp_path / "out", {}) == 0
    other = tiny.data_folder(tmp_path / "in", {"z": 5_000})
    with pytest.raises(DataError, match="holds output made with data = "):
        decode_dir(setting.model, other, tmp_path / "out", {})


def copied_model(setting: Setting, folder: Path, change: float = 0.0, encoder: str | None = None) -> Path:
    """Write the model again, its weights moved by `change`, made on features of `encoder`."""
    config, origin = read_model(setting.model)
    other = Origin(origin.width_h, encoder or origin.encoder_fingerprint, origin.lm_fingerprint, origin.kept_ids)
    save_model(folder, assemble(config, other, "float32"), config, other)
    state = load_tensors(setting.model / TRAINED_FILE)
    save_tensors(folder / TRAINED_FILE, {name: value + change for name, value in state.items()})
    return folder


def test_another_model_is_refused(setting: Setting, tmp_path: Path) -> None:
    decode_dir(setting.model, setting.store, tmp_path / "out", {})
    assert decode_dir(copied_model(setting, tmp_path / "same"), setting.store, tmp_path / "out", {}) == 0
    with pytest.raises(DataError, match="holds output made with model = "):
        decode_dir(copied_model(setting, tmp_path / "other", 0.5), setting.store, tmp_path / "out", {})


@pytest.mark.parametrize(
    ("place", "kind", "message"),
    [("store", ConfigError, "was dumped with encoder_fingerprint = "), ("data", ModelError, "is another model")],
)
def test_frames_of_another_encoder_than_the_models_are_refused(
    setting: Setting, tmp_path: Path, *, place: str, kind: type[UserError], message: str
) -> None:
    model = copied_model(setting, tmp_path / "model", encoder="feedfeedfeedfeed")
    with pytest.raises(kind, match=message):
        decode_dir(model, getattr(setting, place), tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [TRAINED_FILE, "model.json"])
def test_a_folder_without_a_whole_model_is_refused(setting: Setting, tmp_path: Path, name: str) -> None:
    model = copied_model(setting, tmp_path / "model")
    (model / name).unlink()
    with pytest.raises(ModelError, match=f"holds no trained model .*{name} is missing.*; run stage 3 first"):
        decode_dir(model, setting.store, tmp_path / "out", {})


def test_a_beam_writes_as_many_texts_of_each_utterance(setting: Setting, tmp_path: Path) -> None:
    decode_dir(setting.model, setting.store, tmp_path, {"beam": 3})
    for entry in lines(tmp_path / "nbest.jsonl"):
        nbest = entry["nbest"]
        assert isinstance(nbest, list)
        scores = [text["log_prob"] for text in nbest]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)


def test_the_text_is_normalised_and_the_n_best_is_not(setting: Setting, whole: Path, tmp_path: Path) -> None:
    decode_dir(setting.model, setting.store, tmp_path, {"normalize": "default"})
    raw, clean = kaldi.read_table(whole / "text"), kaldi.read_table(tmp_path / "text")
    assert {key: normalize(text, "default") for key, text in raw.items()} == clean
    assert raw != clean
    assert (tmp_path / "nbest.jsonl").read_bytes() == (whole / "nbest.jsonl").read_bytes()


def test_an_unknown_text_profile_is_refused_before_anything_is_decoded(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such text profile"):
        decode_dir(setting.model, setting.store, tmp_path / "out", {"normalize": "nonsense"})
    assert not (tmp_path / "out").exists()

"""Building a model from its configuration, and the folder that holds a trained one."""

from __future__ import annotations

import pickle
import shutil
from typing import TYPE_CHECKING

import pytest
import tiny
import torch

from speechllm.errors import ModelError
from speechllm.model.assemble import (
    MODEL_FILE,
    TRAINED_FILE,
    Origin,
    assemble,
    load_model,
    origin_of,
    read_model,
    save_model,
)
from speechllm.model.speechllm import SpeechLlm, pad_frames
from speechllm.model.state import load_tensors, save_tensors
from speechllm.runtime import read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from speechllm.config.schema import Config

ENCODER = "0123456789abcdef"
ADAPTER = "lm.model.layers.0.self_attn.q_proj.lora_A.default.weight"


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def config(lm_folder: Path) -> Config:
    return tiny.config(lm_folder, lm_folder)


@pytest.fixture(scope="module")
def origin(config: Config) -> Origin:
    return origin_of(config, tiny.WIDTH_H, ENCODER, tiny.TEXTS)


@pytest.fixture(scope="module")
def saved(config: Config, origin: Origin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exp") / "model"
    save_model(folder, trained(config, origin), config, origin)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of the saved model, to be spoiled."""
    return shutil.copytree(saved, tmp_path / "model")


def trained(config: Config, origin: Origin) -> SpeechLlm:
    """Return a model whose adapter has something to say."""
    model = assemble(config, origin, "float32").eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.trainable_state().values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model


def loss_of(model: SpeechLlm) -> float:
    torch.manual_seed(4)
    frames = pad_frames([torch.randn(count, tiny.WIDTH_H) for count in (17, 9)], tiny.CPU)
    with torch.no_grad():
        return float(model.loss(*frames, tiny.TEXTS[:2])[0])


def test_new_weights_are_a_function_of_the_seed_alone(config: Config, origin: Origin) -> None:
    first = assemble(config, origin, "float32").trainable_state()
    torch.rand(10)
    second = assemble(config, origin, "float32").trainable_state()
    other = assemble(config.model_copy(update={"seed": 2}), origin, "float32").trainable_state()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["projector.conv.weight"], other["projector.conv.weight"])
    assert not torch.equal(first[ADAPTER], other[ADAPTER])


@pytest.mark.parametrize("projector", [{"kind": "linear"}, {"kind": "ctc", "hidden": 8}], ids=["linear", "ctc"])
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "whole"])
def test_a_saved_model_comes_back_as_it_was(
    projector: dict[str, object], lm_folder: Path, tmp_path: Path, *, cut: bool
) -> None:
    lm = {"name": str(lm_folder), "dtype": "float32", "cut_vocabulary": cut}
    config = tiny.config(lm_folder, lm_folder, projector=projector, lm=lm)
    origin = origin_of(config, tiny.WIDTH_H, ENCODER, tiny.TEXTS[:2])
    assert (origin.kept_ids is not None) is cut
    model = trained(config, origin)
    save_model(tmp_path / "model", model, config, origin)
    again = load_model(tmp_path / "model")
    assert read_model(tmp_path / "model") == (config, origin)
    assert len(again.lm.tokenizer) == len(model.lm.tokenizer)
    assert loss_of(again) == pytest.approx(loss_of(model), rel=1e-4)
    untrained = assemble(config, origin, "float32").eval()
    assert loss_of(again) != pytest.approx(loss_of(untrained), rel=1e-3)


def test_a_model_is_loaded_in_the_precision_of_decoding(config: Config, origin: Origin, tmp_path: Path) -> None:
    coarse = config.model_copy(update={"decode": config.decode.model_copy(update={"dtype": "bfloat16"})})
    save_model(tmp_path, trained(coarse, origin), coarse, origin)
    assert load_model(tmp_path, device="cpu").lm.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "has no tensor projector.conv.bias"),
        ("extra", "has the unknown tensor projector.extra"),
        ("shape", r"projector.conv.bias is \(7,\), not \(6,\)"),
        ("adapter", f"has no tensor {ADAPTER}"),
    ],
)
def test_a_state_that_does_not_fit_exactly_is_refused_by_name(change: str, message: str, folder: Path) -> None:
    state = load_tensors(folder / TRAINED_FILE)
    if change == "missing":
        del state["projector.conv.bias"]
    elif change == "adapter":
        del state[ADAPTER]
    else:
        state["projector.extra" if change == "extra" else "projector.conv.bias"] = torch.zeros(7)
    save_tensors(folder / TRAINED_FILE, state)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert caught.value.where == str(folder / TRAINED_FILE)


def test_a_pickle_in_place_of_the_trained_state_is_refused(folder: Path) -> None:
    (folder / TRAINED_FILE).write_bytes(pickle.dumps({"projector.conv.bias": [0.0]}))
    with pytest.raises(ModelError, match="is no readable safetensors file"):
        load_model(folder)


@pytest.mark.parametrize("name", [TRAINED_FILE, MODEL_FILE])
def test_a_model_folder_that_is_not_whole_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_model(folder)


def test_another_format_is_refused(folder: Path) -> None:
    write_json(folder / MODEL_FILE, {**read_json(folder / MODEL_FILE), "format": 2})
    with pytest.raises(ModelError, match="has format 2, this version reads 1"):
        load_model(folder)


@pytest.mark.parametrize("key", ["kept_ids", "width_h", "encoder_fingerprint", "lm_fingerprint"])
def test_a_record_that_lacks_a_field_is_refused(key: str, folder: Path) -> None:
    content = read_json(folder / MODEL_FILE)
    del content[key]
    write_json(folder / MODEL_FILE, content)
    with pytest.raises(ModelError, match=key):
        load_model(folder)


WIDTHS: tuple[object, ...] = ("abc", None, [16], 1e12, -1, 0, 1 << 20, 16.5, True)
KEPT: tuple[object, ...] = ("x", {}, [], 7)
KEPT_ONE: tuple[object, ...] = ("x", None, -1, 2.5, [4])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *[("width_h", value, "width_h") for value in WIDTHS],
        *[("kept_ids", value, r"kept_ids \(") for value in KEPT],
        *[("kept_ids", [3, value], r"kept_ids\.1 \(") for value in KEPT_ONE],
        ("kept_ids", [3, 5, 3], r"kept_ids \(it holds a token twice\)"),
        ("encoder_fingerprint", None, "encoder_fingerprint"),
        ("lm_fingerprint", 7, "lm_fingerprint"),
        ("lm_weights", ["a"], "lm_weights"),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(key: str, value: object, message: str, folder: Path) -> None:
    write_json(folder / MODEL_FILE, {**read_json(folder / MODEL_FILE), key: value})
    with pytest.raises(ModelError, match=f"has a wrong {message}.*; copy the folder again") as caught:
        read_model(folder)
    assert caught.value.where == str(folder / MODEL_FILE)


def test_a_token_beyond_the_vocabulary_is_refused(config: Config, folder: Path) -> None:
    write_json(folder / MODEL_FILE, {**read_json(folder / MODEL_FILE), "kept_ids": [0, 1 << 62]})
    with pytest.raises(ModelError, match=rf"kept_ids \({1 << 62} is beyond the \d+ tokens of {config.lm.name}"):
        load_model(folder)


def test_more_than_is_needed_may_stand_in_the_record(origin: Origin, folder: Path) -> None:
    write_json(folder / MODEL_FILE, {**read_json(folder / MODEL_FILE), "other": {"a": 1}})
    assert read_model(folder)[1] == origin


def test_another_language_model_than_the_one_trained_with_is_refused(config: Config, origin: Origin) -> None:
    other = Origin(origin.width_h, origin.encoder_fingerprint, "feedfeedfeedfeed", None)
    with pytest.raises(ModelError, match=r"is another model \(fingerprint .*\) than the one trained with \(feedfeed"):
        assemble(config, other, "float32")


def test_a_model_without_an_adapter_trains_the_projector_alone(lm_folder: Path) -> None:
    config = tiny.config(lm_folder, lm_folder, lora=None)
    model = assemble(config, origin_of(config, tiny.WIDTH_H, ENCODER, tiny.TEXTS), "float32")
    assert {name.split(".")[0] for name, value in model.named_parameters() if value.requires_grad} == {"projector"}
    assert {name.split(".")[0] for name in model.trainable_state()} == {"projector"}

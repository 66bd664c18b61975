"""A packed model finds the base models that it was trained on, whatever else of their names this machine has."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import packing_model
import pytest

from speechllm.model import hub, packaged
from speechllm.model.assemble import find_encoder, read_model
from speechllm.pack.folder import PackOptions, pack
from speechllm.runtime import read_json

if TYPE_CHECKING:
    from pathlib import Path

NAME = "some/model"


def model_folder(path: Path, weights: bytes, **config: object) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}), encoding="utf-8")
    (path / "model.safetensors").write_bytes(weights)
    return path


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the conversion of a package of `NAME`, beside which the model hub's cache holds other weights."""
    monkeypatch.setenv("SPEECHLLM_CACHE", str(tmp_path / "cache"))
    other = model_folder(tmp_path / "other", b"official")
    monkeypatch.setattr(hub, "_from_hub", lambda *_, **__: other)

    def build(folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "llama", "new_field": 1}', encoding="utf-8")
        (folder / "model.safetensors").write_bytes(b"packaged")

    recipe = packaged.Recipe("package some-model (2.0)", "2.0", ("json",), build)
    monkeypatch.setitem(packaged.PACKAGED, NAME, recipe)
    return tmp_path / "cache/some--model-2.0"


def test_the_package_is_taken_where_the_hub_has_other_weights(package: Path, tmp_path: Path) -> None:
    assert hub.resolve(NAME).folder == tmp_path / "other"
    trained_on = hub.fingerprint(model_folder(tmp_path / "twin", b"packaged", new_field=1))
    found = hub.resolve_trained_on(NAME, None, trained_on)
    assert (found.folder, found.source, found.fingerprint) == (package, "package some-model (2.0)", trained_on)


def test_its_weights_alone_are_enough_where_another_release_wrote_the_configuration(
    package: Path, tmp_path: Path
) -> None:
    twin = model_folder(tmp_path / "twin", b"packaged", old_field=1)
    trained_on = hub.fingerprint(twin)
    assert hub.resolve_trained_on(NAME, None, trained_on).folder == tmp_path / "other"
    found = hub.resolve_trained_on(NAME, None, trained_on, hub.weights_fingerprint(twin))
    assert (found.folder, found.fingerprint) == (package, trained_on)
    other = hub.weights_fingerprint(model_folder(tmp_path / "third", b"neither"))
    assert hub.resolve_trained_on(NAME, None, trained_on, other).folder == tmp_path / "other"


def test_a_revision_is_never_replaced(package: Path, tmp_path: Path) -> None:
    trained_on = hub.fingerprint(model_folder(tmp_path / "twin", b"packaged", new_field=1))
    assert hub.resolve_trained_on(NAME, "main", trained_on).folder == tmp_path / "other"
    assert not package.exists()


def test_a_packed_folder_says_the_weights_of_its_base_models(tmp_path: Path) -> None:
    exp = packing_model.experiment(tmp_path)
    pack(exp, tmp_path / "packed", PackOptions())
    config, origin = read_model(tmp_path / "packed")
    assert origin.encoder_weights == hub.weights_fingerprint(tmp_path / "encoder")
    assert origin.lm_weights == hub.weights_fingerprint(tmp_path / "lm")
    assert find_encoder(config, origin).folder == tmp_path / "encoder"
    assert read_json(tmp_path / "packed/model.json")["format"] == 1

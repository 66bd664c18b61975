"""From a name to a folder: the order of places, and what identifies a model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NoReturn

import pytest
import tiny

from speechllm.errors import ModelError
from speechllm.model import hub, packaged

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = '{"model_type": "llama"}'


@pytest.fixture(autouse=True)
def no_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no model that this machine's user has downloaded be found."""
    use_hub_cache(monkeypatch, None)


def use_hub_cache(monkeypatch: pytest.MonkeyPatch, folder: Path | None, revision: str | None = None) -> None:
    """Let the hub's cache hold `folder` and nothing else; the network may not be asked."""

    def from_hub(_name: str, asked: str | None, *, local_only: bool) -> Path | None:
        if not local_only:
            _never()
        return folder if asked == revision else None

    monkeypatch.setattr(hub, "_from_hub", from_hub)


def _never() -> NoReturn:
    raise AssertionError("the network was asked")


def model_folder(path: Path, weights: bytes = b"weights") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(CONFIG, encoding="utf-8")
    (path / "model.safetensors").write_bytes(weights)
    return path


def use_recipe(monkeypatch: pytest.MonkeyPatch, build: object) -> None:
    recipe = packaged.Recipe("package some-model (2.0)", "2.0", ("json",), build)  # type: ignore[arg-type] # a stub
    monkeypatch.setitem(packaged.PACKAGED, "some/model", recipe)


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    found = hub.resolve(str(model_folder(tmp_path / "m")))
    assert (found.folder, found.source) == (tmp_path / "m", "local folder")


def test_a_name_is_found_under_the_folder_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder(tmp_path / "org" / "m")
    monkeypatch.setenv("SPEECHLLM_MODELS", str(tmp_path))
    assert hub.resolve("org/m").folder == tmp_path / "org" / "m"


def test_an_unknown_name_is_told_where_it_was_looked_for() -> None:
    with pytest.raises(ModelError, match="org/m: no such model folder, hub model or package; give a folder"):
        hub.resolve("org/m")


def test_a_known_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = packaged.Recipe("package some-model (2.0)", "2.0", ("no_module_of_this_name",), lambda _folder: None)
    monkeypatch.setitem(packaged.PACKAGED, "some/model", recipe)
    with pytest.raises(ModelError, match=r"run tools/setup.sh, which installs package some-model"):
        hub.resolve("some/model")


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        hub.resolve(str(tmp_path))


def test_a_cached_hub_model_goes_before_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_recipe(monkeypatch, lambda _folder: _never())
    use_hub_cache(monkeypatch, model_folder(tmp_path / "snapshot"))
    assert hub.resolve("some/model").source == "model hub (cached)"


def test_a_local_folder_goes_before_a_cached_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub_cache(monkeypatch, model_folder(tmp_path / "snapshot"))
    monkeypatch.setenv("SPEECHLLM_MODELS", str(tmp_path))
    model_folder(tmp_path / "some" / "model")
    assert hub.resolve("some/model").source == "local folder"


def test_a_cached_tokenizer_without_weights_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model_folder(tmp_path / "snapshot") / "model.safetensors").unlink()
    use_hub_cache(monkeypatch, tmp_path / "snapshot")
    with pytest.raises(ModelError, match="no such model folder, hub model or package"):
        hub.resolve("some/model")


def test_a_revision_is_that_of_the_hub_and_never_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_recipe(monkeypatch, lambda _folder: _never())
    use_hub_cache(monkeypatch, model_folder(tmp_path / "snapshot"), revision="v2")
    assert hub.resolve("some/model", "v2").folder == tmp_path / "snapshot"
    with pytest.raises(ModelError, match="no such model folder, hub model or package"):
        hub.resolve("some/model", "v1")


def test_a_packaged_model_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "config.json").write_text(CONFIG, encoding="utf-8")

    monkeypatch.setenv("SPEECHLLM_CACHE", str(tmp_path / "cache"))
    use_recipe(monkeypatch, build)
    first, second = hub.resolve("some/model"), hub.resolve("some/model")
    assert len(built) == 1
    assert first == second
    assert first.folder == tmp_path / "cache" / "some--model-2.0"
    assert first.source == "package some-model (2.0)"


def test_a_conversion_that_was_broken_off_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path) -> None:
        (folder / "config.json").write_text(CONFIG, encoding="utf-8")
        raise RuntimeError("killed")

    monkeypatch.setenv("SPEECHLLM_CACHE", str(tmp_path / "cache"))
    use_recipe(monkeypatch, build)
    with pytest.raises(RuntimeError, match="killed"):
        hub.resolve("some/model")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_package_with_other_bytes_than_the_pinned_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(b"other")
    with pytest.raises(ModelError, match=r"its SHA-256 is not the pinned one; run tools/setup\.sh again"):
        packaged._verified([part], packaged.GEMMA_SHA256, "gemma")


@pytest.mark.parametrize("place", [0, -1])
def test_one_changed_byte_at_either_end_of_the_weights_is_another_model(tmp_path: Path, place: int) -> None:
    weights = bytearray(3 * hub.EDGE_BYTES)
    before = hub.fingerprint(model_folder(tmp_path / "a", bytes(weights)))
    assert hub.fingerprint(model_folder(tmp_path / "b", bytes(weights))) == before
    weights[place] ^= 1
    assert hub.fingerprint(model_folder(tmp_path / "c", bytes(weights))) != before


def test_a_weight_file_of_another_size_is_another_model(tmp_path: Path) -> None:
    sizes = (3 * hub.EDGE_BYTES, 4 * hub.EDGE_BYTES)
    prints = {hub.fingerprint(model_folder(tmp_path / str(size), bytes(size))) for size in sizes}
    assert len(prints) == 2


def test_the_version_that_saved_a_model_does_not_change_its_fingerprint(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    before = hub.fingerprint(folder)
    content = {"model_type": "llama", "transformers_version": "9", "_name_or_path": "/elsewhere"}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert hub.fingerprint(folder) == before
    (folder / "config.json").write_text(json.dumps({**content, "hidden_size": 8}), encoding="utf-8")
    assert hub.fingerprint(folder) != before


def test_the_record_of_a_model_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    record = tiny.found(model_folder(tmp_path / "m")).record()
    assert set(record) == {"name", "source", "licence", "fingerprint"}

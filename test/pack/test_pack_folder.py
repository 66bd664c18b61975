"""Stage 6: a packed folder says what it is, loads in every form, and is whole or not there."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from typing import TYPE_CHECKING

import packing_model
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from speechllm import SpeechLLM, cli
from speechllm.errors import ConfigError, DataError, ModelError, UserError
from speechllm.model.assemble import TRAINED_FILE, load_model, read_model
from speechllm.model.state import load_tensors, save_tensors
from speechllm.pack import folder as packing
from speechllm.pack.card import read_head
from speechllm.pack.folder import PackOptions, pack
from speechllm.runtime import read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packing_model.experiment(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packing_model.score(tmp_path_factory.mktemp("scored") / "tiny_eval", packing_model.TRAINING)


@pytest.fixture(scope="module")
def merged(exp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "merged"
    pack(exp, out, PackOptions(form="merged"))
    return out


def texts(folder: Path) -> list[str]:
    """Return what the model in `folder` writes of spoken sentences."""
    waves = [packing_model.speech(sentence) for sentence in packing_model.SENTENCES]
    return [one.text for one in SpeechLLM.from_pretrained(folder, "cpu").recognize(waves, words=False)]


@pytest.mark.slow
def test_the_adapter_form_writes_the_same_texts(exp: Path, tmp_path: Path) -> None:
    assert pack(exp, tmp_path / "packed", PackOptions())
    assert texts(tmp_path / "packed") == texts(exp / "model")
    assert all(texts(exp / "model"))


def test_the_merged_form_writes_the_same_texts_without_the_base_model(exp: Path, merged: Path, tmp_path: Path) -> None:
    wanted = texts(exp / "model")
    language = exp.parent / "lm"
    language.rename(tmp_path / "away")
    try:
        assert texts(merged) == wanted
    finally:
        (tmp_path / "away").rename(language)
    assert {name.split(".")[0] for name in load_tensors(merged / TRAINED_FILE)} == {"projector"}


def test_the_merged_language_model_is_an_ordinary_folder(exp: Path, merged: Path) -> None:
    ours = load_model(exp / "model", device="cpu").lm
    model, report = AutoModelForCausalLM.from_pretrained(merged / "lm", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(merged / "lm")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.vocab_size == len(tokenizer) == len(ours.tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer(packing_model.SENTENCES[0], return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == ours.tokenizer(packing_model.SENTENCES[0])["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours.model(ids).logits)


@pytest.mark.slow
def test_a_language_model_that_was_trained_whole_is_packed_in_both_forms(tmp_path: Path) -> None:
    lm = {"name": str(tmp_path / "lm"), "dtype": "float32", "train": True}
    exp = packing_model.experiment(tmp_path, lm=lm, lora=None)
    pack(exp, tmp_path / "adapter", PackOptions())
    pack(exp, tmp_path / "merged", PackOptions(form="merged"))
    assert texts(tmp_path / "adapter") == texts(tmp_path / "merged") == texts(exp / "model")


def test_two_bytes_a_number_are_half_the_size_and_load_as_four(exp: Path, tmp_path: Path) -> None:
    pack(exp, tmp_path / "packed", PackOptions(dtype="float16"))
    stored = load_tensors(tmp_path / "packed" / TRAINED_FILE)
    whole = load_tensors(exp / "model" / TRAINED_FILE)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = load_model(tmp_path / "packed", device="cpu").projector.state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values())
    name = "projector.hidden.weight"
    assert torch.equal(loaded["hidden.weight"], stored[name].float())
    assert torch.allclose(stored[name].float(), whole[name], rtol=1e-3, atol=1e-6)


def test_a_number_too_large_for_two_bytes_is_named(exp: Path, tmp_path: Path) -> None:
    spoiled = shutil.copytree(exp, tmp_path / "exp")
    state = load_tensors(spoiled / "model" / TRAINED_FILE)
    state["projector.out.bias"][0] = 1e6
    save_tensors(spoiled / "model" / TRAINED_FILE, state)
    with pytest.raises(ConfigError, match=r"projector.out.bias holds a number that float16 cannot; .*bfloat16"):
        pack(spoiled, tmp_path / "packed", PackOptions(dtype="float16"))
    assert not (tmp_path / "packed").exists()
    pack(spoiled, tmp_path / "packed", PackOptions(dtype="bfloat16"))


def test_the_card_tells_data_scores_signature_licences_and_use(exp: Path, score: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("Synthesised; CC-BY 4.0.\n", encoding="utf-8")
    options = PackOptions(scores=(score,), name="Tiny", licence="apache-2.0", notes=notes)
    pack(exp, tmp_path / "packed", options)
    card = (tmp_path / "packed/README.md").read_text(encoding="utf-8")
    head = read_head(card)
    assert head is not None
    assert (head["license"], head["language"], head["library_name"]) == ("apache-2.0", ["ja"], "speechllm")
    assert "base_model" not in head  # a folder of this machine is no name on a hub
    content = json.loads(score.read_text(encoding="utf-8"))
    assert content["metrics"]["cer"]["value"] > 0
    shown = {one["type"]: one["value"] for one in head["model-index"][0]["results"][0]["metrics"]}
    assert shown["cer"] == round(100 * content["metrics"]["cer"]["value"], 2)
    assert f"| tiny_eval | 2 | CER | {shown['cer']:.2f} |" in card
    for said in (
        content["signature"],
        "tiny_train",
        "Synthesised; CC-BY 4.0.",
        "see the model's own card",
        "SpeechLLM.from_pretrained",
        "trust_remote_code=True",
        "## Limits",
        "train_v1",
    ):
        assert said in card


def test_a_score_of_another_model_is_refused(exp: Path, tmp_path: Path) -> None:
    other = packing_model.score(tmp_path / "other", {**packing_model.TRAINING, "minutes": 2.5})
    with pytest.raises(DataError, match="scores the texts of another model"):
        pack(exp, tmp_path / "packed", PackOptions(scores=(other,)))
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "Invalid JSON"), ("[1]", "should be an object"), ('{"metrics": {}}', "signature: Field required")],
)
def test_what_is_no_score_file_is_refused(content: str, message: str, exp: Path, tmp_path: Path) -> None:
    (tmp_path / "score.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        pack(exp, tmp_path / "packed", PackOptions(scores=(tmp_path / "score.json",)))


def test_the_sums_are_those_of_the_files_and_a_damaged_file_is_refused(exp: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    pack(exp, out, PackOptions())
    pairs = [line.split("  ") for line in (out / "SHA256SUMS").read_text(encoding="utf-8").splitlines()]
    assert {name for _, name in pairs} == {path.name for path in out.iterdir()} - {"SHA256SUMS"}
    assert all(hashlib.sha256((out / name).read_bytes()).hexdigest() == digest for digest, name in pairs)
    blob = bytearray((out / TRAINED_FILE).read_bytes())
    blob[-1] ^= 1
    (out / TRAINED_FILE).write_bytes(blob)
    with pytest.raises(ModelError, match=r"trained.safetensors: is damaged: its SHA-256"):
        load_model(out)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"00  ../../passwd", "names ../../passwd, which is not in the folder"),
        (b"00  /dev/zero", "names /dev/zero, which is not in the folder"),
        (b"00 model.json", "is no list of sums and file names"),
        (b"00  \xff", "cannot be read"),
        (b"0" * (1 << 20), "is larger than 1 MiB"),
    ],
)
def test_a_list_of_sums_that_is_none_is_refused(exp: Path, tmp_path: Path, line: bytes, what: str) -> None:
    out = tmp_path / "packed"
    pack(exp, out, PackOptions())
    with (out / "SHA256SUMS").open("ab") as stream:
        stream.write(line + b"\n")
    for read in (load_model, lambda folder: pack(exp, folder, PackOptions())):
        with pytest.raises(ModelError, match=re.escape(what)):
            read(out)


def test_an_unknown_form_and_an_unknown_profile_are_refused(exp: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    pack(exp, out, PackOptions())
    record = read_json(out / "model.json")
    write_json(out / "model.json", {**record, "form": "sparse"})
    with pytest.raises(ModelError, match=r"has the unknown form sparse; .*adapter, merged"):
        read_model(out)
    write_json(out / "model.json", {**record, "text_profiles": ["train_v99"]})
    with pytest.raises(UserError, match="'train_v99': no such text profile"):
        read_model(out)


def test_packing_again_does_nothing_and_other_scores_are_taken_in(exp: Path, score: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    assert pack(exp, out, PackOptions())
    before = (out / "README.md").stat().st_mtime_ns
    assert not pack(exp, out, PackOptions())
    assert (out / "README.md").stat().st_mtime_ns == before
    assert pack(exp, out, PackOptions(scores=(score,)))
    assert "tiny_eval" in (out / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_another_model_and_a_folder_of_something_else_are_left_alone(exp: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    pack(exp, out, PackOptions())
    other = shutil.copytree(exp, tmp_path / "other")
    state = load_tensors(other / "model" / TRAINED_FILE)
    state["projector.out.bias"] += 1
    save_tensors(other / "model" / TRAINED_FILE, state)
    with pytest.raises(DataError, match="packed: holds another model; remove the folder or choose another"):
        pack(other, out, PackOptions())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter").write_text("dear", encoding="utf-8")
    with pytest.raises(DataError, match="is there and is no packed folder"):
        pack(exp, tmp_path / "mine", PackOptions())
    assert (tmp_path / "mine/letter").read_text(encoding="utf-8") == "dear"


def test_a_fault_on_the_way_leaves_the_older_folder_as_it_was(
    exp: Path, score: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    pack(exp, out, PackOptions())
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "_write_sums", full)
    with pytest.raises(OSError, match="No space left"):
        pack(exp, out, PackOptions(scores=(score,)))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob(".packed.*.tmp"))


def test_heads_beside_the_model_are_taken_along(exp: Path, tmp_path: Path) -> None:
    own = shutil.copytree(exp, tmp_path / "exp")
    save_tensors(own / "model/heads.safetensors", {"kana.weight": torch.ones(2, 2)})
    write_json(own / "model/heads.json", {"symbols": 2})
    pack(own, tmp_path / "packed", PackOptions(dtype="float16"))
    assert load_tensors(tmp_path / "packed/heads.safetensors")["kana.weight"].dtype == torch.float16
    assert read_json(tmp_path / "packed/heads.json") == {"symbols": 2}


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    exp = packing_model.experiment(tmp_path)
    conf = exp / "model/config.yaml"
    content = yaml.safe_load(conf.read_text(encoding="utf-8"))
    content["lm"]["quantize"] = "nf4"
    conf.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--form merged: a language model in four bits .*--form adapter"):
        pack(exp, tmp_path / "packed", PackOptions(form="merged"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--form", "sparse"], "error: --form: there is no sparse; choose one of adapter, merged\n"),
        (["--dtype", "int8"], "error: --dtype: there is no int8; choose one of float32, bfloat16, float16\n"),
        (["--export", "onnx"], "error: --export: there is no onnx; choose one of vllm\n"),
        (["--scores", "no.json"], "error: no.json: no such score file; score again (stage 5)\n"),
        (["--notes", "no.md"], "error: no.md: no such file of notes; write it, or leave --notes out\n"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], line: str, exp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["pack", "--exp", str(exp), "--out", str(tmp_path / "packed"), *options]) == 2
    assert capsys.readouterr().err.endswith(line)
    assert not (tmp_path / "packed").exists()


def test_a_folder_without_a_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["pack", "--exp", str(tmp_path), "--out", str(tmp_path / "packed")]) == 2
    assert "holds no trained model (model.json is missing); run stage 3 first" in capsys.readouterr().err

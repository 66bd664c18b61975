"""Any encoder with any language model: a step, a stop, another step, texts, and the same texts of a second load."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch

from speechllm import stages
from speechllm.config import load as configs
from speechllm.data import kaldi
from speechllm.dump import dump
from speechllm.errors import Stopped
from speechllm.model.assemble import TRAINED_FILE
from speechllm.model.encoder import FAMILIES
from speechllm.model.state import load_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
ENCODERS = ("wavlm", "hubert", "hubert-large", "wav2vec2", "whisper", "w2v-bert")
SAMPLES = {"a": 6_400, "b": 9_100, "c": 4_001}


@dataclass(frozen=True)
class Setting:
    """Sounds, models, and what each encoder makes of the sounds."""

    data: Path
    encoders: Mapping[str, Path]
    lms: Mapping[str, Path]
    stores: Mapping[str, Path]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    base = tmp_path_factory.mktemp("matrix")
    made = Setting(
        tiny.data_folder(base / "in", SAMPLES),
        {name: tiny.ENCODERS[name](base / "encoders" / name) for name in ENCODERS},
        {name: make(base / "lms" / name) for name, make in tiny.LMS.items()},
        {name: base / "stores" / name for name in ENCODERS},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speechllm.dump.worker_pool", tiny.HerePool)
        for name, store in made.stores.items():
            config = tiny.config(made.encoders[name], made.lms["llama"])
            assert dump(config.encoder, "cpu", made.data, store, workers=1) == len(SAMPLES)
    return made


def stop_at_the_next_validation(patch: pytest.MonkeyPatch) -> None:
    """Let a signal come while the state after a step is being looked at."""
    measure = stages.error_rate

    def interrupted(refs: Mapping[str, str], hyps: Mapping[str, str]) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(refs, hyps)

    patch.setattr(stages, "error_rate", interrupted)


def trained(exp: Path) -> list[dict[str, Any]]:
    """Return the records of the steps that were taken."""
    lines = (exp / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


@pytest.mark.parametrize("lm", tiny.LMS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_pair_trains_stops_goes_on_and_decodes(
    encoder: str, lm: str, setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    conf, exp, store = tmp_path / "conf.yaml", tmp_path / "exp", setting.stores[encoder]
    config = tiny.config(
        setting.encoders[encoder],
        setting.lms[lm],
        lora={"rank": 2, "alpha": 4, "targets": list(tiny.LORA_TARGETS[lm])},
        train={"epochs": 2, "validate_every": 1, "peak_lr": 1e-2, "lora_lr": 1e-2},
        template="{prompt}\n{audio}です",  # a random model with a tied head says the last token again: no newline
        decode={"extra_tokens": 5, "tokens_per_s": 2.0, "min_tokens": 3},
    )
    configs.dump(config, conf)
    with pytest.MonkeyPatch.context() as patch:
        stop_at_the_next_validation(patch)
        with pytest.raises(Stopped, match="speech saved at step 1 of 2; run again to go on"):
            stages.train(conf, store, store, exp)
    first = trained(exp)
    with caplog.at_level("INFO"):
        stages.train(conf, store, store, exp)
    assert "speech resumed step=1 of=2" in caplog.text
    assert [record["step"] for record in trained(exp)] == [1, 2]
    assert trained(exp)[:1] == first
    for record in trained(exp):
        assert math.isfinite(record["loss"])
        assert record["grad_norm"] > 0
    moved = {key: value for key, value in load_tensors(exp / "model" / TRAINED_FILE).items() if "lora_B" in key}
    assert len(moved) == 2 * len(tiny.LORA_TARGETS[lm])
    assert all(value.abs().max() > 0 for value in moved.values())  # they begin as zeros

    assert stages.decode(exp, store, tmp_path / "stored", {}) == len(SAMPLES)
    texts = kaldi.read_table(tmp_path / "stored" / "text")
    assert texts.keys() == SAMPLES.keys()
    assert any(texts.values())
    # the folder is read a second time, and the encoder reads the sounds itself
    assert stages.decode(exp, setting.data, tmp_path / "sounds", {}) == len(SAMPLES)
    assert kaldi.read_table(tmp_path / "sounds" / "text") == texts


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_tokenizer_of_qwens_kind_has_no_beginning_and_loses_no_text(name: str, setting: Setting) -> None:
    lm = tiny.load(setting.lms[name])
    assert lm.tokenizer.bos_token_id is None
    assert len(lm.tokenizer) < lm.model.get_input_embeddings().num_embeddings
    for text in (*tiny.TEXTS, "𠮷野家 😀"):
        assert lm.tokenizer.decode(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def model_type(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])


def rows(heading: str) -> dict[str, str]:
    """Return the table's rows below a heading of the page, by the ``model_type`` in their second column."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    found = [(match[1], match[0]) for match in re.finditer(r"^\|[^|`]+\| `([\w-]+)` \|.*$", section, re.MULTILINE)]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_the_page_lists_the_encoders_that_are_tested_and_those_that_load_besides(setting: Setting) -> None:
    listed = rows("Encoders")
    assert set(listed) == set(FAMILIES)
    assert {name for name, row in listed.items() if row.endswith("| yes |")} == {
        model_type(folder) for folder in setting.encoders.values()
    }


def test_the_page_lists_the_language_models_that_are_tested_with_their_linear_layers(setting: Setting) -> None:
    listed = rows("Language models")
    assert set(listed) == {model_type(folder) for folder in setting.lms.values()}
    for folder in setting.lms.values():
        body = tiny.load(folder).model.base_model
        linear = {name.split(".")[-1] for name, part in body.named_modules() if isinstance(part, torch.nn.Linear)}
        columns = listed[model_type(folder)].split("|")
        assert set(re.findall(r"`(\w+)`", columns[3])) == linear, folder.name

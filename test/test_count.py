"""Parameters are counted part by part, without weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from speechllm.cli import run
from speechllm.count import count_config, count_table
from speechllm.model.assemble import assemble, origin_of
from speechllm.model.encoder import load_encoder
from speechllm.model.shapes import count, skeleton

RECIPE = Path(__file__).resolve().parents[1] / "egs/jsut/asr1"
TABLE = RECIPE / "tables/paper.yaml"


@pytest.fixture(scope="module")
def records() -> dict[str, dict[str, object]]:
    return {str(record["row"]): record for record in count_table(TABLE)}


def test_the_proposed_row_has_the_published_sizes(records: dict[str, dict[str, object]]) -> None:
    row = records["WavLM-Large + conv/MLP projector + youri-7b + LoRA (proposed)"]
    assert row["encoder"] == 315_452_096
    assert row["projector"] == 15_735_808
    assert row["lora"] == 4_194_304
    assert row["llm"] == 6_738_415_616
    assert row["trainable"] == 15_735_808 + 4_194_304
    assert row["published"] == "19M"


def test_grouped_query_attention_makes_a_smaller_adapter(records: dict[str, dict[str, object]]) -> None:
    assert records["LLM llama-3-youko-8b"]["lora"] == 3_407_872
    assert records["LLM llama-3-youko-8b"]["llm"] == 8_030_261_248


def test_rows_that_leave_something_out_have_nothing_of_it(records: dict[str, dict[str, object]]) -> None:
    assert records["without LoRA"]["lora"] == 0
    assert records["without LoRA"]["trainable"] == 15_735_808
    assert records["without MLP (linear projector)"]["projector"] == (1024 * 5 + 1) * 4096


def test_nue_is_trained_whole_and_near_the_published_size(records: dict[str, dict[str, object]]) -> None:
    row = records["rinna/nue-asr"]
    assert row["projector"] == 6_885_632
    assert row["trainable"] == row["total"]
    assert row["published"] == "3708M"
    assert isinstance(row["total"], int)
    assert abs(row["total"] / 1e6 - 3708) < 1


def test_whisper_large_v3_is_near_the_published_size(records: dict[str, dict[str, object]]) -> None:
    total = records["openai/whisper-large-v3"]["total"]
    assert isinstance(total, int)
    assert abs(total / 1e6 - 1541) < 5


def test_a_row_that_cannot_be_counted_shows_what_was_published(records: dict[str, dict[str, object]]) -> None:
    name = "reazon-research/reazonspeech-espnet-v2"
    unknown = dict.fromkeys(["encoder", "projector", "lora", "llm", "trainable", "total"])
    assert records[name] == {"row": name, **unknown, "published": "119M"}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_counts_are_those_of_the_model_that_is_built(tmp_path: Path, name: str) -> None:
    encoder, lm = tiny.wavlm(tmp_path / "encoder"), tiny.LMS[name](tmp_path / "lm")
    adapter = {"rank": 4, "targets": list(tiny.LORA_TARGETS[name])}
    config = tiny.config(encoder, lm, lora=adapter, encoder={"name": str(encoder), "layer": 1})
    counted = count_config(config)
    built = assemble(config, origin_of(config, 16, "fp", tiny.TEXTS), "float32")
    trained = sum(value.numel() for value in built.parameters() if value.requires_grad)
    assert counted["trainable"] == trained
    assert counted["llm"] + counted["lora"] == count(built.lm_model)
    assert counted["encoder"] == count(load_encoder(config.encoder, tiny.found(encoder), tiny.CPU).module)


def test_nothing_is_held_in_memory() -> None:
    from speechllm.config import load as configs

    parts = skeleton(configs.load(RECIPE / "conf/jsut.yaml"))
    assert {value.device.type for value in parts.lm.parameters()} == {"meta"}


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["params", "--table", str(TABLE), "--json", str(tmp_path / "params.json")]) == 0
    shown = capsys.readouterr().out
    assert "19,930,112" in shown
    content = json.loads((tmp_path / "params.json").read_text(encoding="utf-8"))
    assert {"row", "encoder", "projector", "lora", "llm", "trainable", "total"} <= content[0].keys()
    assert len(shown.splitlines()) == len(content) + 1


def test_one_configuration_or_one_table_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["params"]) == 2
    assert capsys.readouterr().err == "error: params: needs one of --conf and --table; give one\n"

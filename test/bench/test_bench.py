"""Benchmarks: what is compared is equal first, what is counted is exact, and a fault is one line."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch

from speechllm import cli
from speechllm.bench import corpus, decode, models, train
from speechllm.bench.closer import closer_look
from speechllm.bench.count import one_pass
from speechllm.errors import EXIT_OURS, EXIT_USER
from speechllm.model.encoder import Frames
from speechllm.model.lm import LanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from speechllm.bench.train import Bench

TRAIN_SYSTEMS = {"ours", "slam_style", "hf_trainer", "padded"}
COUNTERS = {
    "steps",
    "positions",
    "padded",
    "padding",
    "logit_rows",
    "gflop",
    "saved_kb_per_position",
    "saved_mb_largest_batch",
}
BEFORE = 16  # <s>, the fourteen characters of the prompt, line feed


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.run(["bench", *(str(argument) for argument in arguments)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def _check_common(found: dict[str, Any], ratios: set[str], systems: set[str]) -> None:
    assert found["equal"] is True
    assert found["ratios"].keys() == ratios
    assert all(isinstance(ratio, float) and ratio > 0 for ratio in found["ratios"].values())
    assert found["counters"].keys() == found["seconds"].keys() == systems
    assert {"cpu", "threads", "device", "date", "commit", "versions"} <= found["machine"].keys()


def test_training_is_compared_with_three_others(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = _run(
        capsys, "train", "--quick", "--size", "tiny", "--tokens", "300,600", "--json", tmp_path / "found.json"
    )
    assert status == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    _check_common(found, {"vs_slam_style", "vs_hf_trainer", "vs_padded"}, TRAIN_SYSTEMS)
    assert all(counted.keys() == COUNTERS for counted in found["counters"].values())
    assert all(one["loss"] < 1e-5 and one["gradients"] < 1e-4 for one in found["differences"].values())
    assert found["counters"]["ours"]["padded"] == 0
    assert found["counters"]["ours"]["positions"] < found["settings"]["utterance_positions"]
    small, large = found["closer"]
    assert small["batches"] > large["batches"]
    assert small["profile"][0]["ms"] >= small["profile"][1]["ms"] > 0
    assert small["peak_gib"] is None
    for name in ("slam_style", "vs_hf_trainer", "ours 600"):
        assert name in out


def test_decoding_is_compared_with_generate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    assert cli.run(["bench", "decode", "--quick", "--size", "tiny", "--json", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["equal"] is True
    assert set(found["ratios"]) == {"vs_per_utterance", "vs_batched_generate", "vs_sorted_generate"}
    assert all(difference == {"texts": 0.0} for difference in found["differences"].values())
    counters = found["counters"]
    assert set(counters) == {"ours 1", "ours 8", "generate 1", "generate 8", "generate 8 sorted"}
    assert counters["ours 8"]["over needed"] == counters["ours 1"]["over needed"] == 1.0
    assert (
        counters["generate 8"]["row steps"]
        > counters["generate 8 sorted"]["row steps"]
        > counters["ours 8"]["row steps"]
    )
    assert counters["ours 8"]["positions"] < counters["generate 1"]["positions"]  # the prompt is read once
    assert "ours 8" in capsys.readouterr().out


def test_other_tokens_end_the_benchmark(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decode.Ours.decode

    def off(self: decode.Ours, data: decode.Set) -> decode.Texts:
        found = whole(self, data)
        first = next(iter(found))
        return {**found, first: (*found[first][:-1], found[first][-1] + 1)}

    monkeypatch.setattr(decode.Ours, "decode", off)
    assert cli.run(["bench", "decode", "--quick", "--size", "tiny"]) == EXIT_OURS
    assert capsys.readouterr().err.endswith("error: bench: decode: ours 1 gave 1 other texts than generate 1\n")


def test_the_dump_is_compared_with_a_plain_loop(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = _run(capsys, "dump", "--quick", "--size", "tiny", "--json", tmp_path / "found.json")
    assert status == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    ratios = {"vs_hf_loop", "whisper_vs_hf_loop", "whisper_true_length_vs_hf_loop"}
    _check_common(found, ratios, {"ours", "hf_loop", "whisper", "whisper_hf_loop", "whisper_true_length"})
    assert found["differences"].keys() == {"ours", "whisper"}
    assert found["counters"]["ours"]["utterances"] == 3
    assert "whisper_hf_loop" in out


def test_features_that_differ_end_the_benchmark(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Frames.frames
    monkeypatch.setattr(Frames, "frames", lambda self, waves_s: [1.01 * row for row in right(self, waves_s)])
    status, out, err = _run(capsys, "dump", "--quick", "--size", "tiny")
    assert (status, out) == (EXIT_OURS, "")
    assert err.splitlines()[-1].startswith("error: bench: dump: made-0000")
    assert "steps of float16 from what hf_loop made" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda nll: nll * 1.001, "error: bench: train: ours has a loss of "),
        (lambda nll: 2 * nll - nll.detach(), "error: bench: train: the gradient of "),
        (lambda nll: nll * torch.nan, "error: bench: train: ours has a loss of nan"),
    ],
)
def test_a_wrong_loss_or_gradient_ends_the_benchmark(
    change: Callable[[Tensor], Tensor],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    right = LanguageModel.nll
    monkeypatch.setattr(LanguageModel, "nll", lambda self, *states: change(right(self, *states)))
    monkeypatch.setitem(models.SIZES, "tiny", dataclasses.replace(models.SIZES["tiny"], num_utts=4))
    status, out, err = _run(capsys, "train", "--size", "tiny", "--json", tmp_path / "found.json")
    assert (status, out) == (EXIT_OURS, "")
    assert err.splitlines()[-1].startswith(message)
    assert err.count("error:") == 1
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["score"], "error: bench: there is no benchmark score; choose one of train, decode, dump\n"),
        (["decode", "--size", "13b"], "error: bench: there is no size 13b; choose tiny, small, 7b\n"),
        (["train", "--size", "13b"], "error: bench: there is no size 13b; choose tiny, small, 7b\n"),
        (["dump", "--size", "7b"], "error: bench: dump has no size 7b; choose tiny, small, large\n"),
        (["dump", "--tokens", "4096"], "error: bench: dump has no --tokens; leave it out\n"),
        (["train", "--tokens", "4k"], "error: bench: --tokens 4k is no list of numbers; write it as 4096,8192\n"),
        (["train", "--tokens", "1,,2"], "error: bench: --tokens 1,,2 is no list of numbers; write it as 4096,8192\n"),
        (["train", "--tokens", "0"], "error: bench: --tokens 0 is no list of numbers; write it as 4096,8192\n"),
    ],
)
def test_a_wrong_name_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], line: str) -> None:
    assert _run(capsys, *arguments) == (EXIT_USER, "", line)


def test_a_missing_accelerate_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_settings: object) -> None:
        raise ImportError("accelerate")

    monkeypatch.setattr("transformers.TrainingArguments", refuse)
    monkeypatch.setitem(models.SIZES, "tiny", dataclasses.replace(models.SIZES["tiny"], num_utts=4))
    status, _, err = _run(capsys, "train", "--size", "tiny")
    assert status == EXIT_USER
    line = "error: bench: transformers' Trainer needs the package accelerate; run: pip install accelerate"
    assert err.splitlines()[-1] == line


def _bench(folder: Path, size: models.Size, dtype: str = "float32", *, by_hand: bool = False) -> Bench:
    made_up = None
    if by_hand:  # frames and characters: projected to 2, 4 and 3 tokens
        lengths = {"a": (7, 5), "b": (20, 1), "c": (12, 3)}
        made_up = [corpus.Utterance(key, frames / 50, "一" * chars) for key, (frames, chars) in lengths.items()]
    return train.prepare(size, models.config_of(size, tiny.CPU, dtype), folder, made_up)


def test_counters_are_those_of_a_set_worked_out_by_hand(tmp_path: Path) -> None:
    bench = _bench(tmp_path, models.SIZES["tiny"], by_hand=True)
    counted = {system.name: one_pass(system).counts for system in train.systems_of(bench)}
    # what is read: prompt, sound, line feed, then the answer with its end, whose last token predicts nothing
    behind = {"a": 2 + 1 + 5, "b": 4 + 1 + 1, "c": 3 + 1 + 3}
    alone = {key: BEFORE + count for key, count in behind.items()}
    answers = {"a": 6, "b": 2, "c": 4}
    whole = sum(alone.values()) + len(alone)  # the others read the last token too
    ours, padded = counted["ours"], counted["padded"]
    assert (ours.steps, ours.positions, ours.padded, ours.logit_rows) == (1, BEFORE + sum(behind.values()), 0, 12)
    assert (padded.positions, padded.padded) == (3 * alone["a"], 3 * alone["a"] - sum(alone.values()))
    assert padded.logit_rows == sum(answers.values())
    trainer, slam = counted["hf_trainer"], counted["slam_style"]
    assert (trainer.positions, trainer.padded) == (3 * (alone["a"] + 1), 3 * (alone["a"] + 1) - whole)
    # answers begin together: behind the longest sound (b), and the longest of them (a)
    assert slam.positions == 3 * (BEFORE + 4 + 1 + answers["a"])
    assert slam.padded == slam.positions - whole
    assert trainer.logit_rows == trainer.positions
    assert slam.logit_rows == slam.positions
    assert bench.utterance_positions == sum(alone.values())


def test_operations_and_saved_bytes_are_those_of_the_shapes(tmp_path: Path) -> None:
    size = models.SIZES["tiny"]
    bench = _bench(tmp_path, size, by_hand=True)
    counted = {system.name: one_pass(system).counts for system in train.systems_of(bench)}
    assert isinstance(size.lm, dict)
    width, inner, layers = size.lm["hidden_size"], size.lm["intermediate_size"], size.lm["num_hidden_layers"]
    block = 4 * width**2 + 3 * width * inner
    adapter = 2 * 2 * 8 * width  # two layers, two factors of rank 8
    projected = 3 * 4  # tokens of three rows, padding included
    hidden, width_h = size.hidden, size.width_h
    projector = 4 * 5 * width_h**2 + 6 * (width_h * hidden + hidden * width)  # nothing flows back into the frames
    for name, lengths in {"ours": [(16, 16), (8, 24), (6, 22), (7, 23)], "hf_trainer": [(25, 25)] * 3}.items():
        counts = counted[name]
        products = layers * (4 * block + 6 * adapter) * counts.positions
        products += 4 * width * size.lm["vocab_size"] * counts.logit_rows + projector * projected
        attention = layers * 4 * width * sum(queries * keys for queries, keys in lengths)
        # backward twice to two and a half times the forward pass, by kernel
        assert 3 * attention <= counts.flops - products <= 3.5 * attention, name
        least = 4 * counts.positions * layers * (4 * width + 2 * inner)
        assert least < counts.saved_bytes == counts.peak_saved_bytes < 8 * least, name


def test_a_model_of_a_published_shape_in_bfloat16_takes_the_same_path(tmp_path: Path) -> None:
    size = dataclasses.replace(models.SIZES["tiny"], lm=str(tiny.llama(tmp_path / "llama")), num_utts=8)
    bench = _bench(tmp_path, size, "bfloat16")
    assert bench.made.model.lm.model.config.num_key_value_heads == 1
    assert bench.made.model.lm.model.dtype == torch.bfloat16
    outcome = train.compare(bench, [200], tmp_path)
    assert outcome.record()["equal"] is True
    assert outcome.closer[0]["fits"] is True


def test_a_batch_that_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _bench(tmp_path, models.SIZES["tiny"], by_hand=True)

    def full(*_batch: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LanguageModel, "nll", full)
    ours = bench.ours("ours 64", packing=True, batch_tokens=64)
    assert closer_look(ours, bench, tmp_path) == {"system": "ours 64", "fits": False}


def test_all_systems_share_the_frozen_weights(tmp_path: Path) -> None:
    bench = _bench(tmp_path, models.SIZES["tiny"], by_hand=True)
    ours, slam, trainer, _ = train.systems_of(bench)
    name = "layers.0.mlp.up_proj.weight"
    frozen = {system.lm.base_model.get_parameter(name).data_ptr() for system in (ours, slam, trainer)}
    assert len(frozen) == 1
    trained = [system.trained() for system in (ours, slam, trainer)]
    assert trained[0].keys() == trained[1].keys() == trained[2].keys()
    for key, value in trained[0].items():
        assert torch.equal(value, trained[1][key])
        assert len({one[key].data_ptr() for one in trained}) == 3


def test_lengths_are_those_of_the_corpus() -> None:
    drawn = corpus.draw(500, "一二三", seed=1)
    assert drawn == corpus.draw(500, "一二三", seed=1)
    assert drawn != corpus.draw(500, "一二三", seed=2)
    characters = sorted(len(one.text) for one in drawn)
    assert sum(characters) / 500 == pytest.approx(corpus.MEAN_CHARACTERS, rel=0.03)
    assert 5 <= characters[0] <= 17
    assert characters[250] in {24, 25, 26}
    assert 60 < characters[-1] <= 97
    assert sum(one.duration_s for one in drawn) / 500 == pytest.approx(corpus.MEAN_DURATION_S, rel=0.03)


def test_every_character_of_a_prompt_and_of_a_text_is_one_token() -> None:
    spelled = tiny.PROMPT + "\n"
    made = corpus.tokenizer(100, spelled)
    kanji = corpus.kanji_of(100, spelled)
    text = spelled + kanji
    assert len(made) == 100
    assert len(set(made(text, add_special_tokens=False)["input_ids"])) == len(set(text)) == 96
    assert made(made.unk_token)["input_ids"] != made(kanji[0])["input_ids"]

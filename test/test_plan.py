"""What a run would take, from the arithmetic of the hardware."""

from __future__ import annotations

from pathlib import Path

import pytest

from speechllm.cli import run
from speechllm.config import load as configs
from speechllm.errors import ConfigError
from speechllm.plan import Plan, plan

CONF = Path(__file__).resolve().parents[1] / "egs/jsut/asr1/conf"


def made(name: str, gpu: str = "h100", gpus: int = 1, hours: float = 1000.0) -> Plan:
    return plan(configs.load(CONF / f"{name}.yaml"), hours, gpus, gpu)


def test_the_proposed_row_is_near_what_was_counted_by_hand() -> None:
    """25.9 GFLOP a position, 37.6 GFLOP a second of sound in WavLM; 369 GB of features; 4.5 MB a position."""
    found = made("jsut")
    assert found.tokens_per_s == pytest.approx(10 + 5)
    assert found.flops_per_s / found.tokens_per_s / 1e9 == pytest.approx(25.9, rel=0.02)
    assert found.encoder_flops_per_s / 1e9 == pytest.approx(37.6, rel=0.05)
    assert found.store_gb == pytest.approx(369, rel=0.01)
    assert found.bytes_per_token / 1e6 == pytest.approx(4.48, rel=0.1)


def changed(**train: object) -> Plan:
    config = configs.load(CONF / "jsut.yaml")
    return plan(config.model_copy(update={"train": config.train.model_copy(update=train)}), 1000.0, 1, "h100")


def test_what_training_can_do_without_is_not_counted() -> None:
    whole, alone, twice = made("jsut"), changed(share_prompt=False), changed(checkpointing=True)
    assert alone.tokens_per_s == pytest.approx(10 + 5 + 15 / 7)
    assert twice.bytes_per_token < whole.bytes_per_token / 8
    assert 1.4 < twice.flops_per_s / whole.flops_per_s <= 1.5


def test_more_cards_take_less_time_and_a_larger_one_holds_more() -> None:
    one, eight = made("jsut"), made("jsut", gpus=8)
    assert eight.train_hours == pytest.approx(one.train_hours / 8)
    assert eight.audio_hours_per_gpu_hour == pytest.approx(one.audio_hours_per_gpu_hour)
    assert made("jsut", "h200").fitting_tokens > one.fitting_tokens > 0
    assert made("jsut", hours=2000.0).train_hours == pytest.approx(2 * one.train_hours)


def test_four_bits_fit_where_sixteen_do_not() -> None:
    assert made("jsut_qlora").fixed_gib < made("jsut").fixed_gib / 2
    assert made("jsut_qlora", "rtx4090").fitting_tokens > made("jsut", "rtx4090").fitting_tokens


def test_a_model_that_is_trained_whole_holds_its_moments_and_stores_no_features() -> None:
    whole = made("jsut_nue")
    assert whole.fixed_gib * 2**30 == pytest.approx(16 * 3.708e9 + 6 * 3.607e9, rel=0.01)
    assert whole.state_gb == pytest.approx(12 * 3.708, rel=0.01)
    assert whole.store_gb == whole.dump_hours == 0.0
    assert made("jsut_nue", "rtx4090").fitting_tokens == 0


def test_a_batch_that_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--conf", str(CONF / "jsut.yaml"), "--hours", "1", "--gpu"]
    assert run([*arguments, "rtx4090"]) == 0
    assert "8,192, more than fit" in capsys.readouterr().out
    assert run([*arguments, "h200"]) == 0
    assert "more than fit" not in capsys.readouterr().out


def test_the_command_names_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--conf", str(CONF / "jsut.yaml"), "--hours", "1000", "--gpus", "8", "--gpu", "a100"]
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("1000 h of sound, 3 epochs, 8 x a100\n")
    assert "assumed:\n  utterances of 7 s, 5 text tokens a second, 15 prompt tokens\n" in shown
    assert "40% of 312 TFLOP/s" in shown


def test_an_unknown_card_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no figures of this card; choose one of h100, h200"):
        made("jsut", "voodoo2")

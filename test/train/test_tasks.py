"""What is trained, with which data, and how it is measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
import torch

from speechllm.config.schema import CtcProjector
from speechllm.data.dataset import FeatureSet
from speechllm.model.assemble import assemble, origin_of
from speechllm.model.ctc import KANA
from speechllm.model.projector import CtcBridge
from speechllm.train.tasks import CtcTask, Features, Ready, SpeechTask
from speechllm.train.trainer import Loop, LoopOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from speechllm.model.speechllm import SpeechLlm
    from speechllm.train.task import Outcome

TRAIN = {f"t{number}": tiny.TEXTS[number] for number in range(5)}
TRAIN_FRAMES = {"t0": 40, "t1": 37, "t2": 61, "t3": 25, "t4": 12}
VALID = {f"v{number}": tiny.TEXTS[number % 3] for number in range(7)}
VALID_FRAMES = {f"v{number}": 20 + 5 * number for number in range(7)}
CTC = {"kind": "ctc", "hidden": 8, "dropout": 0.2}
OPTIONS = LoopOptions(
    epochs=3, accumulate=1, warmup=0.1, weight_decay=0.0, clip_norm=1.0, validate_every=4, save_every=2
)


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureSet, FeatureSet]:
    base = tmp_path_factory.mktemp("features")
    train = tiny.feature_folder(base / "train", TRAIN, TRAIN_FRAMES)
    valid = tiny.feature_folder(base / "valid", VALID, VALID_FRAMES)
    return FeatureSet(train), FeatureSet(valid)


class Measured:
    """A measure that remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, str], dict[str, str]]] = []

    def __call__(self, refs: Mapping[str, str], hyps: Mapping[str, str]) -> float:
        self.calls.append((dict(refs), dict(hyps)))
        return 0.25


def made(lm_folder: Path, sets: tuple[FeatureSet, FeatureSet], **fields: object) -> tuple[Features, SpeechLlm]:
    config = tiny.config(lm_folder, lm_folder, **fields)
    model = assemble(config, origin_of(config, tiny.WIDTH_H, "fp", tiny.TEXTS), "float32")
    return Features(config, *sets, tiny.CPU), model


def speech_task(lm_folder: Path, sets: tuple[FeatureSet, FeatureSet], **fields: object) -> SpeechTask:
    features, model = made(lm_folder, sets, **fields)
    return SpeechTask(features, model, lambda ids: {key: f"text of {key}" for key in ids}, Measured())


def ctc_task(lm_folder: Path, sets: tuple[FeatureSet, FeatureSet], **fields: object) -> CtcTask:
    features, model = made(lm_folder, sets, projector=CTC, **fields)
    assert isinstance(model.projector, CtcBridge)
    assert isinstance(features.config.projector, CtcProjector)
    return CtcTask(features, model.projector, features.config.projector, Measured())


def cost(task: SpeechTask | CtcTask, utt_ids: Sequence[str], epoch: int = 0) -> Outcome:
    return task.loss(task.prepare(utt_ids, epoch))


def test_projector_and_adapter_have_their_own_rates(lm_folder: Path, sets: tuple[FeatureSet, FeatureSet]) -> None:
    task = speech_task(lm_folder, sets, train={"peak_lr": 0.5, "lora_lr": 0.25})
    projector, adapter = task.groups()
    assert (projector.peak_lr, adapter.peak_lr) == (0.5, 0.25)
    assert all(name.startswith("projector.") for name in projector.named)
    assert all("lora_" in name for name in adapter.named)
    trainable = {name for name, value in task.model.named_parameters() if value.requires_grad}
    assert projector.named.keys() | adapter.named.keys() == trainable
    assert len(adapter.named) == 8


def test_a_bridges_head_stays_as_it_was_trained(lm_folder: Path, sets: tuple[FeatureSet, FeatureSet]) -> None:
    task = speech_task(lm_folder, sets, projector=CTC)
    assert set(task.groups()[0].named) == {"projector.residual.weight", "projector.residual.bias"}
    cost(task, ["t0", "t1"]).nll.backward()  # type: ignore[no-untyped-call]
    touched = {name for name, value in task.model.named_parameters() if value.grad is not None}
    assert not any(name.startswith("projector.head") for name in touched)


def test_sizes_are_the_positions_that_the_language_model_reads(
    lm_folder: Path, sets: tuple[FeatureSet, FeatureSet]
) -> None:
    task = speech_task(lm_folder, sets, train={"packing": False})
    frames_beh, frames_b = task.features.training(task.prepare(list(TRAIN), 0))
    spliced = task.model.splice(frames_beh, frames_b, list(TRAIN.values()))
    assert list(task.sizes.values()) == spliced.mask_bl.sum(dim=1).tolist()
    sharing = speech_task(lm_folder, sets)
    cost = sharing.loss(sharing.prepare(list(TRAIN), 0))
    assert cost.positions == sharing.positions(list(TRAIN)) == sum(sharing.sizes.values()) + sharing.shared
    assert (cost.padded, sharing.shared) == (0, sharing.model.shared_positions())


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_batches_hold_every_utterance_once_within_the_budget(
    lm_folder: Path, sets: tuple[FeatureSet, FeatureSet], epoch: int, *, packing: bool
) -> None:
    task = speech_task(lm_folder, sets, train={"batch_tokens": 60, "packing": packing})
    batches = task.batches(epoch)
    assert sorted(key for batch in batches for key in batch) == sorted(TRAIN)
    assert all(task.positions(batch) <= 60 for batch in batches)
    assert len(batches) > 1


def test_the_loss_of_an_utterance_is_a_function_of_the_epoch(
    lm_folder: Path, sets: tuple[FeatureSet, FeatureSet]
) -> None:
    task = speech_task(lm_folder, sets, train={"augment": {"time_masks": 2, "noise": 0.5}})
    first, again, later = (float(cost(task, ["t2"], epoch).nll.detach()) for epoch in (0, 0, 1))
    assert first == again != later


def test_training_frames_are_augmented_and_validation_frames_are_not(
    lm_folder: Path, sets: tuple[FeatureSet, FeatureSet]
) -> None:
    features, _ = made(lm_folder, sets, train={"augment": {"noise": 1.0}})
    plain = sets[0].frames("t0")
    assert not np.allclose(features.training(features.prepare(["t0"], 0))[0][0].numpy(), plain)
    np.testing.assert_array_equal(features.validation(["v0"])[0][0].numpy(), sets[1].frames("v0"))


def test_validation_batches_hold_every_utterance_once_the_short_ones_first(
    lm_folder: Path, sets: tuple[FeatureSet, FeatureSet]
) -> None:
    features, _ = made(lm_folder, sets)
    assert features.validation_batches(3) == [["v0", "v1", "v2"], ["v3", "v4", "v5"], ["v6"]]


@pytest.mark.parametrize(("wanted", "number"), [(1, 1), (3, 3), (4, 4), (6, 6), (7, 7), (64, 7)])
def test_as_many_validation_utterances_are_decoded_as_were_asked_for(
    lm_folder: Path, sets: tuple[FeatureSet, FeatureSet], wanted: int, number: int
) -> None:
    task = speech_task(lm_folder, sets, train={"valid_utts": wanted})
    result = task.validate().scores
    assert isinstance(task.measure, Measured)
    ((refs, hyps),) = task.measure.calls
    assert len(refs) == number
    assert refs == {key: VALID[key] for key in refs}
    assert hyps == {key: f"text of {key}" for key in refs}
    assert result["score"] == result["cer"] == 0.25


def test_the_validation_loss_is_that_of_all_its_tokens_without_dropout(
    lm_folder: Path, sets: tuple[FeatureSet, FeatureSet]
) -> None:
    task = speech_task(lm_folder, sets, lora={"rank": 4, "dropout": 0.5})
    task.model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for key, text in VALID.items():
            loss, tokens = task.model.loss(*task.features.validation([key]), [text])
            total, count = total + float(loss), count + tokens
    cost(task, ["t0"])  # leaves the model in training
    assert task.validate().scores["loss"] == pytest.approx(total / count, rel=1e-5)


def run(folder: Path, task: SpeechTask | CtcTask, killed_at: int | None = None) -> dict[str, torch.Tensor]:
    """Train to the end, or to where `killed_at` raises, and return the state."""
    calls = iter(range(1000))
    whole_loss = task.loss

    def loss(ready: Ready) -> Outcome:
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        return whole_loss(ready)

    task.loss = loss  # type: ignore[method-assign]
    Loop(task, replace(OPTIONS), folder).run()
    return {name: value.clone() for name, value in task.state().items()}


@pytest.mark.parametrize("kind", ["speech", "bridge", "ctc"])
def test_a_killed_and_resumed_training_is_the_same_to_the_bit(
    lm_folder: Path, sets: tuple[FeatureSet, FeatureSet], tmp_path: Path, kind: str
) -> None:
    def task() -> SpeechTask | CtcTask:
        settings = {"batch_tokens": 60, "augment": {"noise": 0.2}}
        if kind == "ctc":
            return ctc_task(lm_folder, sets, train=settings)
        projector = CTC if kind == "bridge" else {"kind": "linear"}
        lora = {"rank": 4, "dropout": 0.3}
        return speech_task(lm_folder, sets, train=settings, projector=projector, lora=lora)

    whole = run(tmp_path / "whole", task())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", task(), killed_at=2)
    resumed = run(tmp_path / "killed", task())
    start = task().state()
    assert whole.keys() == resumed.keys() == start.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


def test_a_head_is_trained_on_the_readings_of_the_transcripts(
    lm_folder: Path, sets: tuple[FeatureSet, FeatureSet]
) -> None:
    task = ctc_task(lm_folder, sets)
    assert task.readings["t0"] == "キョーワイイテンキデス"
    assert task.readings.keys() == TRAIN.keys() | VALID.keys()
    assert cost(task, ["t0"]).tokens == len("キョーワイイテンキデス")


def test_only_the_head_is_trained_on_kana(lm_folder: Path, sets: tuple[FeatureSet, FeatureSet]) -> None:
    task = ctc_task(lm_folder, sets)
    (group,) = task.groups()
    assert group.named.keys() == task.state().keys() == dict(task.head.named_parameters()).keys()
    cost(task, ["t0", "t1", "t2"]).nll.backward()  # type: ignore[no-untyped-call]
    assert all(value.grad is not None for value in group.named.values())


def test_the_kana_error_is_that_of_the_best_path_against_the_reading(
    lm_folder: Path, sets: tuple[FeatureSet, FeatureSet]
) -> None:
    task = ctc_task(lm_folder, sets)
    with torch.no_grad():  # a head that hears ア in every frame
        task.head.out.weight.zero_()
        task.head.out.bias.copy_(torch.tensor([0.0] * (len(KANA) + 1)))
        task.head.out.bias[1 + KANA.index("ア")] = 1.0
    result = task.validate().scores
    assert isinstance(task.measure, Measured)
    ((refs, hyps),) = task.measure.calls
    assert hyps == dict.fromkeys(VALID, "ア")
    assert refs == {key: task.readings[key] for key in VALID}
    assert result["score"] == result["kana_error"] == 0.25
    assert math.isfinite(result["loss"])


def test_the_losses_of_a_head_in_a_batch_add_up(lm_folder: Path, sets: tuple[FeatureSet, FeatureSet]) -> None:
    task = ctc_task(lm_folder, sets, seed=5)
    task.head.dropout.p = 0.0
    together = float(cost(task, ["t0", "t2"]).nll.detach())
    alone = sum(float(cost(task, [key]).nll.detach()) for key in ("t0", "t2"))
    assert together == pytest.approx(alone, rel=1e-5)

"""The loop: a run that was killed and resumed ends in the same bits as one that was not."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from speechllm.errors import ConfigError, ModelError, Stopped
from speechllm.model.state import load_tensors, save_tensors
from speechllm.train.checkpoint import BEST, TRAINABLE
from speechllm.train.curves import METRICS, TIMED
from speechllm.train.optim import Group
from speechllm.train.task import Outcome, Sample, Validation
from speechllm.train.trainer import MAX_BAD_STEPS, Loop, LoopOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

OPTIONS = LoopOptions(
    epochs=4, accumulate=1, warmup=0.2, weight_decay=0.01, clip_norm=1.0, validate_every=4, save_every=3
)
IDS = tuple("abcdefghij")
BATCHES_OF_EPOCH = (5, 4, 6, 5, 3)  # an epoch's number of batches is its own: lengths are jittered
TOTAL = 20


class Killed(Exception):  # noqa: N818 - it stands for what no code can catch
    """The process ended here."""


class Toy:
    """A regression with dropout, so that the random state counts."""

    name = "toy"
    seed = 3

    def __init__(self, dropout: float = 0.5) -> None:
        self.weight = nn.Parameter(torch.ones(3, 2))
        self.bias = nn.Parameter(torch.zeros(3))
        self.dropout = dropout
        self.steps = 0
        self.used: list[tuple[int, tuple[str, ...]]] = []
        self.before_step: Callable[[int], None] = lambda _step: None
        self.during_validation: Callable[[int], None] = lambda _step: None
        self.change: Callable[[int, Tensor], Tensor] = lambda _step, loss: loss
        self.scores: Sequence[float] | None = None

    def groups(self) -> list[Group]:
        return [Group({"weight": self.weight}, 0.1), Group({"bias": self.bias}, 0.05)]

    def batches(self, epoch: int) -> list[list[str]]:
        order = np.random.default_rng(epoch).permutation(len(IDS))
        shares = np.array_split(order, BATCHES_OF_EPOCH[epoch % len(BATCHES_OF_EPOCH)])
        return [[IDS[int(index)] for index in share] for share in shares]

    def prepare(self, utt_ids: Sequence[str], epoch: int) -> tuple[Sequence[str], int]:
        return utt_ids, epoch

    def loss(self, ready: tuple[Sequence[str], int]) -> Outcome:
        utt_ids, epoch = ready
        self.before_step(self.steps)
        inputs = torch.tensor([[ord(one) % 7, ord(one) % 5] for one in utt_ids], dtype=torch.float32)
        kept = nn.functional.dropout(inputs, self.dropout)
        loss = (kept @ self.weight.T + self.bias - epoch).square().sum()
        self.used.append((epoch, tuple(utt_ids)))
        loss = self.change(self.steps, loss)
        self.steps += 1
        return Outcome(loss, len(utt_ids))

    def validate(self) -> Validation:
        self.during_validation(self.steps)
        if self.scores is not None:
            return Validation({"score": self.scores[(self.steps // OPTIONS.validate_every) - 1]})
        return Validation({"score": float(self.weight.detach().square().sum())})

    def state(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach(), "bias": self.bias.detach()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight.copy_(tensors["weight"])
        self.bias.copy_(tensors["bias"])


@dataclass(frozen=True)
class Ended:
    """All that must be the same of two runs."""

    state: Mapping[str, Tensor]
    metrics: list[dict[str, object]]
    used: list[tuple[int, tuple[str, ...]]]


def metrics(folder: Path) -> list[dict[str, object]]:
    """Return the records without the times in them."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def run(folder: Path, options: LoopOptions = OPTIONS, toy: Toy | None = None) -> Ended:
    toy = toy or Toy()
    Loop(toy, options, folder).run()
    return Ended(toy.state(), metrics(folder), toy.used)


def assert_same(one: Ended, other: Ended) -> None:
    assert one.metrics == other.metrics
    for name, value in one.state.items():
        assert torch.equal(value, other.state[name]), name


def at_step(step: int, act: Callable[[], None]) -> Callable[[int], None]:
    return lambda now: act() if now == step else None


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Return what a run makes that nothing disturbs."""
    return run(tmp_path_factory.mktemp("whole"))


def test_a_run_takes_the_batches_of_its_epochs_in_turn(whole: Ended) -> None:
    toy = Toy()
    wanted = [(epoch, tuple(batch)) for epoch in range(5) for batch in toy.batches(epoch)][:TOTAL]
    assert whole.used == wanted
    trained = [record for record in whole.metrics if record["kind"] == "train"]
    assert [record["step"] for record in trained] == list(range(1, TOTAL + 1))


def test_two_runs_are_the_same_to_the_bit(whole: Ended, tmp_path: Path) -> None:
    torch.manual_seed(99)
    assert_same(run(tmp_path), whole)


@pytest.mark.parametrize("killed_at", [0, 2, 3, 10, 16, 19])
def test_a_killed_and_resumed_run_is_the_same_to_the_bit(whole: Ended, tmp_path: Path, killed_at: int) -> None:
    toy = Toy()
    toy.before_step = at_step(killed_at, kill)
    with pytest.raises(Killed):
        run(tmp_path, toy=toy)
    resumed = run(tmp_path)
    assert_same(resumed, whole)
    assert len(resumed.used) == TOTAL - killed_at // OPTIONS.save_every * OPTIONS.save_every


def test_a_run_that_is_killed_again_and_again_is_the_same_to_the_bit(whole: Ended, tmp_path: Path) -> None:
    for _ in range(20):
        toy = Toy()
        toy.before_step = at_step(4, kill)
        try:
            assert_same(run(tmp_path, toy=toy), whole)
        except Killed:
            continue
        break
    else:
        pytest.fail("the run never came to its end")


def test_a_record_that_was_cut_short_is_made_again(whole: Ended, tmp_path: Path) -> None:
    toy = Toy()
    toy.before_step = at_step(8, kill)
    with pytest.raises(Killed):
        run(tmp_path, toy=toy)
    with (tmp_path / METRICS).open("a", encoding="utf-8") as stream:
        stream.write('{"kind": "train", "st')
    assert_same(run(tmp_path), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_it_came_in_and_stops(whole: Ended, tmp_path: Path, number: signal.Signals) -> None:
    toy = Toy()
    toy.before_step = at_step(7, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match="toy saved at step 8 of 20; run again to go on"):
        run(tmp_path, toy=toy)
    assert (tmp_path / "checkpoints" / "step_0000008" / TRAINABLE).is_file()
    resumed = run(tmp_path)
    assert len(resumed.used) == TOTAL - 8
    assert_same(resumed, whole)


def test_a_signal_in_the_last_step_ends_the_run_as_usual(whole: Ended, tmp_path: Path) -> None:
    toy = Toy()
    toy.before_step = at_step(TOTAL - 1, terminate)
    assert_same(run(tmp_path, toy=toy), whole)


def test_signals_have_their_old_handlers_after_a_run(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    toy = Toy()
    toy.before_step = at_step(2, kill)
    with pytest.raises(Killed):
        run(tmp_path, toy=toy)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_finished_run_is_not_run_again(whole: Ended, tmp_path: Path) -> None:
    run(tmp_path)
    again = run(tmp_path)
    assert again.used == []
    assert_same(again, whole)


def test_a_damaged_newest_state_costs_only_the_steps_behind_it(whole: Ended, tmp_path: Path) -> None:
    toy = Toy()
    toy.before_step = at_step(10, kill)
    with pytest.raises(Killed):
        run(tmp_path, toy=toy)
    (tmp_path / "checkpoints" / "step_0000009" / TRAINABLE).write_bytes(b"")
    resumed = run(tmp_path)
    assert len(resumed.used) == TOTAL - 6
    assert_same(resumed, whole)


def test_a_state_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)

    class Wider(Toy):
        def state(self) -> dict[str, Tensor]:
            return {**super().state(), "gain": torch.zeros(1)}

    with pytest.raises(ModelError, match="has no tensor gain"):
        run(tmp_path, toy=Wider())


def test_a_best_state_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    save_tensors(tmp_path / BEST, {"weight": torch.zeros(3, 2)})
    with pytest.raises(ModelError, match="has no tensor bias"):
        run(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_skips_its_step(tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: float) -> None:
    toy = Toy()
    seen: dict[int, Tensor] = {}
    toy.before_step = lambda step: seen.update({step: toy.weight.detach().clone()})
    toy.change = lambda step, loss: loss + bad if step == 5 else loss  # its gradient stays finite
    run(tmp_path, toy=toy)
    assert torch.equal(seen[5], seen[6])
    assert not torch.equal(seen[4], seen[5])
    assert not torch.equal(seen[6], seen[7])
    assert "toy step 6 skipped" in caplog.text


def test_five_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    toy = Toy()
    toy.change = lambda step, loss: loss * math.nan if step >= 6 else loss
    with pytest.raises(ModelError, match=f"{MAX_BAD_STEPS} steps in a row were not finite, the last at"):
        run(tmp_path, toy=toy)
    assert toy.steps == 6 + MAX_BAD_STEPS + 1  # what a step came to is read while the next one is under way
    assert all(value.isfinite().all() for value in toy.state().values())


def test_fewer_bad_steps_than_five_in_a_row_do_not_end_the_run(tmp_path: Path) -> None:
    toy = Toy()
    toy.change = lambda step, loss: loss * math.nan if step % MAX_BAD_STEPS else loss
    assert len(run(tmp_path, toy=toy).used) == TOTAL


def test_bad_steps_are_counted_across_a_stop(tmp_path: Path) -> None:
    toy = Toy()
    toy.change = lambda step, loss: loss * math.nan if step >= 6 else loss
    toy.before_step = at_step(8, kill)
    with pytest.raises(Killed):
        run(tmp_path, options=replace(OPTIONS, save_every=1), toy=toy)
    resumed = Toy()
    resumed.change = lambda _step, loss: loss * math.nan
    with pytest.raises(ModelError, match="not finite"):
        run(tmp_path, toy=resumed)
    assert resumed.steps == MAX_BAD_STEPS - 2 + 1


def test_a_step_without_a_single_token_is_no_fault(tmp_path: Path) -> None:
    class Silent(Toy):
        def loss(self, ready: tuple[Sequence[str], int]) -> Outcome:
            outcome = super().loss(ready)
            return Outcome(outcome.nll * 0, 0) if self.steps == 4 else outcome

    assert all(math.isfinite(float(str(record.get("loss", 0)))) for record in run(tmp_path, toy=Silent()).metrics)


def test_the_best_state_is_what_the_run_ends_with(tmp_path: Path) -> None:
    toy = Toy()
    toy.scores = (0.5, 0.2, 0.4, 0.2, 0.3)
    seen: dict[int, Tensor] = {}
    toy.before_step = lambda step: seen.update({step: toy.weight.detach().clone()})
    loop = Loop(toy, OPTIONS, tmp_path)
    progress = loop.run()
    assert (progress.best, progress.best_step, progress.step) == (0.2, 8, TOTAL)
    assert torch.equal(toy.weight.detach(), seen[8])
    assert torch.equal(load_tensors(tmp_path / BEST)["weight"], seen[8])


def test_validation_comes_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    records = run(tmp_path, options=replace(OPTIONS, epochs=2, validate_every=4)).metrics
    assert [record["step"] for record in records if record["kind"] == "valid"] == [4, 8, 9]


def test_a_part_of_an_epoch_ends_within_it(tmp_path: Path) -> None:
    assert len(run(tmp_path, options=replace(OPTIONS, epochs=0.6)).used) == 3


def test_batches_summed_into_one_step_are_one_large_batch(tmp_path: Path) -> None:
    class Single(Toy):
        def batches(self, _epoch: int) -> list[list[str]]:
            return [[one] for one in IDS]

    class Joined(Toy):
        def batches(self, _epoch: int) -> list[list[str]]:
            return [list(IDS[start : start + 2]) for start in range(0, len(IDS), 2)]

    summed = run(tmp_path / "summed", replace(OPTIONS, accumulate=2), Single(dropout=0.0))
    joined = run(tmp_path / "joined", OPTIONS, Joined(dropout=0.0))
    assert Counter(len(batch) for _, batch in summed.used) == {1: 2 * TOTAL}
    for name, value in summed.state.items():
        torch.testing.assert_close(value, joined.state[name])


def test_a_resumed_run_with_summed_batches_is_the_same_to_the_bit(tmp_path: Path) -> None:
    options = replace(OPTIONS, accumulate=2, save_every=2)
    undisturbed = run(tmp_path / "whole", options)
    toy = Toy()
    toy.before_step = at_step(13, kill)
    with pytest.raises(Killed):
        run(tmp_path / "killed", options, toy)
    assert_same(run(tmp_path / "killed", options), undisturbed)


def test_a_finished_run_keeps_its_last_state_alone(tmp_path: Path) -> None:
    loop = Loop(Toy(), OPTIONS, tmp_path)
    loop.run()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    loop.clean()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step_{TOTAL:07d}"]


def test_a_signal_breaks_a_validation_off_which_the_resumed_run_makes(whole: Ended, tmp_path: Path) -> None:
    toy = Toy()
    toy.during_validation = at_step(8, terminate)
    with pytest.raises(Stopped, match="toy saved at step 8 of 20; run again to go on"):
        run(tmp_path, toy=toy)
    assert [one["step"] for one in metrics(tmp_path) if one["kind"] == "valid"] == [4]
    resumed = run(tmp_path)
    assert len(resumed.used) == TOTAL - 8
    assert_same(resumed, whole)


def test_a_signal_before_a_due_validation_leaves_it_to_the_resumed_run(whole: Ended, tmp_path: Path) -> None:
    toy = Toy()
    toy.before_step = at_step(7, terminate)
    toy.during_validation = at_step(8, lambda: pytest.fail("validated though it was to stop"))
    with pytest.raises(Stopped):
        run(tmp_path, toy=toy)
    assert_same(run(tmp_path), whole)


def test_training_ends_when_validation_has_not_got_better_for_long_enough(tmp_path: Path) -> None:
    toy = Toy()
    toy.scores = (0.5, 0.2, 0.4, 0.3, 0.1)
    options = replace(OPTIONS, patience=2)
    loop = Loop(toy, options, tmp_path)
    progress = loop.run()
    assert (progress.step, progress.best_step, progress.stale) == (16, 8, 2)
    again = Toy()
    Loop(again, options, tmp_path).run()
    assert again.used == []
    assert torch.equal(again.weight, toy.weight)


@pytest.mark.parametrize(("kind", "steps"), [("best", (8, 16)), ("last", (16, 20))])
def test_the_mean_of_some_states_is_taken_where_it_is_no_worse(
    tmp_path: Path, kind: str, steps: tuple[int, int]
) -> None:
    toy = Toy()
    toy.scores = (0.5, 0.2, 0.4, 0.3, 0.35)
    seen: dict[int, Tensor] = {}
    toy.during_validation = lambda step: seen.update({step: toy.weight.detach().clone()})
    options = replace(OPTIONS, average=2, average_of=kind)
    worse = Loop(toy, options, tmp_path / "worse").run()
    assert [step for _, step in worse.kept] == list(steps)
    assert torch.equal(toy.weight, seen[8])  # the mean has the score of the last validation, 0.35
    better = Toy()
    better.scores = (0.5, 0.36, 0.4, 0.36, 0.35)
    Loop(better, options, tmp_path / "better").run()
    mean = [load_tensors(path)["weight"] for path in sorted((tmp_path / "better/averaged").glob("*"))]
    assert len(mean) == 2
    torch.testing.assert_close(better.weight.detach(), (mean[0] + mean[1]) / 2)


def test_a_killed_run_averages_the_same_states(tmp_path: Path) -> None:
    options = replace(OPTIONS, average=3)
    undisturbed = run(tmp_path / "whole", options)
    for _ in range(3):
        toy = Toy()
        toy.before_step = at_step(5, kill)
        with pytest.raises(Killed):
            run(tmp_path / "killed", options, toy)
    assert_same(run(tmp_path / "killed", options), undisturbed)
    files = [sorted(path.name for path in (tmp_path / name / "averaged").iterdir()) for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_samples_and_speed_are_shown(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Heard(Toy):
        def validate(self) -> Validation:
            return Validation(super().validate().scores, [Sample("u1", "今日は|晴れ", "今日は荒れ")])

        def loss(self, ready: tuple[Sequence[str], int]) -> Outcome:
            outcome = super().loss(ready)
            return replace(outcome, audio_s=2.5, positions=40, padded=10)

    records = run(tmp_path, toy=Heard()).metrics
    assert records[0]["padding"] == 0.25
    assert records[0]["audio_s"] == 2.5
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert {"toy/speed/audio_hours_per_hour", "toy/speed/memory_gib", "toy/train/grad_norm"} <= set(
        shown.Tags()["scalars"]
    )
    (texts, *_) = shown.Tensors("toy/samples/text_summary")
    assert "今日は\\|晴れ | 今日は荒れ" in texts.tensor_proto.string_val[0].decode()


@pytest.mark.slow
def test_curves_go_to_weights_and_biases_too_where_a_project_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path)
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_project_without_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"package wandb is missing; run: pip install -e \.\[wandb\]"):
        run(tmp_path)


def test_curves_are_written_for_tensorboard(tmp_path: Path) -> None:
    run(tmp_path)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_no_epoch_is_no_step(tmp_path: Path) -> None:
    toy = Toy()
    before = {name: value.clone() for name, value in toy.state().items()}
    Loop(toy, replace(OPTIONS, epochs=0), tmp_path).run()
    assert toy.used == []
    assert all(torch.equal(value, before[name]) for name, value in toy.state().items())

"""AdamW with its schedule: values by hand, and a state that is saved by name."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from speechllm.errors import ModelError
from speechllm.train.optim import FINAL_LR, JOINING, Group, Optimizer, Sums, joining, schedule


def parameters(seed: int = 1) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def over(tokens: int, nll: float = 1.0) -> Sums:
    return Sums(torch.tensor(nll, dtype=torch.float64), torch.tensor(float(tokens), dtype=torch.float64))


SHAPES = {"weight": (3, 2), "bias": (3,)}


def optimizer(
    named: dict[str, nn.Parameter], *, lr: float = 0.1, decay: float = 0.0, clip_norm: float = 1e9
) -> Optimizer:
    return Optimizer([Group(named, lr)], decay, clip_norm)


def set_gradients(named: dict[str, nn.Parameter], value: float = 1.0) -> None:
    for parameter in named.values():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.1),
        (4, 0.5),
        (9, 1.0),
        (10, 1.0),
        (55, FINAL_LR + (1 - FINAL_LR) / 2),
        (100, FINAL_LR),
        (1000, FINAL_LR),
    ],
)
def test_the_rate_rises_linearly_and_falls_as_a_cosine(step: int, factor: float) -> None:
    assert schedule(step, total=100, warmup=0.1) == pytest.approx(factor)


def test_the_rate_never_jumps_and_is_never_zero() -> None:
    factors = [schedule(step, total=200, warmup=0.05) for step in range(200)]
    steps = [after - before for before, after in itertools.pairwise(factors)]
    assert min(factors) >= FINAL_LR
    assert max(factors) == 1.0
    assert max(abs(step) for step in steps) <= 0.1 + 1e-9
    assert all(step <= 0 for step in steps[10:])


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_a_run_of_one_step_has_the_whole_rate(warmup: float) -> None:
    assert schedule(0, total=1, warmup=warmup) == 1.0


def test_a_step_is_that_of_torchs_adamw_on_the_mean_gradient() -> None:
    ours, theirs = parameters(), parameters()
    made = optimizer(ours)
    reference = torch.optim.AdamW(theirs.values(), lr=0.05, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0)
    for value in (4.0, -2.0, 8.0):
        set_gradients(ours, value)
        set_gradients(theirs, value / 4)
        made.step(0.5, over(4))
        reference.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name])


def test_groups_have_their_own_rates() -> None:
    slow, fast = parameters(), parameters()
    made = Optimizer([Group({"slow": slow["weight"]}, 0.01), Group({"fast": fast["weight"]}, 0.1)], 0.0, 1e9)
    before = slow["weight"].detach().clone()
    set_gradients(slow)
    set_gradients(fast)
    made.step(1.0, over(1))
    torch.testing.assert_close(before - slow["weight"], torch.full((3, 2), 0.01))
    torch.testing.assert_close(before - fast["weight"], torch.full((3, 2), 0.1))


def test_matrices_decay_and_vectors_do_not() -> None:
    named = parameters()
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    made = optimizer(named, decay=0.5)
    set_gradients(named, 0.0)
    made.step(1.0, over(1))
    torch.testing.assert_close(named["weight"].detach(), before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(named["bias"].detach(), before["bias"])


def test_a_large_gradient_is_clipped_by_its_whole_norm() -> None:
    named = parameters()
    made = optimizer(named, clip_norm=0.3)
    set_gradients(named, 8.0)
    norm = float(made.step(1.0, over(2)))
    assert norm == pytest.approx(4.0 * math.sqrt(9))
    moments = torch.cat([made.state()[f"{name}.exp_avg"].flatten() for name in SHAPES])
    torch.testing.assert_close(moments, torch.full((9,), 0.1 * 0.3 / math.sqrt(9)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    named = parameters()
    made = optimizer(named)
    set_gradients(named)
    made.step(1.0, over(1))
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    moments = {name: value.clone() for name, value in made.state().items()}
    set_gradients(named)
    assert named["bias"].grad is not None
    named["bias"].grad[0] = bad
    assert not math.isfinite(made.step(1.0, over(1)))
    assert all(torch.equal(named[name].detach(), before[name]) for name in named)
    assert all(torch.equal(value, moments[name]) for name, value in made.state().items())
    assert all(parameter.grad is None for parameter in named.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing_though_its_gradient_is(bad: float) -> None:
    named = parameters()
    made = optimizer(named)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    set_gradients(named)
    assert math.isfinite(made.step(1.0, over(1, bad)))
    assert all(torch.equal(named[name].detach(), before[name]) for name in named)
    assert all(not value.any() for value in made.state().values())


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    named = parameters()
    made = optimizer(named)
    named["weight"].grad = torch.ones(3, 2)
    made.step(1.0, over(1))
    assert set(made.state()) == {"weight.exp_avg", "weight.exp_avg_sq", "weight.step"}


def test_a_restored_state_goes_on_to_the_same_bits() -> None:
    whole, first = parameters(), parameters()
    through = optimizer(whole, decay=0.1)
    begun = optimizer(first, decay=0.1)
    for made, named in ((through, whole), (begun, first)):
        set_gradients(named, 1.0)
        made.step(1.0, over(3))
    second = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    resumed = optimizer(second, decay=0.1)
    resumed.load_state({name: value.clone() for name, value in begun.state().items()})
    for made, named in ((through, whole), (resumed, second)):
        set_gradients(named, -2.0)
        made.step(0.5, over(3))
    for name in SHAPES:
        assert torch.equal(whole[name], second[name])
        assert not torch.equal(whole[name], first[name])


def two_phases() -> tuple[dict[str, nn.Parameter], Optimizer]:
    named = parameters()
    early, late = {"weight": named["weight"]}, {"bias": named["bias"]}
    return named, Optimizer([Group(early, 0.1), Group(late, 0.1, begins=0.5)], 0.0, 1.0)


def test_a_group_that_begins_late_is_frozen_until_then() -> None:
    named, made = two_phases()
    before = named["bias"].detach().clone()
    set_gradients(named, 8.0)
    norm = float(made.step(1.0, over(1), done=0.49))
    assert norm == pytest.approx(8.0 * math.sqrt(6))  # the bias has no part in the clipping
    assert torch.equal(named["bias"].detach(), before)
    assert set(made.state()) == {"weight.exp_avg", "weight.exp_avg_sq", "weight.step"}
    set_gradients(named)
    made.step(1.0, over(1), done=0.5 + JOINING)
    torch.testing.assert_close(before - named["bias"], torch.full((3,), 0.1))


@pytest.mark.parametrize(
    ("done", "begins", "factor"), [(0.0, 0.0, 1.0), (0.3, 0.3, 0.0), (0.3 + JOINING / 2, 0.3, 0.5), (0.9, 0.3, 1.0)]
)
def test_a_late_group_rises_by_itself(done: float, begins: float, factor: float) -> None:
    assert joining(done, begins) == pytest.approx(factor)


@pytest.mark.parametrize("steps", [(0.1, 0.2), (0.1, 0.7)])
def test_a_state_of_either_phase_comes_back(steps: tuple[float, ...]) -> None:
    named, made = two_phases()
    for done in steps:
        set_gradients(named)
        made.step(1.0, over(1), done=done)
    _, resumed = two_phases()
    resumed.load_state(made.state())
    assert {name: value.tolist() for name, value in resumed.state().items()} == {
        name: value.tolist() for name, value in made.state().items()
    }


def test_a_state_that_lacks_a_part_of_a_parameter_is_refused() -> None:
    named, made = two_phases()
    set_gradients(named)
    made.step(1.0, over(1), done=0.9)
    state = made.state()
    del state["bias.exp_avg"]
    with pytest.raises(ModelError, match=r"does not fit at bias\.exp_avg"):
        two_phases()[1].load_state(state)

"""Packed rows: loss and gradients are those of each utterance alone, for every family of language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiny
import torch

from speechllm.config.schema import ConvMlpProjector
from speechllm.model import packing
from speechllm.model.packing import Segments

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from speechllm.model.speechllm import SpeechLlm

FRAMES = [40, 7, 61, 23]  # the tiny sliding windows are of 8 positions, so some utterances pass them
TARGETS = list(tiny.TEXTS[: len(FRAMES)])


@pytest.fixture(scope="module", params=tiny.LMS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SpeechLlm:
    folder: Path = tiny.LMS[request.param](tmp_path_factory.mktemp("lm"))
    made: SpeechLlm = tiny.speech_llm(folder, request.param, ConvMlpProjector(hidden=8))
    return made


def frames() -> Tensor:
    """Return frames [b e h], zeros after each row's end as everywhere."""
    drawn = torch.randn(len(FRAMES), max(FRAMES), tiny.WIDTH_H, generator=torch.Generator().manual_seed(3))
    return drawn * (torch.arange(max(FRAMES)) < torch.tensor(FRAMES)[:, None])[..., None]


def gradients(model: SpeechLlm) -> dict[str, Tensor]:
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("share", [False, True], ids=["each-its-prompt", "one-prompt"])
def test_loss_and_gradients_are_those_of_the_utterances_one_by_one(model: SpeechLlm, *, share: bool) -> None:
    loss, tokens = model.packed_loss(frames(), FRAMES, TARGETS, share_prompt=share)
    loss.backward()  # type: ignore[no-untyped-call]
    packed = gradients(model)
    alone_loss, alone_tokens = 0.0, 0
    for row, (count, target) in enumerate(zip(FRAMES, TARGETS, strict=True)):
        one, some = model.loss(frames()[row : row + 1, :count], [count], [target])
        one.backward()  # type: ignore[no-untyped-call]
        alone_loss, alone_tokens = alone_loss + float(one.detach()), alone_tokens + some
    alone = gradients(model)
    assert tokens == alone_tokens
    assert float(loss.detach()) == pytest.approx(alone_loss, rel=1e-5)
    assert packed.keys() == alone.keys()
    for name, value in packed.items():
        assert float((value - alone[name]).norm()) <= 1e-5 * float(alone[name].norm()), name


@pytest.mark.parametrize("shared", [0, 9])
def test_an_utterance_does_not_see_its_neighbours(model: SpeechLlm, shared: int) -> None:
    with torch.no_grad():
        embeds, others = torch.randn(2, 1, 40 + shared, model.lm.width, generator=torch.Generator().manual_seed(5))
        segments = Segments([13, 20, 7], tiny.CPU, shared)
        first = model.lm.hidden_packed(embeds, segments)
        own = slice(13 + shared, 33 + shared)
        changed = others.clone()
        changed[:, :shared], changed[:, own] = embeds[:, :shared], embeds[:, own]
        second = model.lm.hidden_packed(changed, segments)
    assert torch.equal(first[:, own], second[:, own])
    assert not torch.allclose(first[:, shared : own.start], second[:, shared : own.start])
    assert not torch.allclose(first[:, own.stop :], second[:, own.stop :])


def test_every_utterance_sees_the_shared_positions(model: SpeechLlm) -> None:
    with torch.no_grad():
        embeds, others = torch.randn(2, 1, 12, model.lm.width, generator=torch.Generator().manual_seed(5))
        segments = Segments([4, 5], tiny.CPU, shared=3)
        first = model.lm.hidden_packed(embeds, segments)
        second = model.lm.hidden_packed(torch.cat([others[:, :3], embeds[:, 3:]], dim=1), segments)
    assert not torch.isclose(first, second, rtol=1e-3).all(dim=-1)[0, [3, 7]].any()  # the first of each utterance


def test_positions_go_on_from_the_shared_ones_in_each_utterance() -> None:
    alone = Segments([3, 1, 2], tiny.CPU)
    assert alone.positions_1l.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert alone.query_bounds.tolist() == alone.key_bounds.tolist() == [0, 3, 4, 6]
    shared = Segments([3, 1], tiny.CPU, shared=2)
    assert shared.positions_1l.tolist() == [[0, 1, 2, 3, 4, 2]]
    assert shared.query_bounds.tolist() == [0, 2, 5, 6]
    assert shared.key_bounds.tolist() == [0, 2, 7, 10]
    assert shared.key_order.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5]
    assert shared.longest == (3, 5)
    assert shared.query_bounds.dtype == shared.key_bounds.dtype == torch.int32


@pytest.mark.parametrize("window", [None, 6])
def test_the_trial_of_a_kernel_lets_a_right_one_through_and_no_wrong_one(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    how = packing.Kind(None, window, grouped=True)
    trial = (torch.randn(1, 4, 32, 8), torch.randn(1, 2, 32, 8), torch.randn(1, 2, 32, 8))
    segments = Segments((5, 1, 19), tiny.CPU, shared=7)
    right = dense(trial, segments, window)
    monkeypatch.setattr(packing, "_fused", lambda *_: right)
    assert packing._agree(trial, segments, how)
    wrong = dense(trial, Segments((6, 19), tiny.CPU, shared=7), window)
    monkeypatch.setattr(packing, "_fused", lambda *_: wrong)
    assert not packing._agree(trial, segments, how)

    def missing(*_: object) -> Tensor:
        raise RuntimeError("no kernel for this card")

    monkeypatch.setattr(packing, "_fused", missing)
    assert not packing._agree(trial, segments, how)


def dense(row: tuple[Tensor, ...], segments: Segments, window: int | None) -> Tensor:
    """Return attention [1 l h c] with one mask over the whole row, from the definition."""
    owner = torch.tensor([n for n, length in enumerate(segments.parts) for _ in range(length)])
    positions = segments.positions_1l[0]
    back = positions[:, None] - positions
    near = (back >= 0) & ((owner[:, None] == owner) | (owner == 0))
    if window is not None:
        near &= back < window
    query, key, value = row
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    scores = (query @ key.transpose(2, 3) / query.shape[3] ** 0.5).masked_fill(~near, float("-inf"))
    attended: Tensor = (scores.softmax(dim=-1) @ value).transpose(1, 2)
    return attended

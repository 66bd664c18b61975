"""Packed rows: loss and gradients are those of each utterance alone, for every family of language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiny
import torch

from speechllm.config.schema import ConvMlpProjector
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


def test_loss_and_gradients_are_those_of_the_utterances_one_by_one(model: SpeechLlm) -> None:
    loss, tokens = model.packed_loss(frames(), FRAMES, TARGETS)
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


def test_an_utterance_does_not_see_its_neighbours(model: SpeechLlm) -> None:
    with torch.no_grad():
        embeds, others = torch.randn(2, 1, 40, model.lm.width, generator=torch.Generator().manual_seed(5))
        segments = Segments.of([13, 20, 7], tiny.CPU)
        first = model.lm.hidden_packed(embeds, segments)
        changed = torch.cat([others[:, :13], embeds[:, 13:33], others[:, 33:]], dim=1)
        second = model.lm.hidden_packed(changed, segments)
    assert torch.equal(first[:, 13:33], second[:, 13:33])
    assert not torch.allclose(first[:, :13], second[:, :13])
    assert not torch.allclose(first[:, 33:], second[:, 33:])


def test_positions_begin_anew_in_each_utterance() -> None:
    segments = Segments.of([3, 1, 2], tiny.CPU)
    assert segments.positions().tolist() == [[0, 1, 2, 0, 0, 1]]
    assert segments.bounds.tolist() == [0, 3, 4, 6]
    assert segments.bounds.dtype == torch.int32

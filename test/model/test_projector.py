"""Projectors: the published size, and vectors that do not depend on the batch."""

from __future__ import annotations

import pytest
import tiny
import torch

from speechllm.config.schema import ConvMlpProjector, CtcProjector, LinearProjector, Projector
from speechllm.model.ctc import KANA
from speechllm.model.projector import AnyProjector, ConvMlp, CtcBridge, build_projector

WIDTH_H, WIDTH_D = 6, tiny.LM_WIDTH
FRAMES = (13, 1, 20, 7)
CONFIGS: dict[str, Projector] = {
    "conv_mlp": ConvMlpProjector(stride=5, hidden=8),
    "linear": LinearProjector(stride=4),
    "ctc": CtcProjector(hidden=8),
}


def projector(kind: str) -> AnyProjector:
    torch.manual_seed(3)
    return build_projector(CONFIGS[kind], WIDTH_H, WIDTH_D, torch.randn(len(KANA), WIDTH_D)).eval()


def loud_bridge() -> CtcBridge:
    """Return a bridge whose head hears many kana and whose residual says something."""
    made = projector("ctc")
    assert isinstance(made, CtcBridge)
    torch.nn.init.normal_(made.head.out.weight, std=3)
    torch.nn.init.normal_(made.residual.weight)
    return made


def padded() -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(4)
    rows = [torch.randn(count, WIDTH_H) for count in FRAMES]
    frames_beh = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return frames_beh, rows


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_batch_gives_each_utterance_the_vectors_it_has_alone(kind: str) -> None:
    made = loud_bridge() if kind == "ctc" else projector(kind)
    frames_beh, rows = padded()
    together = made(frames_beh, FRAMES)
    assert len(together) == len(rows)
    for row, vectors_pd in zip(rows, together, strict=True):
        torch.testing.assert_close(vectors_pd, made(row[None], [len(row)])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv_mlp", "linear"])
def test_as_many_vectors_come_out_as_were_expected(kind: str) -> None:
    made = projector(kind)
    shapes = [tuple(vectors.shape) for vectors in made(padded()[0], FRAMES)]
    assert shapes == [(made.expected_tokens(count), WIDTH_D) for count in FRAMES]


def test_the_published_projector_has_15735808_parameters() -> None:
    with torch.device("meta"):
        made = ConvMlp(ConvMlpProjector(stride=5, hidden=2048), 1024, 4096)
    assert sum(value.numel() for value in made.parameters()) == 15_735_808


def bridge_to_kana_weights() -> CtcBridge:
    """Return a new bridge whose kana embeddings are unit vectors, so that a mixture shows its weights."""
    torch.manual_seed(5)
    made = build_projector(CONFIGS["ctc"], WIDTH_H, len(KANA), torch.eye(len(KANA))).eval()
    assert isinstance(made, CtcBridge)
    torch.nn.init.normal_(made.head.out.weight, std=3)
    return made


def test_a_new_bridge_gives_mixtures_of_the_kana_embeddings() -> None:
    made = bridge_to_kana_weights()
    for weights_pk in made(padded()[0], FRAMES):
        assert (weights_pk >= 0).all()
        torch.testing.assert_close(weights_pk.sum(dim=1), torch.ones(len(weights_pk)))


def test_a_mixture_holds_the_posteriors_of_its_run_with_the_blank_left_out() -> None:
    made = bridge_to_kana_weights()
    with torch.no_grad():  # a head that says the same of every frame: one run
        made.head.out.weight.zero_()
        made.head.out.bias.copy_(torch.tensor([1.0, 3.0, 2.0, *[-50.0] * (len(KANA) - 2)]))
    (weights_pk,) = made(torch.randn(1, 6, WIDTH_H), [6])
    wanted = torch.tensor([3.0, 2.0]).softmax(dim=0)
    torch.testing.assert_close(weights_pk[:, :2], wanted[None])
    assert weights_pk.shape == (1, len(KANA))


def test_silence_is_one_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bridge_to_kana_weights()
    monkeypatch.setattr(made.head.out.bias, "data", torch.tensor([100.0, *[0.0] * len(KANA)]))
    vectors = made(padded()[0], FRAMES)
    assert [len(vectors_pd) for vectors_pd in vectors] == [1] * len(FRAMES)
    assert all(vectors_pd.isfinite().all() for vectors_pd in vectors)


def test_the_residual_carries_what_the_head_heard_below_its_kana() -> None:
    made = loud_bridge()
    frames_beh, _ = padded()
    before = made(frames_beh, FRAMES)
    with torch.no_grad():
        made.residual.weight.zero_()
    assert all((old - new).abs().max() > 0.01 for old, new in zip(before, made(frames_beh, FRAMES), strict=True))

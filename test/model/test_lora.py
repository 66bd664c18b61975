"""The lean adapter: peft's numbers, fewer saved tensors."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from peft.tuners.lora.layer import Linear as PeftLinear

from speechllm.config.schema import ConvMlpProjector, LoraConfig
from speechllm.model import lm as lms
from speechllm.model.lm import add_lora_layers, merge_lora
from speechllm.model.lora import LeanLinear

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

TARGETS = ("q_proj", "v_proj", "down_proj")


def adapted(folder: Path, dtype: str = "float32", dropout: float = 0.0) -> lms.LanguageModel:
    lm = lms.load_lm(tiny.found(folder), dtype, tiny.CPU, None)
    torch.manual_seed(3)
    add_lora_layers(lm.model, LoraConfig(rank=4, alpha=16, dropout=dropout, targets=TARGETS))
    for name, value in lm.model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.1)
    return lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("lm"))


def pefts_own(model: nn.Module) -> nn.Module:
    """Return a copy whose adapted layers compute as peft has it."""
    made = copy.deepcopy(model)
    for part in made.modules():
        if isinstance(part, LeanLinear):
            part.__class__ = PeftLinear
    return made


def run(model: nn.Module, embeds_bld: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return last states, gradients, and the bytes that were kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        body: Any = model.base_model
        states = body(inputs_embeds=embeds_bld, use_cache=False).last_hidden_state
    states.float().square().sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return states.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_pefts(folder: Path, dropout: float) -> None:
    model = adapted(folder, dropout=dropout).model.train()
    assert sum(isinstance(part, LeanLinear) for part in model.modules()) == 2 * len(TARGETS)
    embeds = torch.randn(2, 9, tiny.LM_WIDTH)
    ours, theirs = run(model, embeds), run(pefts_own(model), embeds)
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, value in ours[1].items():
        torch.testing.assert_close(value, theirs[1][name], rtol=1e-4, atol=1e-5)


def test_in_bfloat16_less_is_kept_for_the_backward_pass_and_nothing_is_lost(folder: Path) -> None:
    model = adapted(folder, "bfloat16").model.train()
    embeds = torch.randn(4, 40, tiny.LM_WIDTH, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = run(adapted(folder).model.train(), embeds.float())
    ours, theirs = run(model, embeds), run(pefts_own(model), embeds)
    assert ours[2] < theirs[2]
    assert all(value.dtype == torch.float32 for value in ours[1].values())
    errors = [
        sum(float((found[1][name] - value).norm()) for name, value in exact[1].items()) for found in (ours, theirs)
    ]
    assert errors[0] < 1.5 * errors[1]


def test_a_merged_layer_gives_what_it_gave_before(folder: Path) -> None:
    lm = adapted(folder)
    embeds = torch.randn(1, 5, tiny.LM_WIDTH)
    before = run(lm.model, embeds)[0]
    merge_lora(lm)
    with torch.no_grad():
        torch.testing.assert_close(lm.model.base_model(inputs_embeds=embeds).last_hidden_state, before)


@pytest.mark.parametrize("family", tiny.LMS)
def test_the_loss_in_parts_is_the_loss_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = tiny.speech_llm(tiny.LMS[family](tmp_path / "lm"), family, ConvMlpProjector(hidden=8))
    hidden = torch.randn(11, tiny.LM_WIDTH, requires_grad=True)
    labels = torch.arange(11) % 7
    whole = torch.nn.functional.cross_entropy(model.lm.logits(hidden), labels, reduction="sum")
    (wanted,) = torch.autograd.grad(3 * whole, hidden)
    monkeypatch.setattr(lms, "ROWS_OF_LOGITS", 4)
    parts = model.lm.nll(hidden, labels)
    (found,) = torch.autograd.grad(3 * parts, hidden)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(model.lm.nll(hidden, labels), whole)
    assert not any(value.grad is not None for value in model.lm.model.get_output_embeddings().parameters())


def test_a_head_that_is_trained_gets_its_gradient(folder: Path) -> None:
    lm = lms.load_lm(tiny.found(folder), "float32", tiny.CPU, None)
    head = lm.model.get_output_embeddings()
    head.requires_grad_(requires_grad=True)
    lm.nll(torch.randn(5, tiny.LM_WIDTH), torch.arange(5)).backward()  # type: ignore[no-untyped-call]
    assert head.weight.grad.abs().sum() > 0

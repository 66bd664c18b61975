"""The frozen language model and its adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from speechllm.config.schema import LoraConfig
from speechllm.errors import ConfigError, ModelError
from speechllm.model.lm import (
    LanguageModel,
    add_lora,
    context_length,
    load_lm,
    load_tokenizer,
    merge_lora,
    positions_of,
)
from speechllm.text.prompt import encode

if TYPE_CHECKING:
    from pathlib import Path

LONG, SHORT = "".join(tiny.TEXTS), tiny.TEXTS[0]
LLAMA_2_7B = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "intermediate_size": 11_008}
LLAMA_3_8B = {**LLAMA_2_7B, "intermediate_size": 14_336, "num_key_value_heads": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("lms")
    return {name: make(base / name) for name, make in tiny.LMS.items()}


def lora(name: str, rank: int = 4) -> LoraConfig:
    return LoraConfig(rank=rank, targets=tiny.LORA_TARGETS[name])


def with_lora(folder: Path, name: str, *, trained: bool) -> LanguageModel:
    lm = tiny.load(folder)
    torch.manual_seed(5)
    add_lora(lm, lora(name))
    if trained:
        for key, value in tiny.lora_state(lm).items():
            if "lora_B" in key:
                torch.nn.init.normal_(value, std=0.5)
    return lm


def logits_of(lm: LanguageModel, text: str) -> torch.Tensor:
    """Return logits [l v] of one text alone."""
    ids = encode(lm.tokenizer, text)
    with torch.inference_mode():
        hidden_bld = lm.hidden(lm.embed(ids)[None], torch.ones(1, len(ids), dtype=torch.bool))
        return lm.logits(hidden_bld[0])


@pytest.mark.parametrize("name", tiny.LMS)
def test_logits_of_our_own_vectors_are_hugging_faces_of_the_token_ids(name: str, folders: dict[str, Path]) -> None:
    lm = tiny.load(folders[name])
    with torch.inference_mode():
        wanted = lm.model(torch.tensor([encode(lm.tokenizer, LONG)])).logits[0]
    torch.testing.assert_close(logits_of(lm, LONG), wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.1


@pytest.mark.parametrize("name", tiny.LMS)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_on_either_side_changes_no_logit(name: str, folders: dict[str, Path], *, left: bool) -> None:
    lm = tiny.load(folders[name])
    rows = [lm.embed(encode(lm.tokenizer, text)) for text in (SHORT, LONG)]
    missing = len(rows[1]) - len(rows[0])
    assert missing > 0
    edges = (missing, 0) if left else (0, missing)
    embeds_bld = torch.stack([torch.nn.functional.pad(rows[0], (0, 0, *edges), value=3.0), rows[1]])
    mask_bl = torch.ones(embeds_bld.shape[:2], dtype=torch.bool)
    mask_bl[0] = torch.nn.functional.pad(torch.ones(len(rows[0]), dtype=torch.bool), edges)
    with torch.inference_mode():
        logits_blv = lm.logits(lm.hidden(embeds_bld, mask_bl))
    torch.testing.assert_close(logits_blv[0][mask_bl[0]], logits_of(lm, SHORT), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits_blv[1], logits_of(lm, LONG), rtol=0, atol=1e-4)


def test_positions_count_the_true_ones_from_zero() -> None:
    mask_bl = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert positions_of(mask_bl).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4]]


def test_gemmas_vectors_carry_its_scale(folders: dict[str, Path]) -> None:
    lm = tiny.load(folders["gemma3"])
    ids = encode(lm.tokenizer, SHORT)
    table_vd = lm.model.get_input_embeddings().weight
    torch.testing.assert_close(lm.embed(ids), table_vd[ids] * tiny.LM_WIDTH**0.5)
    assert lm.width == tiny.LM_WIDTH


def test_capped_logits_are_hugging_faces_own(folders: dict[str, Path]) -> None:
    lm = tiny.load(folders["gemma3"])
    before = logits_of(lm, LONG)
    lm.model.config.final_logit_softcapping = 0.5
    with torch.inference_mode():
        wanted = lm.model(torch.tensor([encode(lm.tokenizer, LONG)])).logits[0]
    torch.testing.assert_close(logits_of(lm, LONG), wanted, rtol=0, atol=1e-5)
    assert wanted.abs().max() <= 0.5 < before.abs().max()


def test_no_text_is_no_vector(folders: dict[str, Path]) -> None:
    assert tiny.load(folders["llama"]).embed([]).shape == (0, tiny.LM_WIDTH)


@pytest.mark.parametrize("name", tiny.LMS)
def test_a_new_adapter_changes_no_logit(name: str, folders: dict[str, Path]) -> None:
    adapted = logits_of(with_lora(folders[name], name, trained=False), SHORT)
    torch.testing.assert_close(adapted, logits_of(tiny.load(folders[name]), SHORT))


@pytest.mark.parametrize("name", tiny.LMS)
def test_a_merged_adapter_gives_the_logits_of_an_unmerged_one(name: str, folders: dict[str, Path]) -> None:
    lm = with_lora(folders[name], name, trained=True)
    before = logits_of(lm, SHORT)
    first = next(part for part in lm.model.modules() if hasattr(part, "lora_A") and hasattr(part, "base_layer"))
    plain_weight = first.base_layer.weight.detach().clone()
    merge_lora(lm)
    assert not torch.equal(first.base_layer.weight, plain_weight)
    torch.testing.assert_close(logits_of(lm, SHORT), before, rtol=0, atol=1e-4)
    assert (before - logits_of(tiny.load(folders[name]), SHORT)).abs().max() > 0.01


@pytest.mark.parametrize("name", tiny.LMS)
def test_only_the_adapter_is_trainable(name: str, folders: dict[str, Path]) -> None:
    lm = with_lora(folders[name], name, trained=False)
    trainable = {key for key, value in lm.model.named_parameters() if value.requires_grad}
    assert trainable == set(tiny.lora_state(lm))
    assert len(trainable) == 2 * 2 * len(tiny.LORA_TARGETS[name])


def test_the_adapter_of_a_bfloat16_model_is_float32(folders: dict[str, Path]) -> None:
    lm = load_lm(tiny.found(folders["llama"]), "bfloat16", tiny.CPU, None)
    add_lora(lm, lora("llama"))
    assert {value.dtype for value in tiny.lora_state(lm).values()} == {torch.float32}
    assert lm.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert logits_of(lm, SHORT).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "targets", "count"),
    [
        (LLAMA_2_7B, ("q_proj", "v_proj"), 4_194_304),
        (LLAMA_3_8B, ("q_proj", "o_proj"), 4_194_304),
        (LLAMA_3_8B, ("q_proj", "v_proj"), 3_407_872),
    ],
    ids=["youri-7b", "youko-8b", "youko-8b-qv"],
)
def test_rank_eight_has_the_published_number_of_parameters(
    shape: dict[str, int], targets: tuple[str, ...], count: int
) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**shape, "num_hidden_layers": 1}))
        lm = LanguageModel(model, tiny.tokenizer(), None)
        add_lora(lm, LoraConfig(rank=8, targets=targets))
    assert shape["num_hidden_layers"] * sum(value.numel() for value in tiny.lora_state(lm).values()) == count


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(folders: dict[str, Path]) -> None:
    lm = tiny.load(folders["gpt_neox"])
    with pytest.raises(ConfigError, match=r"no layer q_proj; choose from .*dense.*query_key_value"):
        add_lora(lm, LoraConfig(targets=("query_key_value", "q_proj")))


def test_the_context_is_that_of_the_models_own_configuration(folders: dict[str, Path]) -> None:
    assert context_length(tiny.load(folders["llama"])) == 256


def test_a_speech_encoder_is_no_language_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no causal language model"):
        tiny.load(tiny.wavlm(tmp_path))


def test_a_model_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    weights = tiny.llama(tmp_path) / "model.safetensors"
    state = load_file(weights)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight"):
        tiny.load(tmp_path)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    for path in tiny.llama(tmp_path).glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no readable tokenizer"):
        tiny.load(tmp_path)


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tmp_path: Path) -> None:
    tiny.llama(tmp_path)
    endless = tiny.tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no end-of-sequence token"):
        load_tokenizer(tmp_path)

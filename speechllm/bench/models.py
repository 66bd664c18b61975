"""The model that is trained in a benchmark: random weights, the same for every system that trains it.

Shapes: b batch, e encoder frames, h encoder width, d LM width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from speechllm.bench.corpus import tokenizer
from speechllm.config.schema import DEFAULT_PROMPT, DEFAULT_TEMPLATE, Config, ConvMlpProjector, LoraConfig
from speechllm.errors import ConfigError
from speechllm.model import packing
from speechllm.model.lm import LORA_KEY, LanguageModel, add_lora
from speechllm.model.projector import build_projector
from speechllm.model.shapes import shape_of
from speechllm.model.speechllm import SpeechLlm
from speechllm.runtime import derive_seed, torch_dtype
from speechllm.text.prompt import Form

if TYPE_CHECKING:
    from transformers import PreTrainedModel

YOURI_7B = "rinna/youri-7b"
LARGEST_VOCABULARY = 4096  # of the made-up tokenizer; the head may have more rows
FORM = Form(DEFAULT_PROMPT, DEFAULT_TEMPLATE)
SPELLED = DEFAULT_PROMPT + DEFAULT_TEMPLATE.replace("{prompt}", "").replace("{audio}", "")
LORA_STD = 0.01  # of the second factor, which begins at zero: so that the first has a gradient too


@dataclass(frozen=True)
class Size:
    """A model and how much of it is trained on."""

    lm: dict[str, int] | str
    """Numbers of a Llama, or the name of a published one whose shape is known."""
    width_h: int
    hidden: int
    """Width inside the projector."""
    num_utts: int
    rounds: int
    batch_tokens: int
    """Budget of one of our batches; the other systems have a fixed number of utterances."""
    quick_utts: int = 16
    closer: tuple[int, ...] = ()
    """Budgets at which ours is looked at closer where none are asked for."""


def llama(width: int, inner: int, layers: int, vocab: int) -> dict[str, int]:
    """Return the numbers of a Llama with heads of 64."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 64),
        "vocab_size": vocab,
    }


# the head is 2 % of the body's work in both larger ones, as in a 7B model: a larger share would flatter whoever
# computes fewer logits
SIZES = {
    "tiny": Size(llama(32, 64, 2, 128), width_h=8, hidden=16, num_utts=32, rounds=1, batch_tokens=1024),
    "small": Size(llama(512, 1376, 8, 1024), width_h=128, hidden=256, num_utts=48, rounds=3, batch_tokens=1024),
    "7b": Size(
        YOURI_7B,
        width_h=1024,
        hidden=2048,
        num_utts=1280,
        rounds=2,
        batch_tokens=8192,
        quick_utts=320,
        closer=(4096, 8192, 16384),
    ),
}


def size_named(name: str) -> Size:
    """Return a size by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in SIZES:
        raise ConfigError("bench", f"there is no size {name}", f"choose {', '.join(SIZES)}")
    return SIZES[name]


def config_of(size: Size, device: torch.device, dtype: str) -> Config:
    """Return the configuration of a size; the names of its models stand for nothing."""
    return Config.model_validate(
        {
            "device": str(device),
            "encoder": {"name": "random"},
            "lm": {"name": "random", "dtype": dtype},
            "projector": ConvMlpProjector(hidden=size.hidden).model_dump(),
            "lora": LoraConfig(rank=8).model_dump(),
            "train": {"epochs": 1, "batch_tokens": size.batch_tokens, "packing": True},
        }
    )


@dataclass(frozen=True)
class Made:
    """Random weights, as each system wants them."""

    model: SpeechLlm
    """Ours, projector and adapter included."""
    plain_lm: PreTrainedModel
    """The frozen language model as transformers has it, without adapter; its weights are the very ones of ours."""


def sharing_copy(lm: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model whose weights are the very tensors of the first."""
    copied: PreTrainedModel = copy.deepcopy(lm, {id(weight): weight for weight in lm.parameters()})
    return copied


def make(size: Size, config: Config, device: torch.device) -> Made:
    """Return a model of a size on `device`: its weights are drawn there, and never written to a file."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(derive_seed("bench weights"))
    shape: Any = shape_of(size.lm) if isinstance(size.lm, str) else LlamaConfig(**size.lm, tie_word_embeddings=False)
    with device:
        lm = AutoModelForCausalLM.from_config(
            shape, dtype=torch_dtype(config.lm.dtype), attn_implementation=packing.NAME
        )
    lm.requires_grad_(requires_grad=False).eval()
    plain_lm = sharing_copy(lm)
    plain_lm.set_attn_implementation("sdpa")
    spelled = tokenizer(min(shape.vocab_size, LARGEST_VOCABULARY), SPELLED)
    language_model = LanguageModel(lm, spelled, None)
    assert config.lora is not None
    add_lora(language_model, config.lora)
    for name, weight in lm.named_parameters():
        if LORA_KEY in name and "lora_B" in name:
            torch.nn.init.normal_(weight, std=LORA_STD)
    projector = build_projector(config.projector, size.width_h, language_model.width, torch.empty(0)).to(device)
    return Made(SpeechLlm(projector, language_model, FORM), plain_lm)

"""The frozen causal language model with its LoRA adapter, and its tokenizer."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from speechllm.errors import ConfigError, ModelError
from speechllm.model import packing, vocabulary
from speechllm.model.hub import UNREADABLE, reason_of
from speechllm.runtime import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from speechllm.config.schema import LoraConfig
    from speechllm.model.hub import Resolved
    from speechllm.model.packing import Segments

LORA_KEY = "lora_"
ROWS_OF_LOGITS = 512  # at a time: 0.5 GB in float32 at a vocabulary of 262,144


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model and what belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kept_ids: tuple[int, ...] | None
    """Old ids of the tokens that a cut vocabulary kept, or None."""

    @property
    def width(self) -> int:
        """Return the width of its embeddings, d."""
        width: int = self.model.get_input_embeddings().embedding_dim
        return width

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return vectors [l d] of token ids, on the scale that the model's blocks expect.

        Gemma multiplies by sqrt(d) inside its embedding layer, so this and nothing else may look tokens up.
        """
        embedding: nn.Module = self.model.get_input_embeddings()
        vectors: Tensor = embedding(torch.tensor(ids, device=self.model.device, dtype=torch.long))
        return vectors

    def hidden(self, embeds_bld: Tensor, mask_bl: Tensor) -> Tensor:
        """Return the last hidden states [b l d]; `mask_bl` is True on true positions, on either side."""
        body: Any = self.model.base_model
        output = body(
            inputs_embeds=embeds_bld,
            attention_mask=mask_bl.long(),
            position_ids=positions_of(mask_bl),
            use_cache=False,
        )
        states: Tensor = output.last_hidden_state
        return states

    def hidden_packed(self, embeds_1ld: Tensor, segments: Segments) -> Tensor:
        """Return the last hidden states [1 l d] of utterances one after another, none of which sees another."""
        body: Any = self.model.base_model
        output = body(
            inputs_embeds=embeds_1ld,
            # never looked at; a mask of four dimensions keeps transformers from making one of l x l
            attention_mask=torch.zeros(1, 1, 1, 1, device=embeds_1ld.device),
            position_ids=segments.positions_1l,
            use_cache=False,
            segments=segments,
        )
        states: Tensor = output.last_hidden_state
        return states

    def logits(self, hidden_xd: Tensor) -> Tensor:
        """Return float32 logits [x v] of hidden states."""
        head: nn.Module = self.model.get_output_embeddings()
        scores: Tensor = head(hidden_xd).float()
        cap = self.model.config.to_dict().get("final_logit_softcapping")
        return torch.tanh(scores / cap) * cap if cap else scores

    def nll(self, hidden_xd: Tensor, labels_x: Tensor) -> Tensor:
        """Return the summed negative log likelihood of `labels_x`, in nats.

        Where the head is frozen, logits live for some rows at a time: the gradient of the states is made along with
        the loss. A head that is trained takes the plain way.
        """
        head: nn.Module = self.model.get_output_embeddings()
        if not torch.is_grad_enabled() or any(weight.requires_grad for weight in head.parameters()):
            return nn.functional.cross_entropy(self.logits(hidden_xd), labels_x, reduction="sum")
        loss: Tensor = FrozenHeadLoss.apply(hidden_xd, labels_x, self.logits)  # type: ignore[no-untyped-call]
        return loss


class FrozenHeadLoss(torch.autograd.Function):
    """Cross entropy over a large vocabulary whose logits are never all there."""

    @staticmethod
    def forward(ctx: Any, hidden_xd: Tensor, labels_x: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the summed loss; `logits` maps states [x d] to logits [x v]."""
        gradient_xd = torch.empty_like(hidden_xd)
        total = hidden_xd.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden_xd), ROWS_OF_LOGITS):
            rows = slice(start, start + ROWS_OF_LOGITS)
            with torch.enable_grad():
                part_xd = hidden_xd[rows].detach().requires_grad_()
                loss = nn.functional.cross_entropy(logits(part_xd), labels_x[rows], reduction="sum")
                (gradient_xd[rows],) = torch.autograd.grad(loss, part_xd)
            total += loss.detach()
        ctx.save_for_backward(gradient_xd)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the states."""
        (gradient_xd,) = ctx.saved_tensors
        return (gradients[0] * gradient_xd).to(gradient_xd.dtype), None, None


def positions_of(mask_bl: Tensor) -> Tensor:
    """Return position ids [b l] that count the true positions from 0, whatever the padding."""
    return (mask_bl.long().cumsum(dim=1) - 1).clamp(min=0)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder.

    Raises:
        ModelError: there is none that transformers can read, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except UNREADABLE as error:
        raise ModelError(
            folder, f"has no readable tokenizer ({reason_of(error)})", "download the whole model"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(folder, "its tokenizer has no end-of-sequence token", "use another model")
    return tokenizer


def load_lm(
    found: Resolved,
    dtype: str,
    device: torch.device,
    kept_ids: Sequence[int] | None,
    quantize: str | None = None,
) -> LanguageModel:
    """Return the language model in `found`, frozen, its vocabulary cut to `kept_ids` where given.

    `quantize` names a four-bit form for the linear layers (Dettmers 2023, sec. 3).

    Raises:
        ModelError: the folder holds no causal language model, or not all of its weights.
        ConfigError: the library that quantizes is not installed.
    """
    from transformers import AutoModelForCausalLM

    settings = {} if quantize is None else _quantized(quantize, dtype, device)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            found.folder,
            dtype=torch_dtype(dtype),
            attn_implementation=packing.NAME,
            output_loading_info=True,
            **settings,
        )
    except UNREADABLE as error:
        raise ModelError(
            found.folder, f"is no causal language model ({reason_of(error)})", "name another in lm.name"
        ) from error
    if report["missing_keys"]:
        raise ModelError(found.folder, f"lacks the weight {min(report['missing_keys'])}", "download it again")
    tokenizer = load_tokenizer(found.folder)
    if kept_ids is not None:
        vocabulary.cut_model(model, kept_ids)
        tokenizer = vocabulary.cut_tokenizer(tokenizer, kept_ids)
    model.requires_grad_(requires_grad=False)
    if quantize is None:
        model.to(device)
    model.eval()
    return LanguageModel(model, tokenizer, None if kept_ids is None else tuple(kept_ids))


def _quantized(kind: str, dtype: str, device: torch.device) -> dict[str, object]:
    """Return the loader's settings for four-bit layers; their scales are quantized too, as in QLoRA."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("lm.quantize", "needs the package bitsandbytes", "run: pip install -e .[qlora]")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(dtype),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def add_lora(lm: LanguageModel, config: LoraConfig) -> None:
    """Add the configured adapters to a language model; see `add_lora_layers`."""
    add_lora_layers(lm.model, config)


def add_lora_layers(model: nn.Module, config: LoraConfig) -> None:
    """Add trainable float32 adapters to the linear layers that the configuration names, in place.

    Raises:
        ConfigError: the model has no linear layer of one of these names; those it has are listed.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    from speechllm.model.lora import LeanLinear

    names = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    for target in config.targets:
        if target not in names:
            fix = f"choose from {', '.join(sorted(names))}"
            raise ConfigError("lora.targets", f"the language model has no layer {target}", fix)
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
    )
    if not getattr(model, "is_quantized", False):  # peft has layers of its own for those
        settings._register_custom_module({nn.Linear: LeanLinear})  # noqa: SLF001 - its documented way to bring a layer
    inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(LORA_KEY in name)
        if LORA_KEY in name:
            parameter.data = parameter.data.float()


def merge_lora(lm: LanguageModel) -> None:
    """Add each adapter's product to its layer's weight, so that decoding pays nothing for it.

    Only float32 weights: in smaller ones, or in four bits, rounding would lose part of the adapter.
    """
    if lm.model.dtype != torch.float32 or getattr(lm.model, "is_quantized", False):
        return
    for _, module in lm.model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "merge"):
            module.merge(safe_merge=True)


def kept_ids_for(found: Resolved, texts: Iterable[str]) -> list[int]:
    """Return the ids that a cut vocabulary keeps for `texts`; see `vocabulary.kept_ids`."""
    tokenizer: Any = load_tokenizer(found.folder)
    return vocabulary.kept_ids(tokenizer, texts)


def context_length(lm: LanguageModel) -> int:
    """Return the positions that the language model was made for."""
    config = json.loads(lm.model.config.to_json_string(use_diff=False))
    return int(config.get("max_position_embeddings") or 2048)

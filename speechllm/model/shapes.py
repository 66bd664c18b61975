"""Models without weights: their shapes on torch's meta device, for counting and planning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from speechllm import lengths
from speechllm.config.load import read_yaml
from speechllm.errors import ModelError
from speechllm.model import hub
from speechllm.model.ctc import KANA
from speechllm.model.encoder import cut_layers, without_pretraining
from speechllm.model.lm import LORA_KEY, add_lora_layers
from speechllm.model.projector import AnyProjector, build_projector
from speechllm.runtime import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from speechllm.config.schema import Config, EncoderConfig

KNOWN = Path(__file__).with_name("shapes.yaml")
META = torch.device("meta")


@dataclass(frozen=True)
class Skeleton:
    """The parts of a configuration, without weights."""

    encoder: nn.Module
    projector: AnyProjector
    lm: nn.Module
    """With its adapter, where there is one."""

    def counts(self) -> dict[str, int]:
        """Return parameters part by part."""
        lora = sum(value.numel() for name, value in self.lm.named_parameters() if LORA_KEY in name)
        return {
            "encoder": count(self.encoder),
            "projector": count(self.projector),
            "lora": lora,
            "llm": count(self.lm) - lora,
        }


def trained(config: Config, counts: Mapping[str, int]) -> int:
    """Return how many of the counted parameters a configuration trains."""
    base = {"encoder": config.encoder.train, "llm": config.lm.train}
    return counts["projector"] + counts["lora"] + sum(counts[part] for part, wanted in base.items() if wanted)


def count(module: nn.Module) -> int:
    """Return the parameters of a module, shared ones once."""
    return sum(value.numel() for value in module.parameters())


def shape_of(name: str, revision: str | None = None) -> Any:
    """Return the transformers configuration of a model: of its folder, else as known, else from the hub.

    Raises:
        ModelError: there is no such model, or transformers does not know its kind.
    """
    from transformers import AutoConfig

    folder = hub.find_local(name)
    known = read_yaml(KNOWN)
    if folder is not None:
        content = read_json(folder / "config.json")
    elif name in known and revision is None:
        content = dict(known[name])
    else:
        content = read_json(hub.config_file(name, revision))
    kind = content.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **content)
    except hub.UNREADABLE as error:
        raise ModelError(name, f"is a {kind} model that transformers cannot make", "name another model") from error


def skeleton(config: Config) -> Skeleton:
    """Return the parts of a configuration on the meta device.

    Raises:
        ModelError: a base model cannot be found.
        ConfigError: the adapter is to sit on layers that the language model does not have.
    """
    from transformers import AutoModelForCausalLM

    encoder_shape = shape_of(config.encoder.name, config.encoder.revision)
    lm_shape = shape_of(config.lm.name, config.lm.revision)
    with META:
        try:
            lm = AutoModelForCausalLM.from_config(lm_shape)
        except hub.UNREADABLE as error:
            raise ModelError(config.lm.name, "is no causal language model", "name another in lm.name") from error
        if config.lora is not None:
            add_lora_layers(lm, config.lora)
        kana_kd = torch.empty(len(KANA), lm_shape.hidden_size)
        projector = build_projector(config.projector, encoder_shape.hidden_size, lm_shape.hidden_size, kana_kd)
    return Skeleton(_encoder(config.encoder, encoder_shape), projector, lm)


def _encoder(config: EncoderConfig, shape: Any) -> nn.Module:
    """Return what is used of an encoder, on the meta device: of Whisper its first half, the layers up to the chosen."""
    from transformers import AutoModel

    with META:
        model: Any = AutoModel.from_config(shape)
    if shape.model_type == "whisper":
        half: nn.Module = model.get_encoder()
        cut_layers(config, half)
        return half
    without_pretraining(model)
    cut_layers(config, model.encoder)
    whole: nn.Module = model
    return whole


def whole_skeleton(name: str) -> dict[str, int]:
    """Return the parameters of a published Whisper: its encoder, and its decoder in the language model's place."""
    from transformers import WhisperForConditionalGeneration

    shape = shape_of(name)
    if shape.model_type != "whisper":
        raise ModelError(name, f"is a {shape.model_type} model, no Whisper", "name a Whisper, or a configuration")
    with META:
        model = WhisperForConditionalGeneration(shape)
    encoder = count(model.get_encoder())
    return {"encoder": encoder, "projector": 0, "lora": 0, "llm": count(model) - encoder}


def frames_per_second(shape: Any) -> float:
    """Return encoder frames a second of sound."""
    if shape.model_type == "whisper":
        return 50.0
    if hasattr(shape, "conv_kernel"):
        return lengths.conv_frames(16_000 * 100, shape.conv_kernel, shape.conv_stride) / 100
    return 50.0

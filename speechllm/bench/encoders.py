"""Speech encoders with random weights, in the folders that Hugging Face's loaders read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from speechllm.errors import ConfigError
from speechllm.runtime import derive_seed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Size:
    """Two encoders and how much they read."""

    wavlm: Mapping[str, int]
    whisper: Mapping[str, int]
    num_utts: int
    whisper_utts: int
    quick_utts: int
    quick_whisper_utts: int
    rounds: int
    conv: int = 512
    """Channels of WavLM's convolutions."""


def _wavlm(width: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(2, width // 64),
        "intermediate_size": 4 * width,
    }


def _whisper(width: int, layers: int) -> dict[str, int]:
    return {
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": max(2, width // 64),
        "encoder_ffn_dim": 4 * width,
    }


# small: WavLM of half the width and half the layers of WavLM-Large, its convolutions so narrow that they are a seventh
# of the work, as there; and Whisper-base. large: WavLM-Large and Whisper-large-v3
SIZES = {
    "tiny": Size(_wavlm(32, 2), _whisper(32, 2), 6, 3, quick_utts=3, quick_whisper_utts=2, rounds=1, conv=32),
    "small": Size(_wavlm(512, 12), _whisper(512, 6), 24, 8, quick_utts=6, quick_whisper_utts=2, rounds=2, conv=192),
    "large": Size(_wavlm(1024, 24), _whisper(1280, 32), 2000, 400, quick_utts=500, quick_whisper_utts=100, rounds=2),
}


def size_named(name: str) -> Size:
    """Return a size by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in SIZES:
        raise ConfigError("bench", f"dump has no size {name}", f"choose {', '.join(SIZES)}")
    return SIZES[name]


def save_wavlm(sizes: Mapping[str, int], folder: Path, conv: int = 512) -> Path:
    """Write WavLM with layer norms in its feature extractor, as WavLM-Large has it, and return its folder."""
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

    torch.manual_seed(derive_seed("bench wavlm"))
    shape = WavLMConfig(**sizes, conv_dim=(conv,) * 7, feat_extract_norm="layer", do_stable_layer_norm=True)
    WavLMModel(shape).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    return folder


def save_whisper(sizes: Mapping[str, int], folder: Path) -> Path:
    """Write Whisper with the smallest of decoders, which nobody runs here, and return its folder."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    torch.manual_seed(derive_seed("bench whisper"))
    heads = sizes["encoder_attention_heads"]
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": heads, "decoder_ffn_dim": 32, "vocab_size": 64}
    shape = WhisperConfig(**sizes, **decoder, **ends)
    WhisperModel(shape).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder

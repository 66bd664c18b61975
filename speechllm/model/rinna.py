"""Reads Nue-ASR's published checkpoint (rinna/nue-asr; Hono 2023) into an ordinary model folder of ours.

Layout of the checkpoint, from its public code (github.com/rinnakk/nue-asr, nue_asr/model.py): ``config.json`` with
``audio_encoder_config`` (HuBERT) and ``llm_config`` (GPT-NeoX), and tensors ``audio_encoder.*``, ``llm.*``,
``bridge_convs.N.*`` and ``bridge_proj.*``. The model is cut into an encoder folder and a language-model folder of
Hugging Face and a projector of ours; from there on nothing knows that it came from elsewhere.
"""

from __future__ import annotations

import logging
import pickle
import shutil
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors.torch import save_file

from speechllm.config import load as configs
from speechllm.config.schema import Config
from speechllm.errors import ModelError
from speechllm.model import hub
from speechllm.model.assemble import CONFIG_FILE, FORMAT, MODEL_FILE, TRAINED_FILE
from speechllm.model.lm import load_tokenizer
from speechllm.model.state import load_tensors
from speechllm.runtime import read_json, write_json
from speechllm.text.prompt import encode

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

log = logging.getLogger(__name__)

LAYOUT = 1  # of what is made of a checkpoint; grows with it
SEPARATOR = "[SEP]"
BRIDGE = {"bridge_conv_kernel_size": [4, 4], "bridge_conv_stride": [2, 2]}  # as published, and as `NueBridge` has it
ENCODER, LM, MODEL = "encoder", "lm", "model"
PARTS = {"audio_encoder.": ENCODER, "llm.": LM, "bridge_": MODEL}
PROJECTOR_NAMES = {"bridge_convs.": "projector.convs.", "bridge_proj.": "projector.out."}
TOKENIZER_SUFFIXES = (".model", ".txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# how the published program reads and writes (nue_asr/transcribe.py)
READING = {"prompt": "", "template": f"{{audio}}{SEPARATOR}"}
DECODING = {"tokens_per_s": 4.0, "extra_tokens": 20, "min_tokens": 2}


def imported(name: str, revision: str | None = None) -> Path:
    """Return the model folder of a published Nue-ASR checkpoint, cut into its parts on first use.

    Raises:
        ModelError: no such model, or not of that layout.
    """
    found = hub.resolve(name, revision)
    folder = hub.cache_dir().resolve() / f"nue-asr-{LAYOUT}-{found.fingerprint}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / MODEL / MODEL_FILE).is_file():
            log.info("model import name=%s into=%s (once)", name, folder)
            _import(found, folder)
    return folder


def _import(found: hub.Resolved, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    content = read_json(found.folder / "config.json")
    encoder, lm = content.get("audio_encoder_config"), content.get("llm_config")
    if content.get("model_type") != "nue_asr" or not isinstance(encoder, dict) or not isinstance(lm, dict):
        raise ModelError(found.folder, "is no Nue-ASR checkpoint", "name rinna/nue-asr or a copy of it")
    for key, published in BRIDGE.items():
        if content.get(key, published) != published:
            raise ModelError(found.folder, f"has {key} {content[key]}, not {published}", "use the published checkpoint")
    _split_weights(found.folder, folder)
    write_json(folder / ENCODER / "config.json", {**encoder, "model_type": "hubert"})
    # the published program hands the samples on as they are
    write_json(
        folder / ENCODER / "preprocessor_config.json",
        {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": False, "return_attention_mask": False},
    )
    write_json(folder / LM / "config.json", {**lm, "model_type": "gpt_neox"})
    for path in found.folder.iterdir():
        if path.name in TOKENIZER_FILES or path.suffix in TOKENIZER_SUFFIXES:
            shutil.copyfile(path, folder / LM / path.name)
    if len(encode(load_tokenizer(folder / LM), SEPARATOR)) != 1:
        raise ModelError(found.folder, f"its tokenizer does not know {SEPARATOR}", "use the published checkpoint")
    _write_model(folder)


def _write_model(folder: Path) -> None:
    """Write configuration and origin; ``model.json`` comes last."""
    config = Config.model_validate(
        {
            **READING,
            "encoder": {"name": str(folder / ENCODER)},
            "lm": {"name": str(folder / LM), "dtype": "float32"},
            "projector": {"kind": "nue"},
            "lora": None,
            "decode": DECODING,
        }
    )
    configs.dump(config, folder / MODEL / CONFIG_FILE)
    origin = {
        "width_h": len(load_tensors(folder / MODEL / TRAINED_FILE)["projector.convs.0.bias"]),
        "encoder_fingerprint": hub.fingerprint(folder / ENCODER),
        "lm_fingerprint": hub.fingerprint(folder / LM),
        "kept_ids": None,
    }
    write_json(folder / MODEL / MODEL_FILE, {**origin, "format": FORMAT, "prompt": ""})


def _split_weights(source: Path, folder: Path) -> None:
    """Write the tensors of a checkpoint to the folder of the part that each belongs to, shard by shard.

    Raises:
        ModelError: there are no weights, or a tensor belongs to no part.
    """
    shards = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not shards:
        raise ModelError(source, "has no weights", "download the whole model")
    places: dict[str, dict[str, str]] = {part: {} for part in PARTS.values()}
    for number, shard in enumerate(shards):
        split: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS.values()}
        for name, value in _tensors(shard).items():
            part, own_name = _place(shard, name)
            split[part][own_name] = value
        for part, tensors in split.items():
            file = TRAINED_FILE if part == MODEL else f"model-{number:05d}.safetensors"
            if tensors:
                _save(folder / part / file, tensors)
                places[part] |= dict.fromkeys(tensors, file)
    for part, names in places.items():
        if not names:
            raise ModelError(source, f"has no tensor of the {part}", "use the published checkpoint")
    for part in (ENCODER, LM):
        write_json(folder / part / "model.safetensors.index.json", {"metadata": {}, "weight_map": places[part]})


def _place(shard: Path, name: str) -> tuple[str, str]:
    """Return the part that a tensor belongs to, and its name there."""
    for prefix, part in PARTS.items():
        if name.startswith(prefix) and part != MODEL:
            return part, name.removeprefix(prefix)
    for prefix, ours in PROJECTOR_NAMES.items():
        if name.startswith(prefix):
            return MODEL, ours + name.removeprefix(prefix)
    raise ModelError(shard, f"holds the unknown tensor {name}", "use the published checkpoint")


def _tensors(shard: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; of a pickled one nothing but tensors is ever made."""
    try:
        if shard.suffix == ".bin":
            loaded: dict[str, Tensor] = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
            return loaded
        return load_tensors(shard)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ModelError(shard, f"is no readable weight file ({hub.reason_of(error)})", "download it again") from error


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors; those of the projector join what an earlier shard held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = _tensors(path) if path.is_file() else {}
    save_file({**earlier, **{name: value.contiguous() for name, value in tensors.items()}}, path, {"format": "pt"})

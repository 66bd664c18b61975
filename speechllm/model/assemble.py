"""Builds the model of a configuration, and reads and writes trained model folders."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from speechllm.config import load as configs
from speechllm.errors import ModelError
from speechllm.model import hub, lm, packed, vocabulary
from speechllm.model.encoder import load_encoder
from speechllm.model.projector import build_projector
from speechllm.model.speechllm import SpeechLlm, kana_embeddings
from speechllm.model.state import check_keys, load_tensors, save_tensors
from speechllm.runtime import derive_seed, pick_device, read_json, write_json
from speechllm.text.prompt import Form

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from speechllm.config.schema import Config
    from speechllm.model.encoder import SpeechEncoder

CONFIG_FILE = "config.yaml"
MODEL_FILE = "model.json"
TRAINED_FILE = "trained.safetensors"
PROVENANCE_FILE = "provenance.json"
FORMAT = 1
MAX_WIDTH_H = 1 << 16  # the widest encoders have 1,280
COPY_AGAIN = "copy the folder again"


@dataclass(frozen=True)
class Origin:
    """What a model was built on; a trained state fits these and no others."""

    width_h: int
    """Width of the encoder's frames."""
    encoder_fingerprint: str
    lm_fingerprint: str
    kept_ids: tuple[int, ...] | None
    """Token ids of a cut vocabulary."""
    encoder_weights: str | None = None
    """Fingerprints of the weights alone, which a packed folder says too; see `hub.resolve_trained_on`."""
    lm_weights: str | None = None


def origin_of(config: Config, width_h: int, encoder_fingerprint: str, texts: Sequence[str]) -> Origin:
    """Return the origin of a model to be trained on `texts`."""
    found = hub.resolve(config.lm.name, config.lm.revision)
    kept = tuple(lm.kept_ids_for(found, texts)) if config.lm.cut_vocabulary else None
    return Origin(width_h, encoder_fingerprint, found.fingerprint, kept)


def assemble(config: Config, origin: Origin, dtype: str, encoder: SpeechEncoder | None = None) -> SpeechLlm:
    """Return the untrained model: new weights are a function of the seed alone.

    An `encoder` that is there already is taken where the encoder is to be trained.

    Raises:
        ModelError: the language model is not the one of `origin`.
    """
    found = find_lm(config, origin)
    device = pick_device(config.device)
    language_model = lm.load_lm(found, dtype, device, origin.kept_ids, config.lm.quantize)
    torch.manual_seed(derive_seed("weights", config.seed))
    if config.lora is not None:
        lm.add_lora(language_model, config.lora)
    elif config.lm.train:
        language_model.model.requires_grad_(requires_grad=True)
    projector = build_projector(config.projector, origin.width_h, language_model.width, kana_embeddings(language_model))
    form = Form(config.prompt, config.template)
    if not config.encoder.train:
        return SpeechLlm(projector.to(device), language_model, form)
    encoder = encoder or encoder_of(config, origin)
    encoder.module.requires_grad_(requires_grad=True)
    return SpeechLlm(projector.to(device), language_model, form, encoder)


def find_lm(config: Config, origin: Origin) -> hub.Resolved:
    """Return where the language model is that a model was trained with.

    Raises:
        ModelError: the one found is another, or the model keeps tokens that it does not have.
    """
    found = hub.resolve_trained_on(config.lm.name, config.lm.revision, origin.lm_fingerprint, origin.lm_weights)
    if found.fingerprint != origin.lm_fingerprint:
        what = f"is another model (fingerprint {found.fingerprint}) than the one trained with ({origin.lm_fingerprint})"
        raise ModelError(found.folder, what, "use the language model that it was trained with")
    size = None if origin.kept_ids is None else _num_tokens(found)
    if origin.kept_ids is not None and size is not None and max(origin.kept_ids) >= size:
        what = f"has a wrong kept_ids ({max(origin.kept_ids)} is beyond the {size} tokens of {found.folder})"
        raise ModelError(MODEL_FILE, what, COPY_AGAIN)
    return found


def _num_tokens(found: hub.Resolved) -> int | None:
    """Return how many embeddings a language model has; None where its configuration does not say."""
    from transformers import AutoConfig

    try:
        settings: Any = AutoConfig.from_pretrained(found.folder)
    except hub.UNREADABLE:  # told where the model is loaded
        return None
    size = getattr(settings.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def tokenizer_of(found: hub.Resolved, origin: Origin) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a trained model, whose language model `find_lm` has found, without its weights."""
    tokenizer: Any = lm.load_tokenizer(found.folder)
    return tokenizer if origin.kept_ids is None else vocabulary.cut_tokenizer(tokenizer, origin.kept_ids)


def find_encoder(config: Config, origin: Origin) -> hub.Resolved:
    """Return where the encoder is that a model was trained with.

    Raises:
        ModelError: the one found is another.
    """
    name, revision = config.encoder.name, config.encoder.revision
    found = hub.resolve_trained_on(name, revision, origin.encoder_fingerprint, origin.encoder_weights)
    if found.fingerprint != origin.encoder_fingerprint:
        what = f"is another model (fingerprint {found.fingerprint}) than the one trained with"
        raise ModelError(found.folder, what, "use the encoder that it was trained with")
    return found


def encoder_of(config: Config, origin: Origin) -> SpeechEncoder:
    """Return the encoder that a model was trained with, as published; see `find_encoder`."""
    return load_encoder(config.encoder, find_encoder(config, origin), pick_device(config.device))


def save_model(folder: Path, model: SpeechLlm, config: Config, origin: Origin) -> None:
    """Write what training made and what it was made on; ``model.json`` comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".*.tmp"):  # by a kill
        left_over.unlink()
    configs.dump(config, folder / CONFIG_FILE)
    temporary = folder / f".{TRAINED_FILE}.tmp"
    save_tensors(temporary, model.trainable_state())
    temporary.replace(folder / TRAINED_FILE)
    content = {**vars(origin), "format": FORMAT, "prompt": config.prompt}
    write_json(folder / MODEL_FILE, content)


def read_model(folder: Path) -> tuple[Config, Origin]:
    """Return configuration and origin of a trained model, without its weights.

    Raises:
        ModelError: the folder holds no trained model.
    """
    for name in (MODEL_FILE, TRAINED_FILE):
        if not (folder / name).is_file():
            raise ModelError(folder, f"holds no trained model ({name} is missing)", "run stage 3 first")
    config = packed.as_packed(folder, folder / MODEL_FILE, configs.load(folder / CONFIG_FILE))
    return config, _read_origin(folder)


def load_model(folder: Path, device: str | None = None, dtype: str | None = None) -> SpeechLlm:
    """Return a trained model in the precision of decoding.

    The adapter is merged into float32 weights; beside smaller ones it stays apart, for rounding would lose it.

    `device` and `dtype` stand in for the configured ones.

    Raises:
        ModelError: the folder is not whole or damaged, or the base models are not those it was trained with.
    """
    config, origin = read_model(folder)
    if device is not None:
        config = config.model_copy(update={"device": device})
    packed.check_sums(folder, packed.weight_files(folder))
    model = assemble(config, origin, dtype or config.decode.dtype)
    state = load_tensors(folder / TRAINED_FILE)
    check_keys(folder / TRAINED_FILE, state, model.trainable_state())
    model.load_trainable(state)
    lm.merge_lora(model.lm)
    return model.eval()


def _read_origin(folder: Path) -> Origin:
    content = read_json(folder / MODEL_FILE)
    if content.get("format") != FORMAT:
        what = f"has format {content.get('format')}, this version reads {FORMAT}"
        raise ModelError(folder / MODEL_FILE, what, "train again or use the version that made it")
    for field in fields(Origin):
        if field.default is MISSING and field.name not in content:
            raise ModelError(folder / MODEL_FILE, f"has no {field.name}", "train again or copy the folder again")
    try:
        record = _Record.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        field_name = ".".join(map(str, fault["loc"]))
        raise ModelError(folder / MODEL_FILE, f"has a wrong {field_name} ({fault['msg']})", COPY_AGAIN) from error
    kept = None if record.kept_ids is None else tuple(record.kept_ids)
    return Origin(**{**dict(record), "kept_ids": kept})


class _Record(BaseModel):
    """What `Origin` is read from; ``model.json`` holds more."""

    model_config = ConfigDict(frozen=True, strict=True)

    width_h: Annotated[int, Field(ge=1, le=MAX_WIDTH_H)]
    encoder_fingerprint: str
    lm_fingerprint: str
    kept_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None
    encoder_weights: str | None = None
    lm_weights: str | None = None

    @field_validator("kept_ids")
    @classmethod
    def _keeps_a_token_once(cls, kept: list[int] | None) -> list[int] | None:
        if kept is not None and len(set(kept)) != len(kept):
            raise PydanticCustomError("doubled", "it holds a token twice")
        return kept

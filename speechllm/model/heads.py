"""Two CTC heads beside a trained model, on the frames that it reads: kana for times, its own tokens for drafts.

They lie in the model's folder: ``heads.safetensors``, and ``heads.json`` which says what frames they read. Tokens are
written out there, so that the heads fit whatever numbers a cut vocabulary gives them.

Shapes: q head frames, k symbols (0 is the blank).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from speechllm.config.schema import CtcProjector, HeadsConfig
from speechllm.errors import ModelError
from speechllm.folders import differences
from speechllm.model.assemble import read_model
from speechllm.model.ctc import KANA, CtcHead
from speechllm.model.state import check_keys, load_tensors, save_tensors
from speechllm.runtime import atomic_path, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from speechllm.config.schema import Config
    from speechllm.model.assemble import Origin
    from speechllm.model.speechllm import SpeechLlm

HEADS_FILE = "heads.safetensors"
HEADS_RECORD = "heads.json"
FORMAT = 1
MAX_TOKENS = 1 << 20
FIX = "remove heads.json and run `speechllm heads` again"


@dataclass(frozen=True)
class Heads:
    """The heads of a model; None where there is no such head."""

    kana: CtcHead | None
    tokens: CtcHead | None
    token_ids: tuple[int, ...] = ()
    """The language model's id of each symbol of the token head, the blank left out."""

    def parts(self) -> dict[str, CtcHead]:
        """Return the heads that there are, by name."""
        return {name: head for name, head in (("kana", self.kana), ("tokens", self.tokens)) if head is not None}


def new_heads(settings: HeadsConfig, width_h: int, token_ids: Sequence[int], *, kana: bool) -> Heads:
    """Return untrained heads for frames of `width_h`, drawn from torch's current generator."""
    form = CtcProjector(hidden=settings.hidden, stride=settings.stride, dropout=settings.dropout)
    return Heads(
        CtcHead(form, width_h, len(KANA)) if kana else None,
        CtcHead(form, width_h, len(token_ids)) if token_ids else None,
        tuple(token_ids),
    )


def frames_record(config: Config, origin: Origin) -> dict[str, object]:
    """Return what decides the frames that heads read; how they are stored does not."""
    encoder = config.encoder
    return {
        "encoder": origin.encoder_fingerprint,
        "layer": encoder.layer,
        "pad_to_30s": encoder.pad_to_30s,
        "width": origin.width_h,
    }


def save_heads(
    folder: Path, heads: Heads, settings: HeadsConfig, frames: Mapping[str, object], tokens: Sequence[str]
) -> None:
    """Write heads into a model's folder; ``heads.json``, which makes them count, comes last."""
    tensors = {
        f"{name}.{key}": value for name, head in heads.parts().items() for key, value in head.state_dict().items()
    }
    with atomic_path(folder / HEADS_FILE) as temporary:
        save_tensors(temporary, tensors)
    content = {
        "format": FORMAT,
        "frames": dict(frames),
        "settings": settings.model_dump(mode="json"),
        "kana": heads.kana is not None,
        "tokens": list(tokens),
    }
    write_json(folder / HEADS_RECORD, content)


def load_heads(folder: Path, model: SpeechLlm) -> Heads | None:
    """Return the heads in the folder that `model` was loaded from; None where it has none.

    Raises:
        ModelError: they are damaged, or were trained on other frames or for another language model.
    """
    path = folder / HEADS_RECORD
    if not path.is_file():
        return None
    content = read_json(path)
    frames = content.get("frames")
    wanted = frames_record(*read_model(folder))
    if content.get("format") != FORMAT or not isinstance(frames, dict):
        raise ModelError(path, f"has format {content.get('format')}, this version reads {FORMAT}", FIX)
    for name, was, now in differences(frames, wanted):
        raise ModelError(path, f"was trained on frames with {name} = {was}, the model's have {now}", FIX)
    ids = _ids_of(path, content.get("tokens"), model.lm.tokenizer)
    try:
        settings = HeadsConfig.model_validate(content.get("settings"))
    except ValidationError as error:
        raise ModelError(path, "says nothing readable of its settings", FIX) from error
    with torch.device("meta"):  # nothing is held for sizes that the file does not have
        heads = new_heads(settings, int(str(wanted["width"])), ids, kana=content.get("kana") is True)
    _fill(folder / HEADS_FILE, heads, model.lm.model.device)
    return heads


def _ids_of(path: Path, tokens: object, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(tokens, list) or len(tokens) > MAX_TOKENS or not all(isinstance(one, str) for one in tokens):
        raise ModelError(path, "has no list of tokens", FIX)
    vocabulary: dict[str, int] = tokenizer.get_vocab() if tokens else {}
    for token in tokens:
        if token not in vocabulary:
            raise ModelError(path, f"was trained for a language model that has the token {token!r}", FIX)
    return [vocabulary[token] for token in tokens]


def _fill(path: Path, heads: Heads, device: torch.device) -> None:
    state = load_tensors(path)
    own = {f"{name}.{key}": value for name, head in heads.parts().items() for key, value in head.state_dict().items()}
    check_keys(path, state, own)
    for name, head in heads.parts().items():
        mine = {key: state[f"{name}.{key}"].float().to(device) for key in head.state_dict()}
        head.load_state_dict(mine, assign=True)
        head.eval().requires_grad_(requires_grad=False)

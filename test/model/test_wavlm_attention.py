"""WavLM through fused attention: frames and gradients are those of Hugging Face's own model."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from speechllm.config.schema import EncoderConfig
from speechllm.model import wavlm_attention
from speechllm.model.encoder import SpeechEncoder, load_encoder
from speechllm.model.wavlm_attention import GatedAttention, buckets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

UNLIKE, ALIKE = (6_400, 24_001, 400, 9_100), (8_000, 8_000, 8_000)  # 24,001 samples are 74 frames, 400 are one
KINDS = ("layer-norm", "group-norm")
POSITIONS = ("rel_attn_embed.weight", "gru_rel_pos_linear.weight", "gru_rel_pos_linear.bias", "gru_rel_pos_const")


def base(folder: Path) -> Path:
    """Write WavLM with a group-norm feature extractor, as WavLM-base has it."""
    torch.manual_seed(11)
    return tiny._save_encoder(WavLMModel(WavLMConfig(**tiny.WAV2VEC2_SIZES, **tiny.ENCODER_SPREAD)), folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a model of each kind, its positions loud enough that whatever became of them is heard."""
    made = {}
    for kind, make in zip(KINDS, (tiny.wavlm, base), strict=True):
        made[kind] = make(tmp_path_factory.mktemp(kind))
        change(made[kind], POSITIONS[:3], lambda value: 4 * value)
    return made


def change(folder: Path, names: Sequence[str], how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    state = load_file(folder / "model.safetensors")
    changed = {key: how(value) if key.endswith(tuple(names)) else value for key, value in state.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def encoder(folder: Path, *, layer: int | None = None, dtype: str = "float32") -> SpeechEncoder:
    return load_encoder(EncoderConfig(name=str(folder), layer=layer, dtype=dtype), tiny.found(folder), tiny.CPU)


def waves(counts: Sequence[int]) -> list[NDArray[Any]]:
    return [tiny.wave(count, seed) for seed, count in enumerate(counts)]


def hugging_face(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return Hugging Face's model, which neither masks its input nor drops a layer."""
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    model.config.apply_spec_augment, model.config.layerdrop = False, 0.0
    assert isinstance(model.encoder.layers[1].attention, WavLMAttention)
    return model


def their_frames(model: Any, folder: Path, counts: Sequence[int], layer: int | None = None) -> list[torch.Tensor]:
    """Return the true frames of each wave; a group norm reads them one by one."""
    if model.config.feat_extract_norm == "group" and len(set(counts)) > 1:
        return [found for wave in waves(counts) for found in _theirs(model, folder, [wave], layer)]
    return _theirs(model, folder, waves(counts), layer)


def _theirs(model: Any, folder: Path, sounds: list[NDArray[Any]], layer: int | None) -> list[torch.Tensor]:
    reader = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    inputs = reader(sounds, sampling_rate=16_000, return_tensors="pt", padding=True)
    mask = None if model.config.feat_extract_norm == "group" else inputs["attention_mask"]
    states = model(inputs["input_values"].to(model.dtype), attention_mask=mask, output_hidden_states=layer is not None)
    hidden = states.last_hidden_state if layer is None else states.hidden_states[layer]
    lengths = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(dim=1))
    return [row[:length] for row, length in zip(hidden, lengths.tolist(), strict=True)]


def worst(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of two lists of frames."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [1, None])
@pytest.mark.parametrize("counts", [UNLIKE, ALIKE], ids=["unlike", "alike"])
def test_frames_are_hugging_faces_own(
    kind: str, layer: int | None, counts: tuple[int, ...], folders: dict[str, Path]
) -> None:
    made = encoder(folders[kind], layer=layer)
    with torch.inference_mode():
        theirs = their_frames(hugging_face(folders[kind]), folders[kind], counts, layer)
    assert worst(made.encode(waves(counts)), theirs) <= 1e-5  # without gradients, where memory is used again
    assert worst(made.frames(waves(counts)), theirs) <= 1e-5
    assert min(float(frames.std()) for frames in theirs) > 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", POSITIONS)
def test_positions_and_gates_are_heard(kind: str, part: str, folders: dict[str, Path]) -> None:
    made = encoder(folders[kind])
    before = made.encode(waves(UNLIKE))
    changed = [value for name, value in made.module.named_parameters() if name.endswith(part)]
    assert changed
    with torch.no_grad():
        for value in changed:
            value.zero_()
    assert worst(made.encode(waves(UNLIKE)), before) > 1e-3  # a hundred times what is forgiven


def test_a_batch_of_unlike_lengths_warns_of_nothing(folders: dict[str, Path]) -> None:
    made = encoder(folders["layer-norm"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")  # pytest's own filter lets one of Hugging Face's pass
        made.encode(waves(UNLIKE))
    assert [str(one.message) for one in seen] == []


def loss(frames: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a loss to which every number of the frames adds something of its own."""
    drawn = torch.Generator().manual_seed(4)
    return torch.stack([(row * torch.randn(row.shape, generator=drawn)).sum() for row in frames]).sum()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if name != "masked_spec_embed"}


def layers(made: SpeechEncoder) -> Any:
    module: Any = made.module
    return module.encoder.layers


def without_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, WavLMAttention | GatedAttention):
            module.dropout = 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "remade"])
def test_gradients_in_training_are_hugging_faces_own(
    kind: str, folders: dict[str, Path], *, checkpointing: bool
) -> None:
    made, theirs = encoder(folders[kind]), hugging_face(folders[kind])
    for model in (made.module, theirs):
        without_dropout(model)
        model.train().requires_grad_(requires_grad=True)
    if checkpointing:
        made.module.activation_checkpointing_enable()  # type: ignore[operator] # transformers' own
    assert [layer.gradient_checkpointing for layer in layers(made)] == [checkpointing] * 2
    loss(made.frames(waves(UNLIKE))).backward()  # type: ignore[no-untyped-call]
    loss(their_frames(theirs, folders[kind], UNLIKE)).backward()  # type: ignore[no-untyped-call]
    ours, wanted = gradients(made.module), gradients(theirs)
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.endswith("k_proj.bias"):  # nothing but rounding: what every key gets alike changes no softmax
            assert ours[name].norm() <= 1e-5 * wanted[name.replace("k_proj", "v_proj")].norm(), name
        else:
            assert (ours[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_in_training_draws_what_hugging_faces_draws(kind: str, folders: dict[str, Path]) -> None:
    made, theirs = encoder(folders[kind]), hugging_face(folders[kind])
    made.module.train()
    theirs.train()
    attentions = [layer.attention for layer in layers(made)]
    assert [attention.dropout for attention in attentions] == [0.1, 0.1]
    with torch.no_grad():
        torch.manual_seed(5)
        wanted = their_frames(theirs, folders[kind], [8_000])  # rows of a batch would lie in memory in another order
        torch.manual_seed(5)
        assert worst(made.frames(waves([8_000])), wanted) <= 1e-5
        for attention in attentions:
            attention.dropout = 0.0
        torch.manual_seed(5)
        assert worst(made.frames(waves([8_000])), wanted) > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [1, None])
def test_weights_keep_their_names_and_their_order(kind: str, layer: int | None, folders: dict[str, Path]) -> None:
    encoded = encoder(folders[kind], layer=layer)
    assert all(isinstance(block.attention, GatedAttention) for block in layers(encoded))
    made = encoded.module
    theirs = hugging_face(folders[kind])
    del theirs.masked_spec_embed
    theirs.encoder.layers = theirs.encoder.layers[:layer]
    if layer and kind == "layer-norm":
        theirs.encoder.layer_norm = torch.nn.Identity()
    assert [name for name, _ in made.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    state = theirs.state_dict()
    assert list(made.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "bfloat16 products"])
def test_half_precision_is_as_close_to_single_as_hugging_faces(
    kind: str, precision: str, folders: dict[str, Path]
) -> None:
    exact = encoder(folders[kind]).encode(waves(UNLIKE))
    dtype, _, products = precision.partition(" ")
    dtype = "float32" if products else dtype
    made, theirs = encoder(folders[kind], dtype=dtype), hugging_face(folders[kind], getattr(torch, dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(products)), torch.no_grad():
        ours_off = off(made.frames(waves(UNLIKE)), exact)
        theirs_off = off(their_frames(theirs, folders[kind], UNLIKE), exact)
    assert 0 < ours_off <= 1.2 * theirs_off


def off(frames: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Return the sum of all distances."""
    return sum(float((row.float() - wanted).abs().sum()) for row, wanted in zip(frames, exact, strict=True))


def test_bfloat16_products_in_training_have_gradients_everywhere(folders: dict[str, Path]) -> None:
    made = encoder(folders["layer-norm"])
    made.module.train().requires_grad_(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss(made.frames(waves(UNLIKE))).backward()  # type: ignore[no-untyped-call]
    assert all(value.isfinite().all() and value.abs().max() > 0 for value in gradients(made.module).values())


def test_columns_that_a_kernel_asks_for_change_nothing(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = encoder(folders["layer-norm"])
    before = made.encode(waves(UNLIKE))
    asked = []

    def wider(query_bnec: torch.Tensor) -> int:
        asked.append(query_bnec.shape[2])
        return query_bnec.shape[2] + 6

    monkeypatch.setattr(wavlm_attention, "_padded", wider)
    assert worst(made.encode(waves(UNLIKE)), before) <= 1e-5
    assert asked == [74]  # once a pass, not in every layer


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(320, 800), (32, 50), (20, 1_000)])
def test_buckets_are_hugging_faces_at_every_distance(num_buckets: int, max_distance: int) -> None:
    theirs = WavLMAttention(4, 1, num_buckets=num_buckets, max_distance=max_distance)
    distances = torch.arange(-3_000, 3_001)
    assert torch.equal(buckets(distances, num_buckets, max_distance), theirs._relative_positions_bucket(distances))
    found = set(buckets(distances, num_buckets, max_distance).tolist())
    assert found == set(range(num_buckets)) - {num_buckets // 2}  # of the keys ahead none is at distance 0

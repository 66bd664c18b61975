"""Frozen encoders: each utterance's frames are those of the utterance alone, and those of Hugging Face."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperModel,
)

from speechllm.config.schema import EncoderConfig
from speechllm.data import kaldi
from speechllm.errors import DataError, ModelError
from speechllm.model.encoder import SpeechEncoder, load_encoder, read_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

MIXED = (6_400, 14_401, 10_080, 9_100)  # 10,080 are an odd number of Whisper's mel frames, 9,100 of w2v-BERT's


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("encoders")
    return {name: make(base / name) for name, make in tiny.ENCODERS.items()}


def encoder(folder: Path, *, layer: int | None = None, pad_to_30s: bool = False) -> SpeechEncoder:
    config = EncoderConfig(name=str(folder), layer=layer, pad_to_30s=pad_to_30s)
    return load_encoder(config, tiny.found(folder), tiny.CPU)


def mixed(made: SpeechEncoder) -> list[NDArray[np.float32]]:
    """Return sounds of mixed lengths, the last as short as the encoder takes it."""
    return [tiny.wave(count, seed) for seed, count in enumerate((*MIXED, made.min_samples))]


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_a_batch_gives_each_utterance_the_frames_it_has_alone(family: str, folders: dict[str, Path]) -> None:
    made = encoder(folders[family])
    waves = mixed(made)
    together = made.encode(waves)
    for wave, frames_eh in zip(waves, together, strict=True):
        torch.testing.assert_close(frames_eh, made.encode([wave])[0], rtol=0, atol=1e-5)
        assert frames_eh.std() > 0.1  # frames that say nothing would agree too


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_a_batch_of_equal_lengths_gives_the_frames_of_each_alone(family: str, folders: dict[str, Path]) -> None:
    made = encoder(folders[family])
    waves = [tiny.wave(8_000, seed) for seed in range(3)]
    for wave, frames_eh in zip(waves, made.encode(waves), strict=True):
        torch.testing.assert_close(frames_eh, made.encode([wave])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_frames_are_as_many_and_as_wide_as_the_encoder_says(family: str, folders: dict[str, Path]) -> None:
    made = encoder(folders[family])
    waves = mixed(made)
    shapes = [tuple(frames.shape) for frames in made.encode(waves)]
    assert shapes == [(made.num_frames(len(wave)), made.width) for wave in waves]
    assert shapes[-1] == (1, 16)


@pytest.mark.parametrize("family", tiny.ENCODERS)
@pytest.mark.parametrize("layer", [1, None])
def test_gradients_reach_every_parameter_of_the_encoder(
    family: str, layer: int | None, folders: dict[str, Path]
) -> None:
    made = encoder(folders[family], layer=layer)
    waves = mixed(made)[:2]
    made.encode(waves)  # leaves nothing behind that autograd would refuse
    made.module.requires_grad_(requires_grad=True)
    torch.manual_seed(1)
    found = made.frames(waves)
    torch.stack([(frames_eh * torch.randn_like(frames_eh)).sum() for frames_eh in found]).sum().backward()  # type: ignore[no-untyped-call]
    for name, value in made.module.named_parameters():
        assert value.grad is not None, name
        # what is added to every key alike cannot change a softmax
        assert value.grad.abs().max() > 0 or name.endswith(("k_proj.bias", "linear_k.bias")), name


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_frames_are_those_of_encode_in_the_encoders_own_precision(family: str, folders: dict[str, Path]) -> None:
    for dtype in ("float32", "bfloat16"):
        config = EncoderConfig(name=str(folders[family]), dtype=dtype)
        made = load_encoder(config, tiny.found(folders[family]), tiny.CPU)
        for frames_eh, encoded_eh in zip(made.frames(mixed(made)), made.encode(mixed(made)), strict=True):
            assert str(frames_eh.dtype) == f"torch.{dtype}"
            assert torch.equal(frames_eh.float(), encoded_eh)
            assert not frames_eh.requires_grad  # nobody asked for any


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_an_encoder_in_training_draws_from_torchs_seed_alone_and_uses_all_of_itself(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[family], tmp_path / "greedy")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings |= {"mask_time_prob": 0.6, "mask_time_length": 2, "apply_spec_augment": True, "layerdrop": 0.9}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    made = encoder(folder)
    made.module.train().requires_grad_(requires_grad=True)
    drawn = []
    for _ in range(2):
        torch.manual_seed(2)
        drawn.append(made.frames([tiny.wave(6_400)])[0])
        np.random.random()  # noqa: NPY002 - what transformers draws its masks from
    assert torch.equal(*drawn)
    drawn[0].square().sum().backward()  # type: ignore[no-untyped-call]
    assert [name for name, value in made.module.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("family", tiny.WAV2VEC2_KIND)
@pytest.mark.parametrize("layer", [1, None])
def test_frames_are_hugging_faces_own_of_that_layer(family: str, layer: int | None, folders: dict[str, Path]) -> None:
    wave = tiny.wave(9_000)
    inputs = Wav2Vec2FeatureExtractor.from_pretrained(folders[family])(
        wave, sampling_rate=16_000, return_tensors="pt", return_attention_mask=False
    )
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folders[family]).eval()(**inputs, output_hidden_states=True)
    wanted = states.last_hidden_state if layer is None else states.hidden_states[layer]
    got = encoder(folders[family], layer=layer).encode([wave])[0]
    torch.testing.assert_close(got, wanted[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_samples", [9_000, 9_100], ids=["even", "odd"])
@pytest.mark.parametrize("layer", [1, None])
def test_frames_of_w2v_bert_are_hugging_faces_own(
    layer: int | None, num_samples: int, folders: dict[str, Path]
) -> None:
    wave = tiny.wave(num_samples)
    inputs = SeamlessM4TFeatureExtractor.from_pretrained(folders["w2v-bert"])(
        wave, sampling_rate=16_000, return_tensors="pt"
    )
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folders["w2v-bert"]).eval()(**inputs, output_hidden_states=True)
    wanted = states.last_hidden_state if layer is None else states.hidden_states[layer]
    got = encoder(folders["w2v-bert"], layer=layer).encode([wave])[0]
    torch.testing.assert_close(got, wanted[0][inputs["attention_mask"][0].bool()], rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [tiny.wav2vec2, tiny.w2v_bert])
def test_an_adapter_on_top_is_left_out(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make(tmp_path, add_adapter=True, num_adapter_layers=1, output_hidden_size=12)
    made = encoder(folder)
    model = AutoModel.from_pretrained(folder).eval()
    assert model.adapter is not None
    waves = mixed(made)
    states = []
    model.adapter.register_forward_pre_hook(lambda _module, given: states.append(given[0]))
    for wave, frames_eh in zip(waves, made.encode(waves), strict=True):
        assert frames_eh.shape == (made.num_frames(len(wave)), 16)
    kind = SeamlessM4TFeatureExtractor if make is tiny.w2v_bert else Wav2Vec2FeatureExtractor
    inputs = kind.from_pretrained(folder)(waves[0], sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        model(**inputs)
    torch.testing.assert_close(made.encode(waves[:1])[0], states[0][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_projection_input_dim": 80}, "makes 160 channels a frame, but reads 80; download the whole model"),
        ({"position_embeddings_type": "rotary"}, "has positions of the kind rotary, not relative_key"),
    ],
    ids=["input", "positions"],
)
def test_a_w2v_bert_of_another_make_is_refused(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        encoder(tiny.w2v_bert(tmp_path, **fields))


def test_only_encoders_that_see_the_padding_ask_for_equal_lengths(folders: dict[str, Path]) -> None:
    asks = {family for family in tiny.ENCODERS if encoder(folders[family]).equal_lengths_only}
    assert asks == {"hubert", "data2vec-audio"}


def hugging_face_whisper(folder: Path, wave: np.ndarray, layer: int | None = None) -> torch.Tensor:
    """Return the frames of a wave padded to 30 s, as transformers computes them."""
    mel = WhisperFeatureExtractor.from_pretrained(folder)(wave, sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        states = WhisperModel.from_pretrained(folder).eval().get_encoder()(**mel, output_hidden_states=True)
    frames: torch.Tensor = states.last_hidden_state[0] if layer is None else states.hidden_states[layer][0]
    return frames


@pytest.mark.parametrize("layer", [1, None])
def test_whisper_unpadded_is_hugging_faces_own_on_thirty_seconds(layer: int | None, folders: dict[str, Path]) -> None:
    wave = tiny.wave(480_000)
    got = encoder(folders["whisper"], layer=layer).encode([wave])[0]
    torch.testing.assert_close(got, hugging_face_whisper(folders["whisper"], wave, layer), rtol=0, atol=1e-4)


def test_whisper_padded_keeps_the_true_frames_of_hugging_faces_own(folders: dict[str, Path]) -> None:
    wave = tiny.wave(20_000)
    padded = encoder(folders["whisper"], pad_to_30s=True).encode([wave])[0]
    assert len(padded) == 63  # 125 mel frames
    wanted = hugging_face_whisper(folders["whisper"], wave)[:63]
    torch.testing.assert_close(padded, wanted, rtol=0, atol=1e-4)
    assert (encoder(folders["whisper"]).encode([wave])[0] - padded).abs().max() > 0.1


def test_whisper_padded_in_a_batch_gives_the_frames_of_each_alone(folders: dict[str, Path]) -> None:
    made = encoder(folders["whisper"], pad_to_30s=True)
    waves = [tiny.wave(9_000, 1), tiny.wave(16_000, 2)]
    for wave, frames_eh in zip(waves, made.encode(waves), strict=True):
        torch.testing.assert_close(frames_eh, made.encode([wave])[0], rtol=0, atol=1e-5)


def test_a_checkpoint_says_itself_whether_its_input_is_normalised(tmp_path: Path) -> None:
    folder = tiny.wavlm(tmp_path)
    wave = tiny.wave(8_000)
    louder = (3 * wave + 0.1).astype(np.float32)
    normalised = encoder(folder)
    torch.testing.assert_close(normalised.encode([wave])[0], normalised.encode([louder])[0], rtol=0, atol=1e-4)
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": False}), encoding="utf-8")
    plain = encoder(folder)
    assert (plain.encode([wave])[0] - plain.encode([louder])[0]).abs().max() > 0.01


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_frames_are_float32_without_gradient_in_any_precision(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # with 16, oneDNN 3.12 computes groups of fewer than 16 channels wrongly in bfloat16 where there is AMX
    monkeypatch.setitem(tiny.WAV2VEC2_SIZES, "num_conv_pos_embeddings", 10)
    folder = tiny.ENCODERS[family](tmp_path)
    made = load_encoder(EncoderConfig(name=str(folder), dtype="bfloat16"), tiny.found(folder), tiny.CPU)
    frames_eh = made.encode([tiny.wave(3_000), tiny.wave(5_000)])[0]
    assert frames_eh.dtype == torch.float32
    assert not frames_eh.requires_grad
    exact = encoder(folder).encode([tiny.wave(3_000)])[0]
    assert (frames_eh - exact).abs().mean() < 0.1


@pytest.mark.parametrize(("family", "samples"), [("wavlm", 399), ("whisper", 399), ("w2v-bert", 559)])
def test_a_sound_shorter_than_a_frame_is_refused(family: str, samples: int, folders: dict[str, Path]) -> None:
    made = encoder(folders[family])
    assert made.min_samples == samples + 1
    with pytest.raises(DataError, match=rf"lasts {samples / 16_000:.3f} s, too short for a frame; cut it or take it"):
        made.encode([tiny.wave(4_000), tiny.wave(samples)])


def test_the_utterance_with_too_short_a_sound_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    data = kaldi.load(tiny.data_folder(tmp_path, {"a": 560, "b": 559}))
    made = encoder(folders["w2v-bert"])
    assert len(read_for(made, data.utterances["a"])) == 560
    with pytest.raises(DataError, match=r"b\.wav \(utterance b\): lasts 0\.035 s, too short for a frame"):
        read_for(made, data.utterances["b"])


def test_whisper_refuses_more_than_thirty_seconds(folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"lasts 30\.1 s, the encoder reads 30 s; cut it"):
        encoder(folders["whisper"]).encode([tiny.wave(481_600)])


@pytest.mark.parametrize("family", ["wavlm", "whisper", "w2v-bert"])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_that_is_not_there_is_refused(family: str, layer: int, folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=f"has layers 1 to 2, not {layer}"):
        encoder(folders[family], layer=layer)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a llama model, no speech encoder that we know"):
        encoder(tiny.llama(tmp_path))


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("wavlm", "encoder.layers.1.attention.q_proj.weight"),
        ("whisper", "model.encoder.layers.1.self_attn.q_proj.weight"),
        ("w2v-bert", "encoder.layers.1.self_attn.linear_q.weight"),
    ],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused(family: str, lost: str, tmp_path: Path) -> None:
    weights = tiny.ENCODERS[family](tmp_path) / "model.safetensors"
    state = load_file(weights)
    del state[lost]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks the weight {lost.removeprefix('model.')}"):
        encoder(tmp_path)


@pytest.mark.parametrize("family", ["wavlm", "whisper", "w2v-bert"])
def test_a_checkpoint_without_its_input_settings_is_refused(family: str, tmp_path: Path) -> None:
    (tiny.ENCODERS[family](tmp_path) / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"has no preprocessor_config\.json"):
        encoder(tmp_path)

"""Frozen encoders: each utterance's frames are those of the utterance alone, and those of Hugging Face."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor, WhisperModel

from speechllm.config.schema import EncoderConfig
from speechllm.errors import DataError, ModelError
from speechllm.model.encoder import SpeechEncoder, load_encoder

if TYPE_CHECKING:
    from pathlib import Path

MIXED = (6_400, 400, 14_401, 10_080)  # 10,080 samples are an odd number of mel frames
WAV2VEC2_KIND = [name for name in tiny.ENCODERS if name != "whisper"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("encoders")
    return {name: make(base / name) for name, make in tiny.ENCODERS.items()}


def encoder(folder: Path, *, layer: int | None = None, pad_to_30s: bool = False) -> SpeechEncoder:
    config = EncoderConfig(name=str(folder), layer=layer, pad_to_30s=pad_to_30s)
    return load_encoder(config, tiny.found(folder), tiny.CPU)


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_a_batch_gives_each_utterance_the_frames_it_has_alone(family: str, folders: dict[str, Path]) -> None:
    made = encoder(folders[family])
    waves = [tiny.wave(count, seed) for seed, count in enumerate(MIXED)]
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
    shapes = [tuple(frames.shape) for frames in made.encode([tiny.wave(count) for count in MIXED])]
    assert shapes == [(made.num_frames(count), made.width) for count in MIXED]


@pytest.mark.parametrize("family", WAV2VEC2_KIND)
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
def test_frames_are_float32_without_gradient_in_any_precision(family: str, folders: dict[str, Path]) -> None:
    config = EncoderConfig(name=str(folders[family]), dtype="bfloat16")
    made = load_encoder(config, tiny.found(folders[family]), tiny.CPU)
    frames_eh = made.encode([tiny.wave(3_000), tiny.wave(5_000)])[0]
    assert frames_eh.dtype == torch.float32
    assert not frames_eh.requires_grad
    exact = encoder(folders[family]).encode([tiny.wave(3_000)])[0]
    assert (frames_eh - exact).abs().mean() < 0.1


@pytest.mark.parametrize("family", ["wavlm", "whisper"])
def test_a_sound_shorter_than_a_frame_is_refused(family: str, folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"lasts 0\.025 s, too short for a frame"):
        encoder(folders[family]).encode([tiny.wave(4_000), tiny.wave(399)])


def test_whisper_refuses_more_than_thirty_seconds(folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"lasts 30\.1 s, the encoder reads 30 s; cut it"):
        encoder(folders["whisper"]).encode([tiny.wave(481_600)])


@pytest.mark.parametrize("family", ["wavlm", "whisper"])
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
    ],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused(family: str, lost: str, tmp_path: Path) -> None:
    weights = tiny.ENCODERS[family](tmp_path) / "model.safetensors"
    state = load_file(weights)
    del state[lost]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks the weight {lost.removeprefix('model.')}"):
        encoder(tmp_path)


def test_a_checkpoint_without_its_input_settings_is_refused(tmp_path: Path) -> None:
    (tiny.wavlm(tmp_path) / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"has no preprocessor_config\.json"):
        encoder(tmp_path)

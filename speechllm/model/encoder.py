"""Frozen speech encoders of Hugging Face: waveforms in, frames out, each utterance as if alone.

Shapes: b batch, s samples, f feature frames, m mel bins, e encoder frames, h encoder width.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from speechllm import lengths
from speechllm.data.audio import MAX_DURATION_S, SAMPLE_RATE_HZ
from speechllm.errors import DataError, ModelError
from speechllm.runtime import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from speechllm.config.schema import EncoderConfig
    from speechllm.data.kaldi import Utterance
    from speechllm.model.hub import Resolved

    Waves = Sequence[NDArray[np.float32]]

WAV2VEC2_FAMILY = ("wavlm", "hubert", "wav2vec2", "data2vec-audio", "unispeech-sat")
FAMILIES = ("whisper", *WAV2VEC2_FAMILY)
MIN_SAMPLES = 400  # 25 ms: one frame of either family


class SpeechEncoder(Protocol):
    """What the recipe needs of an encoder."""

    width: int
    """Channels of a frame, h."""
    equal_lengths_only: bool
    """Whether utterances of other lengths in the batch would change the frames."""
    longest_s: float
    """Longest sound it reads."""

    def num_frames(self, num_samples: int) -> int:
        """Return encoder frames, e, of an utterance of `num_samples` at 16 kHz."""
        ...

    def encode(self, waves_s: Waves) -> list[Tensor]:
        """Return frames [e h] of each wave [s], on the CPU in float32."""
        ...


def load_encoder(config: EncoderConfig, found: Resolved, device: torch.device) -> SpeechEncoder:
    """Return the encoder in `found`, frozen, in the configured precision.

    Raises:
        ModelError: the folder holds another kind of model, or weights that do not fit.
    """
    content = json.loads((found.folder / "config.json").read_text(encoding="utf-8"))
    family = content.get("model_type")
    if family == "whisper":
        return WhisperFrames(config, found, device)
    if family in WAV2VEC2_FAMILY:
        return Wav2Vec2Frames(config, found, device)
    raise ModelError(
        found.folder,
        f"is a {family} model, no speech encoder that we know",
        f"use one of {', '.join(FAMILIES)}",
    )


def _freeze(model: nn.Module, config: EncoderConfig, device: torch.device) -> None:
    model.requires_grad_(requires_grad=False).eval().to(device, torch_dtype(config.dtype))


def _check_layer(config: EncoderConfig, num_layers: int) -> int:
    layer = num_layers if config.layer is None else config.layer
    if not 1 <= layer <= num_layers:
        raise ModelError(config.name, f"has layers 1 to {num_layers}, not {layer}", "change encoder.layer")
    return layer


def _check_whole(found: Resolved, missing: Sequence[str]) -> None:
    if missing:
        raise ModelError(found.folder, f"lacks the weight {min(missing)}", "download it again")


def length_fault(num_samples: int, longest_s: float) -> str | None:
    """Return what is wrong with the length of a sound at 16 kHz, or None."""
    duration_s = num_samples / SAMPLE_RATE_HZ
    if num_samples < MIN_SAMPLES:
        return f"lasts {duration_s:.3f} s, too short for a frame"
    if duration_s > longest_s:
        return f"lasts {duration_s:.1f} s, the encoder reads {longest_s:g} s"
    return None


def _check_lengths(waves_s: Waves, longest_s: float) -> None:
    for wave in waves_s:
        if fault := length_fault(len(wave), longest_s):
            raise DataError("a sound", fault, "cut it or take it out")


def read_for(encoder: SpeechEncoder, utt: Utterance) -> NDArray[np.float32]:
    """Return the samples [s] of an utterance, checked to be of a length that the encoder takes.

    Raises:
        DataError: the sound cannot be read, or is too short or too long; the utterance is named.
    """
    wave_s = utt.read()
    if fault := length_fault(len(wave_s), encoder.longest_s):
        raise DataError(f"{utt.wav} (utterance {utt.utt_id})", fault, "cut it with segments or take it out")
    return wave_s


def _pretrained(kind: Any, found: Resolved) -> tuple[Any, Sequence[str]]:
    """Return a model of a Hugging Face class and the names of weights that the folder lacks.

    Raises:
        ModelError: the folder cannot be read as such a model.
    """
    try:
        model, report = kind.from_pretrained(found.folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(found.folder, f"cannot be read as a speech encoder ({reason})", "download it again") from error
    return model, report["missing_keys"]


def padding_mask(lengths_b: Sequence[int], device: torch.device) -> Tensor:
    """Return [b, longest]: True on the true frames of each row."""
    longest = max(lengths_b)
    return torch.arange(longest, device=device) < torch.tensor(lengths_b, device=device)[:, None]


class WhisperFrames:
    """Whisper's encoder, on the true length or padded to 30 s as it was trained (Radford 2022, sec. 2.2)."""

    equal_lengths_only = False
    longest_s = lengths.WHISPER_MAX_MEL_FRAMES * lengths.WHISPER_HOP / SAMPLE_RATE_HZ

    def __init__(self, config: EncoderConfig, found: Resolved, device: torch.device) -> None:
        """Load the encoder half of the checkpoint."""
        from transformers import WhisperFeatureExtractor, WhisperModel

        model, missing = _pretrained(WhisperModel, found)
        _check_whole(found, [key for key in missing if key.startswith("encoder.")])
        self.encoder = model.get_encoder()
        self.layer = _check_layer(config, len(self.encoder.layers))
        self.features = WhisperFeatureExtractor.from_pretrained(found.folder)
        self.pad_to_30s = config.pad_to_30s
        self.width: int = self.encoder.config.d_model
        self.device, self.dtype = device, torch_dtype(config.dtype)
        _freeze(self.encoder, config, device)

    def num_frames(self, num_samples: int) -> int:
        """Return encoder frames of `num_samples`: 50 a second."""
        return lengths.whisper_encoder_frames(lengths.whisper_mel_frames(num_samples))

    def _mel(self, wave_s: NDArray[np.float32]) -> Tensor:
        """Return log-mel features [m f] of one wave, its own maximum as reference."""
        made = self.features(
            wave_s,
            sampling_rate=16_000,
            padding="max_length" if self.pad_to_30s else False,
            return_tensors="np",
        )
        return torch.from_numpy(made["input_features"][0])

    @torch.inference_mode()
    def encode(self, waves_s: Waves) -> list[Tensor]:
        """Return frames [e h] of each wave."""
        _check_lengths(waves_s, self.longest_s)
        mels_mf = [self._mel(wave) for wave in waves_s]
        frames_b = [lengths.whisper_encoder_frames(mel.shape[1]) for mel in mels_mf]
        mel_bfm = nn.utils.rnn.pad_sequence([mel.T for mel in mels_mf], batch_first=True)
        mel_bmf = mel_bfm.transpose(1, 2).to(self.device, self.dtype)
        hidden_beh = self._frames(mel_bmf, [mel.shape[1] for mel in mels_mf], frames_b)
        kept_b = [self.num_frames(len(wave)) for wave in waves_s]
        return [row[:kept].float().cpu() for row, kept in zip(hidden_beh, kept_b, strict=True)]

    def _frames(self, mel_bmf: Tensor, mels_b: list[int], frames_b: list[int]) -> Tensor:
        encoder = self.encoder
        # the second convolution must see zeros past the end, as it does for an utterance alone
        inside_bf = padding_mask(mels_b, self.device)[:, None]
        hidden_bhf = nn.functional.gelu(encoder.conv1(mel_bmf)) * inside_bf
        hidden_beh = nn.functional.gelu(encoder.conv2(hidden_bhf)).transpose(1, 2)
        hidden_beh = hidden_beh + encoder.embed_positions.weight[: hidden_beh.shape[1]]
        mask = None
        if min(frames_b) < max(frames_b):
            real_be = padding_mask(frames_b, self.device)
            mask = torch.zeros(real_be.shape, device=self.device, dtype=self.dtype)
            mask = mask.masked_fill(~real_be, torch.finfo(self.dtype).min)[:, None, None, :]
            mask = mask.expand(-1, 1, hidden_beh.shape[1], -1)
        for layer in encoder.layers[: self.layer]:
            hidden_beh = layer(hidden_beh, mask)
        last: Tensor = encoder.layer_norm(hidden_beh) if self.layer == len(encoder.layers) else hidden_beh
        return last


class Wav2Vec2Frames:
    """WavLM, HuBERT, wav2vec 2.0 and their kin: convolutions over samples, then a Transformer."""

    longest_s = MAX_DURATION_S

    def __init__(self, config: EncoderConfig, found: Resolved, device: torch.device) -> None:
        """Load the checkpoint without any head."""
        from transformers import AutoModel

        model, missing = _pretrained(AutoModel, found)
        _check_whole(found, [key for key in missing if "masked_spec_embed" not in key])
        self.model = model
        self.config = model.config
        self.layer = _check_layer(config, self.config.num_hidden_layers)
        self.width: int = self.config.hidden_size
        # a group norm over time sees the padding, and so do data2vec's stacked position convolutions;
        # the other layer-norm variants take an attention mask
        norm = self.config.to_dict().get("feat_extract_norm")  # data2vec has no such field
        self.equal_lengths_only: bool = norm == "group" or self.config.model_type == "data2vec-audio"
        self.normalize_input = _normalizes(found)
        self.device, self.dtype = device, torch_dtype(config.dtype)
        _freeze(model, config, device)

    def num_frames(self, num_samples: int) -> int:
        """Return encoder frames of `num_samples`: 499 for ten seconds."""
        return lengths.conv_frames(num_samples, self.config.conv_kernel, self.config.conv_stride)

    @torch.inference_mode()
    def encode(self, waves_s: Waves) -> list[Tensor]:
        """Return frames [e h] of each wave; one by one where the batch would change them."""
        _check_lengths(waves_s, self.longest_s)
        if self.equal_lengths_only and len({len(wave) for wave in waves_s}) > 1:
            return [self.encode([wave])[0] for wave in waves_s]
        tensors = [self._normalized(torch.from_numpy(wave)) for wave in waves_s]
        wave_bs = nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(self.device, self.dtype)
        mask_bs = None
        if not self.equal_lengths_only:
            mask_bs = padding_mask([len(wave) for wave in waves_s], self.device).long()
        last = self.layer == self.config.num_hidden_layers
        with warnings.catch_warnings():
            # transformers' WavLM hands torch a boolean and a float mask together; torch converts one and warns
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask", category=UserWarning)
            output = self.model(wave_bs, attention_mask=mask_bs, output_hidden_states=not last)
        hidden_beh = output.last_hidden_state if last else output.hidden_states[self.layer]
        kept_b = [self.num_frames(len(wave)) for wave in waves_s]
        return [row[:kept].float().cpu() for row, kept in zip(hidden_beh, kept_b, strict=True)]

    def _normalized(self, wave_s: Tensor) -> Tensor:
        if not self.normalize_input:
            return wave_s
        return (wave_s - wave_s.mean()) / torch.sqrt(wave_s.var(correction=0) + 1e-7)


def _normalizes(found: Resolved) -> bool:
    """Return the checkpoint's own choice of zero mean and unit variance input."""
    path = found.folder / "preprocessor_config.json"
    if not path.is_file():
        raise ModelError(found.folder, "has no preprocessor_config.json", "download the whole model")
    return bool(json.loads(path.read_text(encoding="utf-8")).get("do_normalize", True))

"""Speech encoders of Hugging Face: waveforms in, frames out, each utterance as if alone.

Shapes: b batch, s samples, e encoder frames, h encoder width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from speechllm.data.audio import MAX_DURATION_S, SAMPLE_RATE_HZ
from speechllm.errors import DataError, ModelError
from speechllm.model.hub import UNREADABLE, reason_of
from speechllm.runtime import read_json, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from speechllm.config.schema import EncoderConfig
    from speechllm.data.kaldi import Utterance
    from speechllm.model.hub import Resolved

    Waves = Sequence[NDArray[np.float32]]

WHISPER, W2V_BERT = "whisper", "wav2vec2-bert"
WAV2VEC2_FAMILY = ("wavlm", "hubert", "wav2vec2", "data2vec-audio", "unispeech-sat")
FAMILIES = (WHISPER, *WAV2VEC2_FAMILY, W2V_BERT)
MIN_SAMPLES = 400  # 25 ms: one window of every family
SETTINGS_FILE = "preprocessor_config.json"


class SpeechEncoder(Protocol):
    """What the recipe needs of an encoder."""

    module: nn.Module
    """What holds the parameters that the frames depend on, and no others."""
    width: int
    """Channels of a frame, h."""
    equal_lengths_only: bool
    """Whether utterances of other lengths in the batch would change the frames."""
    min_samples: int
    """Shortest sound that has a frame, at 16 kHz."""
    longest_s: float
    """Longest sound it reads."""

    def num_frames(self, num_samples: int) -> int:
        """Return encoder frames, e, of an utterance of `num_samples` at 16 kHz."""
        ...

    def frames(self, waves_s: Waves) -> list[Tensor]:
        """Return frames [e h] of each wave [s], on the encoder's device and in its precision, gradients and all."""
        ...

    def encode(self, waves_s: Waves) -> list[Tensor]:
        """Return `frames` without gradients, on the CPU in float32."""
        ...


class Frames(ABC):
    """What the families share: lengths are checked, and no utterance's frames depend on its neighbours."""

    module: nn.Module
    width: int
    equal_lengths_only = False
    min_samples = MIN_SAMPLES
    longest_s = MAX_DURATION_S

    @abstractmethod
    def num_frames(self, num_samples: int) -> int:
        """Return encoder frames of `num_samples`."""

    @abstractmethod
    def _hidden(self, waves_s: Waves) -> Tensor:
        """Return frames [b e h] of one batch; what stands behind a row's own frames is of no use."""

    def frames(self, waves_s: Waves) -> list[Tensor]:
        """Return frames [e h] of each wave; one by one where the batch would change them.

        Raises:
            DataError: a sound is too short or too long.
        """
        for wave in waves_s:
            if fault := length_fault(len(wave), self.longest_s, self.min_samples):
                raise DataError("a sound", fault, "cut it or take it out")
        if self.equal_lengths_only and len({len(wave) for wave in waves_s}) > 1:
            return [self.frames([wave])[0] for wave in waves_s]
        hidden_beh = self._hidden(waves_s)
        return [row[: self.num_frames(len(wave))] for row, wave in zip(hidden_beh, waves_s, strict=True)]

    @torch.inference_mode()
    def encode(self, waves_s: Waves) -> list[Tensor]:
        """Return `frames` without gradients, on the CPU in float32."""
        return [frames_eh.float().cpu() for frames_eh in self.frames(waves_s)]

    def _placed(self, tensor: Tensor) -> Tensor:
        """Return `tensor` where the weights are, and in their precision."""
        return tensor.to(next(self.module.parameters()))


def load_encoder(config: EncoderConfig, found: Resolved, device: torch.device) -> SpeechEncoder:
    """Return the encoder in `found`, frozen, in the configured precision.

    Raises:
        ModelError: the folder holds another kind of model, or weights that do not fit.
    """
    family = read_json(found.folder / "config.json").get("model_type")
    if family not in FAMILIES:
        what = f"is a {family} model, no speech encoder that we know"
        raise ModelError(found.folder, what, f"use one of {', '.join(FAMILIES)}")
    encoder: SpeechEncoder
    if family == WHISPER:
        from speechllm.model.encoder_whisper import WhisperFrames

        encoder = WhisperFrames(config, found)
    elif family == W2V_BERT:
        from speechllm.model.encoder_w2v_bert import W2vBertFrames

        encoder = W2vBertFrames(config, found)
    else:
        from speechllm.model.encoder_wav2vec2 import Wav2Vec2Frames

        encoder = Wav2Vec2Frames(config, found)
    encoder.module.requires_grad_(requires_grad=False).eval().to(device, torch_dtype(config.dtype))
    return encoder


def pretrained(kind: Any, found: Resolved, part: str = "") -> Any:
    """Return a model of a Hugging Face class, all of whose weights below `part` came from the folder.

    Raises:
        ModelError: the folder cannot be read as such a model, or lacks a weight.
    """
    try:
        model, report = kind.from_pretrained(found.folder, dtype=torch.float32, output_loading_info=True)
    except UNREADABLE as error:
        raise ModelError(
            found.folder, f"cannot be read as a speech encoder ({reason_of(error)})", "download it again"
        ) from error
    missing = [key for key in report["missing_keys"] if key.startswith(part) and "masked_spec_embed" not in key]
    if missing:
        raise ModelError(found.folder, f"lacks the weight {min(missing)}", "download it again")
    return model


def input_settings(found: Resolved) -> dict[str, object]:
    """Return what the checkpoint says of its input.

    Raises:
        ModelError: it says nothing.
    """
    path = found.folder / SETTINGS_FILE
    if not path.is_file():
        raise ModelError(found.folder, f"has no {SETTINGS_FILE}", "download the whole model")
    return read_json(path)


def cut_layers(config: EncoderConfig, blocks: Any) -> None:
    """Leave the layers up to the configured one in `blocks`, and the norm behind the last only where that is left.

    Raises:
        ModelError: there is no such layer.
    """
    count = len(blocks.layers)
    layer = count if config.layer is None else config.layer
    if not 1 <= layer <= count:
        raise ModelError(config.name, f"has layers 1 to {count}, not {layer}", "change encoder.layer")
    blocks.layers = blocks.layers[:layer]
    shape = blocks.config.to_dict()
    if layer < count and (shape["model_type"] == WHISPER or shape.get("do_stable_layer_norm")):
        blocks.layer_norm = nn.Identity()


def without_pretraining(model: Any) -> None:
    """Take out what belongs to pretraining or to a head, so that every parameter left is used in every step.

    Masked stretches are drawn outside of our seeds, a dropped layer has no gradient, and an adapter on top shortens
    the frames.
    """
    model.config.apply_spec_augment = False
    model.config.layerdrop = 0.0
    model.adapter = None
    if hasattr(model, "masked_spec_embed"):
        del model.masked_spec_embed


def length_fault(num_samples: int, longest_s: float, min_samples: int = MIN_SAMPLES) -> str | None:
    """Return what is wrong with the length of a sound at 16 kHz, or None."""
    duration_s = num_samples / SAMPLE_RATE_HZ
    if num_samples < min_samples:
        return f"lasts {duration_s:.3f} s, too short for a frame"
    if duration_s > longest_s:
        return f"lasts {duration_s:.1f} s, the encoder reads {longest_s:g} s"
    return None


def read_for(encoder: SpeechEncoder, utt: Utterance) -> NDArray[np.float32]:
    """Return the samples [s] of an utterance, checked to be of a length that the encoder takes.

    Raises:
        DataError: the sound cannot be read, or is too short or too long; the utterance is named.
    """
    wave_s = utt.read()
    if fault := length_fault(len(wave_s), encoder.longest_s, encoder.min_samples):
        raise DataError(f"{utt.wav} (utterance {utt.utt_id})", fault, "cut it with segments or take it out")
    return wave_s


def padding_mask(lengths_b: Sequence[int], device: torch.device) -> Tensor:
    """Return [b, longest]: True on the true frames of each row."""
    longest = max(lengths_b)
    return torch.arange(longest, device=device) < torch.tensor(lengths_b, device=device)[:, None]

"""Whisper's encoder (Radford 2022), on the true length or padded to 30 s as it was trained.

Shapes: b batch, f feature frames, m mel bins, e encoder frames, h encoder width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from speechllm import lengths
from speechllm.data.audio import SAMPLE_RATE_HZ
from speechllm.model.encoder import Frames, cut_layers, input_settings, padding_mask, pretrained

if TYPE_CHECKING:
    from speechllm.config.schema import EncoderConfig
    from speechllm.model.encoder import Waves
    from speechllm.model.hub import Resolved


class WhisperFrames(Frames):
    """The encoder half of a checkpoint."""

    longest_s = lengths.WHISPER_MAX_MEL_FRAMES * lengths.WHISPER_HOP / SAMPLE_RATE_HZ

    def __init__(self, config: EncoderConfig, found: Resolved) -> None:
        """Load it; the decoder is dropped."""
        from transformers import WhisperFeatureExtractor, WhisperModel

        input_settings(found)
        self.features = WhisperFeatureExtractor.from_pretrained(found.folder)
        encoder = pretrained(WhisperModel, found, part="encoder.").get_encoder()
        cut_layers(config, encoder)
        self.module, self.width = encoder, encoder.config.d_model
        self.pad_to_30s = config.pad_to_30s

    def num_frames(self, num_samples: int) -> int:
        """Return encoder frames of `num_samples`: 50 a second."""
        return lengths.whisper_encoder_frames(lengths.whisper_mel_frames(num_samples))

    def _mels(self, waves_s: Waves) -> list[Tensor]:
        """Return log-mel features [f m] of each wave, its own maximum as reference."""
        padding = "max_length" if self.pad_to_30s else False
        made = [
            self.features(wave, sampling_rate=SAMPLE_RATE_HZ, padding=padding, return_tensors="np") for wave in waves_s
        ]
        return [torch.from_numpy(one["input_features"][0]).T for one in made]

    def _hidden(self, waves_s: Waves) -> Tensor:
        encoder: Any = self.module
        mels_fm = self._mels(waves_s)
        mel_bmf = self._placed(nn.utils.rnn.pad_sequence(mels_fm, batch_first=True).transpose(1, 2))
        mels_b = [len(mel) for mel in mels_fm]
        # the second convolution must see zeros past the end, as it does for an utterance alone
        inside_bf = padding_mask(mels_b, mel_bmf.device)[:, None]
        hidden_bhf = nn.functional.gelu(encoder.conv1(mel_bmf)) * inside_bf
        hidden_beh = nn.functional.gelu(encoder.conv2(hidden_bhf)).transpose(1, 2)
        hidden_beh = hidden_beh + encoder.embed_positions.weight[: hidden_beh.shape[1]]
        mask = _attention_mask([lengths.whisper_encoder_frames(count) for count in mels_b], hidden_beh)
        for layer in encoder.layers:
            hidden_beh = layer(hidden_beh, mask)
        normed_beh: Tensor = encoder.layer_norm(hidden_beh)
        return normed_beh


def _attention_mask(frames_b: list[int], hidden_beh: Tensor) -> Tensor | None:
    """Return what is added to the scores [b 1 e e], so that no frame attends to padding; None where there is none."""
    if min(frames_b) == max(frames_b):
        return None
    hidden_be = ~padding_mask(frames_b, hidden_beh.device)
    mask_be = torch.zeros(hidden_be.shape, device=hidden_beh.device, dtype=hidden_beh.dtype)
    mask_be = mask_be.masked_fill(hidden_be, torch.finfo(hidden_beh.dtype).min)
    return mask_be[:, None, None, :].expand(-1, 1, hidden_beh.shape[1], -1)

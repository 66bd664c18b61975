"""Whisper's encoder (Radford 2022), on the true length or padded to 30 s as it was trained.

Shapes: b batch, s samples, k frequencies, f feature frames, m mel bins, e encoder frames, h encoder width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from speechllm import lengths
from speechllm.data.audio import SAMPLE_RATE_HZ
from speechllm.model.encoder import Frames, cut_layers, input_settings, padding_mask, pretrained

if TYPE_CHECKING:
    from speechllm.config.schema import EncoderConfig
    from speechllm.model.encoder import Waves
    from speechllm.model.hub import Resolved

QUIETEST = 1e-10  # power of a mel bin below which it counts as this
DYNAMIC_RANGE = 8.0  # in powers of ten: 80 dB


class WhisperFrames(Frames):
    """The encoder half of a checkpoint."""

    longest_s = lengths.WHISPER_MAX_MEL_FRAMES * lengths.WHISPER_HOP / SAMPLE_RATE_HZ

    def __init__(self, config: EncoderConfig, found: Resolved) -> None:
        """Load it; the decoder is dropped."""
        from transformers import WhisperFeatureExtractor, WhisperModel

        input_settings(found)
        features = WhisperFeatureExtractor.from_pretrained(found.folder)
        self.longest_samples: int = features.n_samples
        self.window = torch.hann_window(features.n_fft)
        self.filters_mk = torch.from_numpy(features.mel_filters.T).float().contiguous()
        encoder = pretrained(WhisperModel, found, part="encoder.").get_encoder()
        cut_layers(config, encoder)
        self.module, self.width = encoder, encoder.config.d_model
        self.pad_to_30s = config.pad_to_30s

    def num_frames(self, num_samples: int) -> int:
        """Return encoder frames of `num_samples`: 50 a second."""
        return lengths.whisper_encoder_frames(lengths.whisper_mel_frames(num_samples))

    def _mels(self, waves_s: Waves) -> tuple[Tensor, list[int]]:
        """Return log-mel features [b m f], zeros behind each row's end, and the true frames of each row."""
        if self.pad_to_30s:
            waves_s = [np.pad(wave, (0, self.longest_samples - len(wave))) for wave in waves_s]
        device = next(self.module.parameters()).device
        self.window, self.filters_mk = self.window.to(device), self.filters_mk.to(device)
        return log_mels(waves_s, self.window, self.filters_mk)

    def _hidden(self, waves_s: Waves) -> Tensor:
        encoder: Any = self.module
        mel_bmf, mels_b = self._mels(waves_s)
        mel_bmf = self._placed(mel_bmf)
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


def log_mels(waves_s: Waves, window: Tensor, filters_mk: Tensor) -> tuple[Tensor, list[int]]:
    """Return log-mel features [b m f] as Whisper reads them, zeros behind each row's end, and each row's frames.

    Each wave is mirrored at its own ends, and what lies 80 dB below its own loudest bin is raised to that, so that its
    features do not depend on its neighbours (Radford 2022, sec. 2.2, and the code published with it).
    """
    edge = len(window) // 2
    mirrored_s = [torch.from_numpy(np.pad(wave, edge, mode="reflect")) for wave in waves_s]
    wave_bs = nn.utils.rnn.pad_sequence(mirrored_s, batch_first=True)
    if window.is_cuda:
        wave_bs = wave_bs.pin_memory()
    wave_bs = wave_bs.to(window.device, non_blocking=True)
    frames_b = [lengths.whisper_mel_frames(len(wave)) for wave in waves_s]
    spectrum_bkf = torch.stft(
        wave_bs, len(window), lengths.WHISPER_HOP, window=window, center=False, return_complex=True
    )[..., : max(frames_b)]
    power_bkf = spectrum_bkf.real.square() + spectrum_bkf.imag.square()
    log_bmf = (filters_mk @ power_bkf).clamp(min=QUIETEST).log10()
    inside_b1f = padding_mask(frames_b, window.device)[:, None]
    loudest_b11 = log_bmf.masked_fill(~inside_b1f, -torch.inf).amax(dim=(1, 2), keepdim=True)
    log_bmf = torch.maximum(log_bmf, loudest_b11 - DYNAMIC_RANGE)
    return ((log_bmf + 4) / 4).masked_fill(~inside_b1f, 0), frames_b


def _attention_mask(frames_b: list[int], hidden_beh: Tensor) -> Tensor | None:
    """Return what is added to the scores [b 1 e e], so that no frame attends to padding; None where there is none."""
    if min(frames_b) == max(frames_b):
        return None
    hidden_be = ~padding_mask(frames_b, hidden_beh.device)
    mask_be = torch.zeros(hidden_be.shape, device=hidden_beh.device, dtype=hidden_beh.dtype)
    mask_be = mask_be.masked_fill(hidden_be, torch.finfo(hidden_beh.dtype).min)
    return mask_be[:, None, None, :].expand(-1, 1, hidden_beh.shape[1], -1)

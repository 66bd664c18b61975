"""WavLM, HuBERT, wav2vec 2.0 and their kin: convolutions over samples, then a Transformer (Baevski 2020).

Shapes: b batch, s samples, e encoder frames, h encoder width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from speechllm import lengths
from speechllm.model.encoder import (
    Frames,
    cut_layers,
    input_settings,
    padding_mask,
    pretrained,
    without_pretraining,
)
from speechllm.model.wavlm_attention import replace_attention

if TYPE_CHECKING:
    from speechllm.config.schema import EncoderConfig
    from speechllm.model.encoder import Waves
    from speechllm.model.hub import Resolved


class Wav2Vec2Frames(Frames):
    """A checkpoint of one of these models, without any head."""

    def __init__(self, config: EncoderConfig, found: Resolved) -> None:
        """Load it, and find out what its norms do with padding."""
        from transformers import AutoModel

        self.normalize_input = bool(input_settings(found).get("do_normalize", True))
        model = pretrained(AutoModel, found)
        without_pretraining(model)
        sizes = model.config.to_dict()  # data2vec's lacks two of the fields
        cut_layers(config, model.encoder)
        if sizes["model_type"] == "wavlm":
            replace_attention(model.encoder)
        self.module, self.width = model, sizes["hidden_size"]
        self.kernels, self.strides = sizes["conv_kernel"], sizes["conv_stride"]
        self.min_samples = lengths.shortest_input(self.kernels, self.strides)
        # a group norm over time sees the padding, and so do data2vec's stacked position convolutions;
        # the other layer-norm variants take an attention mask
        self.equal_lengths_only = sizes.get("feat_extract_norm") == "group" or sizes["model_type"] == "data2vec-audio"

    def num_frames(self, num_samples: int) -> int:
        """Return encoder frames of `num_samples`: 499 for ten seconds."""
        return lengths.conv_frames(num_samples, self.kernels, self.strides)

    def _hidden(self, waves_s: Waves) -> Tensor:
        tensors = [self._normalized(torch.from_numpy(wave)) for wave in waves_s]
        wave_bs = self._placed(nn.utils.rnn.pad_sequence(tensors, batch_first=True))
        mask_bs = None
        if not self.equal_lengths_only:
            mask_bs = padding_mask([len(wave) for wave in waves_s], wave_bs.device).long()
        hidden_beh: Tensor = self.module(wave_bs, attention_mask=mask_bs).last_hidden_state
        return hidden_beh

    def _normalized(self, wave_s: Tensor) -> Tensor:
        """Return zero mean and unit variance where the checkpoint was trained so; padding comes later."""
        if not self.normalize_input:
            return wave_s
        return (wave_s - wave_s.mean()) / torch.sqrt(wave_s.var(correction=0) + 1e-7)

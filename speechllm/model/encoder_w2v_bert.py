"""w2v-BERT 2.0: stacked mel frames, then Conformer blocks (Barrault 2023, "Seamless").

Padding cannot reach a true frame: features are normalised before they are padded, a block's convolution looks back
only, positions are relative, and attention takes a mask.

Shapes: b batch, s samples, e encoder frames, m mel bins times stacked frames, h encoder width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from speechllm import lengths
from speechllm.data.audio import SAMPLE_RATE_HZ
from speechllm.errors import ModelError
from speechllm.model.encoder import (
    Frames,
    cut_layers,
    input_settings,
    padding_mask,
    pretrained,
    without_pretraining,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from speechllm.config.schema import EncoderConfig
    from speechllm.model.encoder import Waves
    from speechllm.model.hub import Resolved

POSITIONS = "relative_key"  # as published; the other kinds keep tables from call to call, gradients or not


class W2vBertFrames(Frames):
    """A checkpoint without any head or adapter."""

    def __init__(self, config: EncoderConfig, found: Resolved) -> None:
        """Load it.

        Raises:
            ModelError: its positions are of another kind than the published ones, or its input does not fit.
        """
        from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertModel

        input_settings(found)
        self.features = SeamlessM4TFeatureExtractor.from_pretrained(found.folder)
        model = pretrained(Wav2Vec2BertModel, found)
        without_pretraining(model)
        model.intermediate_ffn = None  # a part of the adapter
        cut_layers(config, model.encoder)
        self.module, self.width = model, model.config.hidden_size
        self.stack: int = self.features.stride
        _check_input(found, self.features.num_mel_bins * self.stack, model.config)
        self.min_samples = lengths.shortest_input((lengths.FBANK_WINDOW, self.stack), (lengths.FBANK_HOP, self.stack))

    def num_frames(self, num_samples: int) -> int:
        """Return encoder frames of `num_samples`: 499 for ten seconds."""
        return lengths.stacked_frames(lengths.fbank_frames(num_samples), self.stack)

    def _features(self, wave_s: NDArray[np.float32]) -> Tensor:
        """Return stacked log-mel features [e m], each bin with zero mean and unit variance over the utterance."""
        made = self.features(wave_s, sampling_rate=SAMPLE_RATE_HZ, padding=False, return_tensors="np")
        return torch.from_numpy(made["input_features"][0])

    def _hidden(self, waves_s: Waves) -> Tensor:
        rows_em = [self._features(wave) for wave in waves_s]
        stacked_bem = self._placed(nn.utils.rnn.pad_sequence(rows_em, batch_first=True))
        mask_be = padding_mask([len(row) for row in rows_em], stacked_bem.device).long()
        hidden_beh: Tensor = self.module(stacked_bem, attention_mask=mask_be).last_hidden_state
        return hidden_beh


def _check_input(found: Resolved, made: int, sizes: Any) -> None:
    """Check that `made` channels a frame are what the model reads, and that its positions are the published kind."""
    if made != sizes.feature_projection_input_dim:
        what = f"makes {made} channels a frame, but reads {sizes.feature_projection_input_dim}"
        raise ModelError(found.folder, what, "download the whole model")
    if sizes.position_embeddings_type != POSITIONS:
        what = f"has positions of the kind {sizes.position_embeddings_type}, not {POSITIONS}"
        raise ModelError(found.folder, what, "use a model made from facebook/w2v-bert-2.0")

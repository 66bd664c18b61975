"""The only length arithmetic: samples to feature frames to encoder frames to projected tokens.

>>> whisper_mel_frames(16_000), whisper_encoder_frames(100)
(100, 50)
>>> conv_frames(160_000, WAV2VEC2_KERNELS, WAV2VEC2_STRIDES)
499
>>> fbank_frames(160_000), stacked_frames(998, 2)
(998, 499)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WHISPER_HOP = 160  # samples between two mel frames: 10 ms (Radford 2022, sec. 2.2)
WHISPER_MAX_MEL_FRAMES = 3000
WAV2VEC2_KERNELS = (10, 3, 3, 3, 3, 2, 2)  # Baevski 2020, sec. 4.2
WAV2VEC2_STRIDES = (5, 2, 2, 2, 2, 2, 2)
FBANK_WINDOW = 400  # samples of a mel frame of w2v-BERT 2.0: 25 ms, none of them past an edge
FBANK_HOP = 160


def whisper_mel_frames(num_samples: int) -> int:
    """Return mel frames of `num_samples` at 16 kHz: the last, centred past the end, is dropped."""
    return num_samples // WHISPER_HOP


def whisper_encoder_frames(num_frames: int) -> int:
    """Return frames after Whisper's two convolutions, the second with stride 2."""
    return (num_frames + 1) // 2


def conv_frames(num_samples: int, kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Return what unpadded convolutions leave of `num_samples`; 0 where the input is too short."""
    length = num_samples
    for kernel, stride in zip(kernels, strides, strict=True):
        length = max(0, (length - kernel) // stride + 1)
    return length


def fbank_frames(num_samples: int) -> int:
    """Return mel frames whose window lies within `num_samples` at 16 kHz, as Kaldi counts them."""
    return conv_frames(num_samples, (FBANK_WINDOW,), (FBANK_HOP,))


def stacked_frames(num_frames: int, stack: int) -> int:
    """Return frames of `stack` mel frames each; a last group that is not whole is dropped."""
    return num_frames // stack


def shortest_input(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Return the shortest length that unpadded convolutions leave anything of."""
    length = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        length = (length - 1) * stride + kernel
    return length


def strided_tokens(num_frames: int, stride: int) -> int:
    """Return projected tokens of a projector that joins `stride` frames; a short last group is padded."""
    return -(-num_frames // stride)

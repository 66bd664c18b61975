"""Where there is speech: Silero's detector of voice activity, block by block, and the spans that follow from it.

Shapes: s samples at 16 kHz, n frames of 32 ms. The detector is a small convolutional and recurrent network
(https://github.com/snakers4/silero-vad, MIT). Its package carries the weights as safetensors; only those are read,
because importing the package itself sets the number of torch's threads for the whole process.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from speechllm.data.audio import SAMPLE_RATE_HZ
from speechllm.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRAME_SAMPLES = 512
CONTEXT_SAMPLES = 64  # of the frame before, which the network sees too
BLOCK_FRAMES = 128  # frames that go through the network at once, with one gain
PEAK = 0.7  # what each block is brought to: a high voice at -30 dB is missed else
MAX_GAIN = 100.0  # so that the rounding noise of silence stays silence
FRAME_S = FRAME_SAMPLES / SAMPLE_RATE_HZ
HIDDEN = 128
BINS = 129
RMS_FLOOR = 1e-5
PLACE_FRAMES = 5


@dataclass(frozen=True)
class VadSettings:
    """When a frame is speech, and when a span begins and ends."""

    # Silero's own defaults, kept: the 50 sounds without speech of tools/bench/no_speech.py and the utterances of
    # mini_eval are far from them on both sides (docs/transcribe.md has the counts).
    on: float = 0.5
    """A span begins with a frame of this probability."""
    off: float = 0.35
    """Below this a frame is a pause."""
    # pauses inside a sentence (a comma, a doubled consonant) mostly stay below this
    pause_s: float = 0.4
    """A pause of this length ends a span."""
    least_s: float = 0.1
    """Spans with less speech are dropped: clicks."""
    pad_s: float = 0.2
    """Added at both ends; at most half of `pause_s`, so that spans never meet."""
    longest_s: float = 30.0
    """A longer span is cut at its quietest place."""


DEFAULTS = VadSettings()


@dataclass(frozen=True)
class Span:
    """A stretch of speech, in seconds from the beginning."""

    start_s: float
    end_s: float
    probability: float
    """Mean probability of speech of its frames, without the padding."""


@dataclass(frozen=True)
class Activity:
    """What the detector says of a whole sound."""

    spans: tuple[Span, ...]
    probability: float
    """Mean probability of speech over all frames; 0 for an empty sound."""

    @property
    def speech_s(self) -> float:
        """Return the seconds of speech, padding included."""
        return sum(span.end_s - span.start_s for span in self.spans)


class _Network(nn.Module):
    """Silero VAD 6 at 16 kHz; the layer names are those of its weight file."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 2 * BINS, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(BINS, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, HIDDEN, 3, padding=1)
        self.lstm_cell = nn.LSTM(HIDDEN, HIDDEN)
        self.final_conv = nn.Conv1d(HIDDEN, 1, 1)

    def forward(self, frames_ns: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return probabilities [n] of consecutive frames, context included, and the state after them."""
        parts = self.stft_conv(functional.pad(frames_ns, (0, CONTEXT_SAMPLES), "reflect")[:, None])
        hidden = (parts[:, :BINS] ** 2 + parts[:, BINS:] ** 2).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            hidden = layer(hidden).relu()
        memory, state = self.lstm_cell(hidden.squeeze(-1), state)
        return self.final_conv(memory.relu()[..., None]).flatten().sigmoid(), state


@functools.cache
def _network() -> _Network:
    """Return the network with the weights of the installed package.

    Raises:
        ModelError: the package is missing, or its weights are of another network.
    """
    fix = "pip install 'silero-vad>=6.2,<7'"
    spec = importlib.util.find_spec("silero_vad")  # finds it without running it
    if spec is None or spec.origin is None:
        raise ModelError("silero-vad", "is not installed", fix)
    path = Path(spec.origin).parent / "data" / "silero_vad_16k.safetensors"
    network = _Network()
    try:
        weights = load_file(path)
        recurrent = ("lstm_cell.weight_ih", "lstm_cell.weight_hh", "lstm_cell.bias_ih", "lstm_cell.bias_hh")
        weights |= {f"{name}_l0": weights.pop(name) for name in recurrent}  # a cell's names, without the layer
        network.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ModelError(path, f"does not hold the weights of Silero VAD 6 ({error})", fix) from error
    return network.eval().requires_grad_(requires_grad=False)


class Probabilities:
    """Speech probability of each 32 ms, from samples that come in blocks of any length."""

    def __init__(self) -> None:
        """Begin a recording."""
        self._network = _network()
        self._state = (torch.zeros(1, HIDDEN), torch.zeros(1, HIDDEN))
        self._context = np.zeros(CONTEXT_SAMPLES, np.float32)
        self._waiting = np.zeros(0, np.float32)

    def feed(self, block_s: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return probability [n] and root mean square [n] of the frames that go on through the network.

        They do so 128 at a time (4.1 s), so that what comes out does not depend on how the samples came in.
        """
        waiting = np.concatenate([self._waiting, block_s])
        size = BLOCK_FRAMES * FRAME_SAMPLES
        whole, self._waiting = np.split(waiting, [len(waiting) // size * size])
        groups = [self._run(group) for group in whole.reshape(-1, size)]
        return np.concatenate([np.zeros(0, np.float32), *groups]), _rms(whole)

    def finish(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the same of what is left, its last frame filled up with silence."""
        rest = np.pad(self._waiting, (0, -len(self._waiting) % FRAME_SAMPLES))
        return (self._run(rest) if len(rest) else rest), _rms(rest)

    def _run(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        peak = float(np.abs(samples).max())
        frames = (samples * min(MAX_GAIN, PEAK / max(peak, PEAK / MAX_GAIN))).reshape(-1, FRAME_SAMPLES)
        contexts = np.concatenate([self._context[None], frames[:-1, -CONTEXT_SAMPLES:]])
        self._context = frames[-1, -CONTEXT_SAMPLES:].copy()
        with torch.inference_mode():
            found, self._state = self._network(torch.from_numpy(np.hstack([contexts, frames])), self._state)
        probabilities: NDArray[np.float32] = found.numpy()
        return probabilities


def _rms(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    level: NDArray[np.float32] = np.sqrt((samples.reshape(-1, FRAME_SAMPLES) ** 2).mean(axis=1))
    return level


class SpanStream:
    """Spans of speech of a recording that comes in blocks; what it keeps is bounded by the longest span."""

    def __init__(self, settings: VadSettings = DEFAULTS) -> None:
        """Begin a recording."""
        assert 2 * settings.pad_s <= settings.pause_s < settings.longest_s
        self._settings = settings
        self._detector = Probabilities()
        self._frame = 0  # number of the frame that comes next
        self._samples = 0
        self._sum = 0.0
        self._first: int | None = None  # first frame of the open span
        self._is_cut = False  # it begins where the span before was cut
        self._frames: list[tuple[float, float]] = []  # probability and loudness of its frames
        self._pause = 0  # frames since its last speech

    @property
    def probability(self) -> float:
        """Return the mean probability of speech so far."""
        return self._sum / self._frame if self._frame else 0.0

    @property
    def settled_s(self) -> float:
        """Return the time before which no span that is still to come can begin."""
        begin = self._frame if self._first is None else self._first
        return max(0.0, begin * FRAME_S - (0.0 if self._is_cut else self._settings.pad_s))

    @property
    def is_open(self) -> bool:
        """Return whether a span has begun and not ended."""
        return self._first is not None

    def feed(self, block_s: NDArray[np.float32]) -> list[Span]:
        """Return the spans that end within the block [s]."""
        self._samples += len(block_s)
        return self._advance(*self._detector.feed(block_s))

    def finish(self) -> list[Span]:
        """Return the spans that end with the recording."""
        spans = self._advance(*self._detector.finish())
        return spans + self._close(len(self._frames) - self._pause) if self.is_open else spans

    def _advance(self, probabilities: NDArray[np.float32], loudness: NDArray[np.float32]) -> list[Span]:
        spans: list[Span] = []
        for probability, rms in zip(probabilities.tolist(), loudness.tolist(), strict=True):
            self._sum += probability
            if not self.is_open and probability >= self._settings.on:
                self._first, self._is_cut = self._frame, False
            self._frame += 1
            if self.is_open:
                spans += self._add(probability, rms)
        return spans

    def _add(self, probability: float, rms: float) -> list[Span]:
        """Put a frame to the open span; return the span if it ends with it, or the first part if it is too long."""
        self._frames.append((probability, rms))
        self._pause = self._pause + 1 if probability < self._settings.off else 0
        if self._pause * FRAME_S >= self._settings.pause_s:
            return self._close(len(self._frames) - self._pause)
        if len(self._frames) * FRAME_S > self._settings.longest_s - 2 * self._settings.pad_s - FRAME_S:
            return self._cut()
        return []

    def _close(self, count: int) -> list[Span]:
        """End the open span after `count` frames."""
        span = self._span(count, pad_end=True)
        self._first, self._frames, self._pause = None, [], 0
        return [span] if count * FRAME_S >= self._settings.least_s else []

    def _cut(self) -> list[Span]:
        """Cut the open span at its quietest place; the next begins on the sample where this one ends."""
        count = quietest(np.array([rms for _, rms in self._frames], np.float32))
        span = self._span(count, pad_end=False)
        assert self._first is not None
        self._first, self._is_cut, self._frames = self._first + count, True, self._frames[count:]
        return [span]

    def _span(self, count: int, *, pad_end: bool) -> Span:
        assert self._first is not None
        start_s = self._first * FRAME_S - (0.0 if self._is_cut else self._settings.pad_s)
        end_s = (self._first + count) * FRAME_S + (self._settings.pad_s if pad_end else 0.0)
        speech = [probability for probability, _ in self._frames[:count]]
        ends_by = self._samples / SAMPLE_RATE_HZ
        return Span(max(0.0, start_s), min(end_s, ends_by), sum(speech) / max(1, len(speech)))


def quietest(rms_n: NDArray[np.float32]) -> int:
    """Return the number of frames before the quietest place of the second half.

    A place is 0.16 s long and counts by their mean level in decibels: a stop inside a word is shorter.
    """
    level = 20 * np.log10(np.maximum(rms_n, RMS_FLOOR))
    smooth = np.convolve(level, np.full(PLACE_FRAMES, 1 / PLACE_FRAMES), mode="same")
    begin, end = len(level) // 2, len(level) - PLACE_FRAMES  # the end would do for quiet: nothing is known after it
    return begin + int(np.argmin(smooth[begin:end]))


def detect(wave_s: NDArray[np.float32], settings: VadSettings = DEFAULTS) -> Activity:
    """Return the spans of speech of a whole sound at 16 kHz, and its mean probability of speech."""
    stream = SpanStream(settings)
    spans = stream.feed(wave_s) + stream.finish()
    return Activity(tuple(spans), stream.probability)


def speech_spans(wave_s: NDArray[np.float32]) -> list[tuple[float, float]]:
    """Return beginning and end in seconds of each span of speech of a sound at 16 kHz."""
    return [(span.start_s, span.end_s) for span in detect(wave_s).spans]

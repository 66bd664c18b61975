"""When each word was said, and whether it was heard at all: the text against the kana of a CTC head.

The alignment is Viterbi's best path through the symbols of the text with blanks between them (Graves 2006, sec. 3). A
head hears kana, so a text is first read out; a word that the head's own best path contradicts is doubtful.

Shapes: b batch, e encoder frames, h encoder width, q head frames, k symbols (0 is the blank), s states of the path.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from speechllm.data.audio import SAMPLE_RATE_HZ
from speechllm.decode.result import Word
from speechllm.model.ctc import BLANK, targets_of
from speechllm.model.projector import CtcBridge
from speechllm.score.errors import align as align_edits
from speechllm.text.reading import katakana_reading, plain_kana, short_units

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from speechllm.model.heads import Heads
    from speechllm.model.speechllm import SpeechLlm

EDGE_S = 0.16
"""Where the speech ends is not told: no word begins in so much of the end."""
LONGEST_KANA_S = 0.24
"""What a kana may fill of the silence after it; the rest of a pause belongs to no word."""
QUIET_DB = 35.0
"""So far below the loudest 20 ms a sound is taken for silence at the ends."""
DOUBTFUL_SUPPORT = -4.0
"""Words with less support, in nats a kana, are doubtful. Measured: docs/heads.md."""
_WORST_SUPPORT = -20.0
_FORBIDDEN = 100.0  # nats: a text that fits nowhere else may still use these frames
_HOP = 320
_NUMBER_SIGNS = re.compile(r"[.,．，]")


@dataclass(frozen=True, slots=True)
class Heard:
    """A word of the text, where it lies in the sound, and how well the head heard it."""

    surface: str
    kana: str
    start_s: float
    end_s: float
    kana_s: tuple[tuple[float, float], ...]
    """Begin and end of each of its kana."""
    support: float
    """Log probability of its kana less that of what the head hears there best, a kana; 0 is the most."""

    @property
    def doubtful(self) -> bool:
        """Return whether the head heard something else there, or nothing."""
        return bool(self.kana) and self.support < DOUBTFUL_SUPPORT


def kana_log_probs(
    model: SpeechLlm, frames_beh: Tensor, frames_b: Sequence[int], heads: Heads | None = None
) -> list[NDArray[np.float32]] | None:
    """Return [q k] of each utterance: what its frames say of blank and kana; None where there is no kana head.

    The head of the model's own bridge is taken where it has one, else that of `heads`.
    """
    own = model.projector.head if isinstance(model.projector, CtcBridge) else None
    head = heads.kana if own is None and heads is not None else own
    if head is None:
        return None
    with torch.inference_mode():
        logits_bqk, _, tokens_b = head(frames_beh, frames_b)
        log_probs_bqk = logits_bqk.float().log_softmax(dim=-1).cpu().numpy()
    return [row[:count] for row, count in zip(log_probs_bqk, tokens_b, strict=True)]


def align(log_probs_qk: NDArray[np.float32], symbols: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first frame and the frame after the last of each symbol, ascending, on the best path.

    A sound with fewer frames than its text needs gets its symbols spread evenly: see `fits`.

    >>> quiet, loud = np.log(0.1), np.log(0.8)
    >>> align(np.array([[loud, quiet, quiet], [quiet, loud, quiet], [quiet, quiet, loud]]), [1, 2])
    [(1, 2), (2, 3)]
    """
    if not symbols:
        return []
    if not fits(len(log_probs_qk), symbols):
        edges = [round(index * len(log_probs_qk) / len(symbols)) for index in range(len(symbols) + 1)]
        return list(pairwise(edges))
    states_q = _best_path(log_probs_qk, symbols)
    # a path passes through every symbol, so each odd state is there
    firsts = np.searchsorted(states_q, np.arange(1, 2 * len(symbols), 2), side="left")
    ends = np.searchsorted(states_q, np.arange(1, 2 * len(symbols), 2), side="right")
    return [(int(first), int(end)) for first, end in zip(firsts, ends, strict=True)]


def fits(num_frames: int, symbols: Sequence[int]) -> bool:
    """Return whether so many frames can hold a text: one each, and one more between two that are alike."""
    return num_frames >= len(symbols) + sum(one == other for one, other in pairwise(symbols))


def _best_path(log_probs_qk: NDArray[np.float32], symbols: Sequence[int]) -> NDArray[np.int64]:
    """Return the state of each frame [q], ascending: 2 i + 1 is the i-th symbol, even ones are the blanks between."""
    states = np.full(2 * len(symbols) + 1, BLANK, dtype=np.int64)
    states[1::2] = symbols
    emitted_qs = log_probs_qk[:, states].astype(np.float64)
    no_skip_s = np.ones(len(states), dtype=bool)
    no_skip_s[3::2] = states[3::2] == states[1:-2:2]  # two that are alike keep their blank
    steps_qs = np.zeros(emitted_qs.shape, dtype=np.int8)
    ways_3s = np.full((3, len(states)), -np.inf)
    score_s = np.full(len(states), -np.inf)
    score_s[:2] = emitted_qs[0, :2]
    for frame in range(1, len(emitted_qs)):
        ways_3s[0] = score_s
        ways_3s[1, 1:] = score_s[:-1]
        ways_3s[2, 2:] = score_s[:-2]
        ways_3s[2, no_skip_s] = -np.inf
        steps_qs[frame] = ways_3s.argmax(axis=0)
        score_s = ways_3s.max(axis=0) + emitted_qs[frame]
    state = len(states) - 1 - int(score_s[-2] > score_s[-1])
    path_q = np.empty(len(emitted_qs), dtype=np.int64)
    for frame in range(len(path_q) - 1, -1, -1):
        path_q[frame] = state
        state -= int(steps_qs[frame, state])
    return path_q


def words_of(text: str) -> list[tuple[str, str]]:
    """Return the words of a text and the kana of each as pronounced; surfaces join to the text.

    Numbers are one word; punctuation and blanks have no kana. The reading of the whole text is shared out, for only
    there a number or a particle sounds as it should.

    >>> words_of("11月は、")
    [('11', 'ジューイチ'), ('月', 'ガツ'), ('は', 'ワ'), ('、', '')]
    """
    units = _units(text)
    whole = katakana_reading(text)
    owners = [index for index, (_, kana) in enumerate(units) for _ in kana]
    shares = [""] * len(units)
    for place, source in enumerate(_sources("".join(kana for _, kana in units), whole) if owners else ()):
        shares[owners[source]] += whole[place]
    return [(surface, share) for (surface, _), share in zip(units, shares, strict=True)]


def _sources(apart: str, whole: str) -> list[int]:
    """Return for each kana of the whole reading the place in the readings of the single words that it belongs to."""
    steps = align_edits(apart, whole)
    sources: list[int] = []
    for index, step in enumerate(steps):
        count = step.hyp_end - step.hyp_start
        if step.kind != "ins":
            sources += range(step.ref_start, step.ref_start + count)
            continue
        # what only the whole reading has goes to the word before, unless it is the next one that is read otherwise
        otherwise = index + 1 < len(steps) and steps[index + 1].kind in {"sub", "del"}
        at = step.ref_start if otherwise or step.ref_start == 0 else step.ref_start - 1
        sources += [at] * count
    return sources


def _units(text: str) -> list[tuple[str, str]]:
    """Return UniDic's units, numbers put together, each with its reading alone."""
    surfaces: list[str] = []
    readings: list[str] = []
    for unit in short_units(text):
        if surfaces and _continues_number(surfaces[-1], unit.surface):
            surfaces[-1] += unit.surface
            readings[-1] = ""
        else:
            surfaces.append(unit.surface)
            readings.append(unit.reading)
    return [(surface, kana or katakana_reading(surface)) for surface, kana in zip(surfaces, readings, strict=True)]


def _continues_number(before: str, unit: str) -> bool:
    """Return whether a unit goes on with a number: 1 , 234 and 3 . 5 are three units each to UniDic."""
    begun = before[0].isdecimal()
    return begun and (unit.isdecimal() or (before[-1].isdecimal() and _NUMBER_SIGNS.fullmatch(unit) is not None))


def spoken(wave_s: NDArray[np.float32]) -> tuple[float, float]:
    """Return begin and end, in seconds, of what is loud in a sound [s] at 16 kHz; of silence, all."""
    hops = len(wave_s) // _HOP
    power_h = np.square(wave_s[: hops * _HOP], dtype=np.float64).reshape(hops, _HOP).mean(axis=1)
    loud = np.flatnonzero(power_h > power_h.max(initial=0.0) * 10 ** (-QUIET_DB / 10))
    if not len(loud):
        return 0.0, len(wave_s) / SAMPLE_RATE_HZ
    return int(loud[0]) * _HOP / SAMPLE_RATE_HZ, (int(loud[-1]) + 1) * _HOP / SAMPLE_RATE_HZ


def hear(
    text: str, log_probs_qk: NDArray[np.float32], duration_s: float, spoken_s: tuple[float, float] | None = None
) -> list[Heard]:
    """Return the words of a text in the sound that `log_probs_qk` is of; their surfaces join to the text.

    `spoken_s` bounds where words may lie; see `spoken`. A head likes to write the last kana of a phrase that it knows
    by heart into the silence behind it, half a second late.
    """
    words = words_of(text)
    symbols = targets_of("".join(reading for _, reading in words))
    supports = _supports(log_probs_qk, symbols)
    frame_s = duration_s / max(1, len(log_probs_qk))
    bounds_s = spoken_s or (0.0, duration_s - EDGE_S)
    times_s = _kana_times(align(_bounded(log_probs_qk, frame_s, bounds_s), symbols), frame_s, duration_s)
    heard: list[Heard] = []
    first, now_s = 0, 0.0
    for surface, reading in words:
        end = first + len(reading)
        mine = tuple(times_s[first:end])
        start_s, now_s = (mine[0][0], mine[-1][1]) if mine else (now_s, now_s)
        support = float(np.mean(supports[first:end])) if mine else 0.0
        heard.append(Heard(surface, reading, start_s, now_s, mine, support))
        first = end
    return heard


def _bounded(log_probs_qk: NDArray[np.float32], frame_s: float, bounds_s: tuple[float, float]) -> NDArray[np.float32]:
    """Return log probabilities that keep kana within `bounds_s` as far as there is room."""
    first, end = (round(bound_s / frame_s) if frame_s else 0 for bound_s in bounds_s)
    bounded_qk = log_probs_qk.copy()
    bounded_qk[: max(0, first), 1:] -= _FORBIDDEN
    bounded_qk[max(0, end) :, 1:] -= _FORBIDDEN
    return bounded_qk


def _supports(log_probs_qk: NDArray[np.float32], symbols: Sequence[int]) -> list[float]:
    """Return of each symbol its best frame's log probability less that of what is best there."""
    if not fits(len(log_probs_qk), symbols):
        return [_WORST_SUPPORT] * len(symbols)
    spans = align(log_probs_qk, symbols)
    behind_qk = log_probs_qk - log_probs_qk.max(axis=1, keepdims=True)
    best = [float(behind_qk[first:end, symbol].max()) for symbol, (first, end) in zip(symbols, spans, strict=True)]
    return [max(_WORST_SUPPORT, value) for value in best]


def _kana_times(spans: Sequence[tuple[int, int]], frame_s: float, duration_s: float) -> list[tuple[float, float]]:
    """Return begin and end of each kana: from where it is marked to the next or to a pause."""
    starts_s = [min(first * frame_s, duration_s) for first, _ in spans]
    spans_s = pairwise([*starts_s, duration_s])
    return [(start_s, min(end_s, start_s + LONGEST_KANA_S)) for start_s, end_s in spans_s]


def time_words(
    text: str,
    log_probs_qk: NDArray[np.float32],
    duration_s: float,
    *,
    confidences: Sequence[float] | None = None,
    spoken_s: tuple[float, float] | None = None,
) -> tuple[Word, ...]:
    """Return the words of a text with their times: `hear`, then `to_words`."""
    return to_words(hear(text, log_probs_qk, duration_s, spoken_s), confidences)


def to_words(heard: Sequence[Heard], confidences: Sequence[float] | None = None) -> tuple[Word, ...]:
    """Return words with their times; a sign without a sound lies at the end of the word before it.

    `confidences` are those of the language model, 0 to 1, one a character of the text; a word's is then the geometric
    mean of theirs and of what the head heard, else the latter alone.
    """
    words: list[Word] = []
    at = 0
    for word in heard:
        end = at + len(word.surface)
        given = None if confidences is None else confidences[at:end]
        words.append(Word(word.surface, word.start_s, word.end_s, _confidence(word, given)))
        at = end
    return tuple(words)


def is_doubtful(heard: Sequence[Heard]) -> bool:
    """Return whether a text as a whole is to be looked at: one of its words at least was not heard."""
    return any(word.doubtful for word in heard)


def _confidence(heard: Heard, given: Sequence[float] | None) -> float:
    own = [math.exp(heard.support)] if heard.kana else []
    theirs = [sum(given) / len(given)] if given else []
    parts = own + theirs
    return math.prod(parts) ** (1 / len(parts)) if parts else 1.0


def time_characters(heard: Sequence[Heard]) -> list[tuple[str, float, float]]:
    """Return (character, start_s, end_s) of words in order.

    A word in kana has each character's own time; elsewhere the characters share out the kana of their word evenly.
    """
    return [timed for word in heard for timed in _characters(word)]


def _characters(word: Heard) -> list[tuple[str, float, float]]:
    count = len(word.surface)
    if not word.kana_s:
        return [(char, word.start_s, word.end_s) for char in word.surface]
    if len(plain_kana(word.surface)) == count == len(word.kana):
        return [(char, *span) for char, span in zip(word.surface, word.kana_s, strict=True)]
    # at fractions of a kana inside its span, so that a pause inside a word falls between kana
    times_s = pairwise([*(_at(word.kana_s, len(word.kana_s) * index / count) for index in range(count)), word.end_s])
    return [(char, start_s, end_s) for char, (start_s, end_s) in zip(word.surface, times_s, strict=True)]


def _at(spans_s: Sequence[tuple[float, float]], place: float) -> float:
    """Return the time of a place among kana, counted in kana from the first."""
    start_s, end_s = spans_s[int(place)]
    return start_s + (place - int(place)) * (end_s - start_s)

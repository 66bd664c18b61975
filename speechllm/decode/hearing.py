"""How well words were heard: their readings held against what a kana recogniser made of the sound.

A word is placed where it fits best in the CTC posteriors (Viterbi with free ends, on their runs). Each kana that is
not there, or is another one, costs up to `WORST` nats, so the cost is a soft edit distance.

Shapes: q frames of the CTC head, k symbols (0 is the blank), r runs of one best symbol, w words, n kana of a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from speechllm.model.ctc import BLANK, KANA
from speechllm.text.reading import sound_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

WORST = 5.0
"""Nats that a kana costs at most: wrong, missing, or one too many."""
WRITTEN_OUT = 2.5
"""Nats of a long vowel that was heard as two: 井上 (イノウエ) does not begin like 伊能 (イノー)."""
_VOWELS = "アイウエオ"
_NEVER = np.float32(-1e9)


@dataclass(frozen=True, slots=True)
class Heard:
    """A place where a word fits."""

    cost: float
    """Nats a kana below what was heard best; 0 is a perfect fit, `WORST` none."""
    first_run: int
    last_run: int

    def overlaps(self, other: Heard) -> bool:
        """Return whether half of the shorter of the two places is shared."""
        shared = min(self.last_run, other.last_run) - max(self.first_run, other.first_run) + 1
        shorter = min(self.last_run - self.first_run, other.last_run - other.first_run) + 1
        return 2 * shared > shorter


class Listener:
    """Readings, made ready to be held against many utterances."""

    def __init__(self, readings: Sequence[str]) -> None:
        """Take katakana readings in one spelling per sound (`sound_key`)."""
        alternatives: dict[tuple[int, ...], int] = {(BLANK,): BLANK}
        rows = []
        for reading in readings:
            sets = [s for s in map(_symbols, ("", *reading), reading) if s]
            rows.append([alternatives.setdefault(symbols, len(alternatives)) for symbols in sets])
        self._lengths_w: Ints = np.array([len(row) for row in rows], dtype=np.int64)
        self._columns_wn: Ints = np.zeros((len(rows), max(map(len, rows), default=1)), dtype=np.int64)
        for index, row in enumerate(rows):
            self._columns_wn[index, : len(row)] = row
        self._alternatives = tuple(alternatives)

    def listen(self, log_posterior_qk: Floats, limit: float) -> list[list[Heard]]:
        """Return for each reading the places where it fits with at most `limit` nats a kana; none overlap.

        `log_posterior_qk` are natural logarithms, a row a frame.
        """
        evidence_rk = runs_of(log_posterior_qk)
        evidence_rc = np.stack([_either(evidence_rk, symbols) for symbols in self._alternatives], axis=1)
        score_rw, first_rw = self._place(evidence_rc)
        cost_rw = -score_rw / np.maximum(1, self._lengths_w)
        found: list[list[Heard]] = [[] for _ in self._lengths_w]
        for word in np.flatnonzero((cost_rw <= limit).any(axis=0)).tolist():
            ends = np.flatnonzero(cost_rw[:, word] <= limit).tolist()
            places = [Heard(max(0.0, float(cost_rw[end, word])), int(first_rw[end, word]), end) for end in ends]
            for place in sorted(places, key=lambda heard: heard.cost):
                if not any(place.overlaps(better) for better in found[word]):
                    found[word].append(place)
        return found

    def _place(self, evidence_rc: Floats) -> tuple[Floats, Ints]:
        """Return [r w]: the score of the best place that ends with a run, and the run that it begins with."""
        words, longest = self._columns_wn.shape
        kana_wn = np.full((words, longest), _NEVER, dtype=np.float32)  # the run is kana n
        gap_wn = kana_wn.copy()  # the run is blank, kana n was before
        kana_first_wn = np.zeros((words, longest), dtype=np.int64)
        gap_first_wn = kana_first_wn.copy()
        every = np.arange(words)
        last_w, before_w = self._lengths_w - 1, np.maximum(0, self._lengths_w - 2)
        scores, firsts = [], []
        for run, evidence_c in enumerate(evidence_rc):
            any_wn, any_first_wn = _better((kana_wn, kana_first_wn), (gap_wn, gap_first_wn))
            moved = _shifted(any_wn, any_first_wn, 1, (np.float32(0), run))
            skipped = _shifted(any_wn - WORST, any_first_wn, 2, (np.float32(-WORST), run))
            gap_wn, gap_first_wn = any_wn + evidence_c[BLANK], any_first_wn
            kana_wn, kana_first_wn = _better(_better((kana_wn, kana_first_wn), moved), skipped)
            kana_wn = kana_wn + evidence_c[self._columns_wn]
            whole = (kana_wn[every, last_w], kana_first_wn[every, last_w])
            cut = (kana_wn[every, before_w] - WORST, kana_first_wn[every, before_w])
            score_w, first_w = _better(whole, cut)
            scores.append(score_w)
            firsts.append(first_w)
        return np.stack(scores), np.stack(firsts)


def runs_of(log_posterior_qk: Floats) -> Floats:
    """Return [r k]: how far each symbol stays below the best one in each run of frames, `-WORST` at the lowest."""
    below_qk = log_posterior_qk - log_posterior_qk.max(axis=1, keepdims=True)
    below_rk: Floats = np.maximum.reduceat(below_qk, _starts(log_posterior_qk), axis=0).clip(-WORST, 0.0)
    return below_rk


def kana_by_run(log_posterior_qk: Floats) -> list[str]:
    """Return the best symbol of each run, as kana; the blank is an empty string."""
    best_r = log_posterior_qk[_starts(log_posterior_qk)].argmax(axis=1).tolist()
    return ["" if symbol == BLANK else KANA[symbol - 1] for symbol in best_r]


def _starts(log_posterior_qk: Floats) -> Ints:
    """Return [r]: the frame that each run begins with."""
    return np.flatnonzero(np.diff(log_posterior_qk.argmax(axis=1), prepend=-1))


def _symbols(before: str, kana: str) -> tuple[int, ...]:
    """Return the symbol of a kana, and behind that of a long vowel those that write it out."""
    chars = [kana]
    if kana == "ー":
        chars += [vowel for vowel in _VOWELS if before and sound_key(before + vowel) == sound_key(before + "ー")]
    return tuple(KANA.index(char) + 1 for char in chars if char in KANA)


def _either(evidence_rk: Floats, symbols: tuple[int, ...]) -> Floats:
    """Return [r]: the evidence for the first symbol, or for one of the others, which costs."""
    written_out = [evidence_rk[:, symbol] - WRITTEN_OUT for symbol in symbols[1:]]
    either_r: Floats = np.max([evidence_rk[:, symbols[0]], *written_out], axis=0)
    return either_r


def _better(one: tuple[Floats, Ints], other: tuple[Floats, Ints]) -> tuple[Floats, Ints]:
    """Return the higher score at each place, with its beginning."""
    return np.maximum(one[0], other[0]), np.where(one[0] >= other[0], one[1], other[1])


def _shifted(score_wn: Floats, first_wn: Ints, by: int, entry: tuple[np.float32, int]) -> tuple[Floats, Ints]:
    """Return scores `by` kana further on; the kana that this lays bare at `by` - 1 is where a word may begin."""
    score, first = np.full_like(score_wn, _NEVER), np.zeros_like(first_wn)
    score[:, by:], first[:, by:] = score_wn[:, :-by], first_wn[:, :-by]
    if score.shape[1] >= by:
        score[:, by - 1], first[:, by - 1] = entry
    return score, first

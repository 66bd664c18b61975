"""Guards: texts that repeat themselves, and texts of sounds in which nothing was said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from speechllm.model.ctc import BLANK

if TYPE_CHECKING:
    from numpy.typing import NDArray

LONGEST_PERIOD = 24  # tokens; a model that loops repeats a word, a clause, seldom a long sentence
MOST_REPEATS = 4  # people do say はい four times
FEWEST_TOKENS = 12  # of all repetitions together, so that ああああああ stays
FEWEST_KANA_PER_S = 0.6
"""People say seven or eight. In 47 of the 50 sounds without speech of tools/bench/no_speech.py the mini model heard
fewer, in 36 none."""
MOST_WRITTEN, SPARE_KANA = 2, 4
SILENT = 0.5
"""Likelihood of no speech from which on a text is left out."""


@dataclass(frozen=True)
class Repeats:
    """The repetitions at the end of a text."""

    tokens: tuple[int, ...]

    def too_many(self) -> bool:
        """Return whether the text ends with more repetitions than people say."""
        return any(self._is_loop(period) for period in range(1, self._longest() + 1))

    def next_ones(self) -> list[int]:
        """Return the tokens that would complete one repetition more than people say."""
        return [
            self.tokens[-period]
            for period in range(1, self._longest() + 1)
            if Repeats((*self.tokens, self.tokens[-period]))._is_loop(period)  # noqa: SLF001 - of this class
        ]

    def _longest(self) -> int:
        return min(LONGEST_PERIOD, len(self.tokens) // MOST_REPEATS)

    def _is_loop(self, period: int) -> bool:
        """Return whether the last `period` tokens stand at the end too often, one after another."""
        same = 0
        while same + period < len(self.tokens) and self.tokens[-1 - same] == self.tokens[-1 - same - period]:
            same += 1
        repeats = same // period + 1
        return repeats > MOST_REPEATS and repeats * period > FEWEST_TOKENS


def no_speech(probability: float, kana_per_s: float | None) -> float:
    """Return how likely it is, 0 to 1, that nothing was said.

    `probability` is a detector's over what it takes for speech, 1 where none was asked; `kana_per_s` is what the kana
    recogniser heard there, None where the model has none.
    """
    heard = 1.0 if kana_per_s is None else min(1.0, kana_per_s / FEWEST_KANA_PER_S)
    return 1.0 - probability * heard


def kana_per_s(log_probs_qk: NDArray[np.float32], speech_s: float) -> float:
    """Return how many kana a second were heard in so many seconds of speech; see `num_kana`."""
    return num_kana(log_probs_qk) / max(speech_s, 1e-3)


def num_kana(log_probs_qk: NDArray[np.float32]) -> int:
    """Return the number of kana on the best path of [q k]; column 0 is the blank."""
    best = log_probs_qk.argmax(axis=1)
    return int(np.count_nonzero((best != BLANK) & (np.append(-1, best[:-1]) != best)))


def is_invented(written: int, heard: int) -> bool:
    """Return whether a text of `written` kana cannot be what was said where `heard` were heard.

    A language model makes a whole sentence of a cough.
    """
    return written > MOST_WRITTEN * heard + SPARE_KANA

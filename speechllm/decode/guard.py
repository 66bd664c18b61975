"""Guards: texts that repeat themselves, and texts of sounds in which nothing was said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from speechllm.decode.align import Heard

LONGEST_PERIOD = 24  # tokens; a model that loops repeats a word, a clause, seldom a long sentence
MOST_REPEATS = 4  # people do say はい four times
FEWEST_TOKENS = 12  # of all repetitions together, so that ああああああ stays
SURE = 0.5
"""Probability of speech above which the detector is believed, whatever the text looks like."""
DOUBTED = 0.5
"""Part of the words that must have been heard where the detector is not sure."""


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


def no_speech(probability: float, heard: Sequence[Heard]) -> float:
    """Return how likely it is, 0 to 1, that nothing was said in a sound in which a detector finds speech.

    `probability` is the detector's mean over what it takes for speech; `heard` are the words of the text that the model
    wrote: music that the detector takes for a voice has no kana in it.
    """
    spoken = [word for word in heard if word.kana]
    doubted = sum(word.doubtful for word in spoken) / len(spoken) if spoken else 0.0
    return (
        (1.0 - probability) * doubted if probability > SURE or doubted <= DOUBTED else 1.0 - probability * (1 - doubted)
    )

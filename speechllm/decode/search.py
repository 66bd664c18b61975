"""The search for one utterance's text: hypotheses that live, hypotheses that ended, and which go on. No tensors here.

Greedy search is a beam of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from speechllm.decode.guard import Repeats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from speechllm.config.schema import DecodeConfig
    from speechllm.decode.bias import State, UtteranceBias


@dataclass(frozen=True)
class Hypothesis:
    """A text: its tokens without the end, and the log probability of each (the end's is last)."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    ended: bool
    """Whether the model ended it; False where the length bound cut it."""
    bonus: float = 0.0
    """Nats that hotwords have added."""
    state: State | None = None
    """Where it stands among the hotwords."""

    @property
    def log_prob(self) -> float:
        """Return the log probability of the whole, in nats; without `bonus`."""
        return sum(self.log_probs)

    def rank(self, length_penalty: float) -> float:
        """Return what hypotheses are sorted by: (log probability + bonus) / tokens ** penalty."""
        return (self.log_prob + self.bonus) / float(max(1, len(self.log_probs)) ** length_penalty)


@dataclass(frozen=True)
class Candidate:
    """A live hypothesis and a token that could follow it."""

    row: int
    """Which of the live ones."""
    token: int
    log_prob: float
    boost: float = 0.0


@dataclass
class Search:
    """The search of one utterance."""

    max_tokens: int
    config: DecodeConfig
    end: int
    """The token that ends a text."""
    bias: UtteranceBias | None = None
    guarded: bool = False
    """Whether a text that repeats itself is kept from going on so."""
    live: list[Hypothesis] = field(default_factory=list)
    finished: list[Hypothesis] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with the empty text."""
        if not self.live and not self.finished:
            self.live = [Hypothesis((), (), ended=False, state=None if self.bias is None else self.bias.start)]

    def is_changed(self, written: int) -> bool:
        """Return whether `changes` may say something of a text of so many tokens."""
        return self.guarded or self.bias is not None or written < self.config.min_tokens

    def changes(self, hypothesis: Hypothesis) -> dict[int, float]:
        """Return what is added to the log probabilities of tokens that may follow: hotwords' nats, -inf for never."""
        added: dict[int, float] = {}
        if self.bias is not None and hypothesis.state is not None:
            added.update(self.bias.boosts(hypothesis.state))
        if len(hypothesis.tokens) < self.config.min_tokens:
            added[self.end] = -math.inf
        if self.guarded:
            added.update(dict.fromkeys(Repeats(hypothesis.tokens).next_ones(), -math.inf))
        return added

    def advance(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Extend the live hypotheses by the best of `candidates`; return those that live on, in their new order.

        There must be enough of them: the best 2 * beam of every live hypothesis.
        """
        beam = self.config.beam
        # ties go to the earlier row and the smaller token, whatever the batch
        ordered = sorted(candidates, key=lambda c: (-self._total(c), c.row, c.token))
        before, picked = self.live, list[Candidate]()
        self.live = []
        for rank, candidate in enumerate(ordered):
            if candidate.token == self.end:
                if rank < beam:
                    self.finished.append(self._followed(before[candidate.row], candidate))
            elif len(self.live) < beam:
                self.live.append(self._followed(before[candidate.row], candidate))
                picked.append(candidate)
        if not self.live and not self.finished:  # weights that are not finite have no candidates
            self.finished = before
        if self.live and len(self.live[0].tokens) >= self.max_tokens:
            self.finished += self.live
            self.live, picked = [], []
        return picked

    def _total(self, candidate: Candidate) -> float:
        hypothesis = self.live[candidate.row]
        return hypothesis.log_prob + candidate.log_prob + self._bonus(hypothesis, candidate)

    def _bonus(self, hypothesis: Hypothesis, candidate: Candidate) -> float:
        taken = 0.0
        if self.bias is not None and hypothesis.state is not None:
            taken = self.bias.taken_back(hypothesis.state)
        return hypothesis.bonus + taken + candidate.boost

    def _followed(self, hypothesis: Hypothesis, candidate: Candidate) -> Hypothesis:
        log_probs = (*hypothesis.log_probs, candidate.log_prob)
        bonus = self._bonus(hypothesis, candidate)
        if candidate.token == self.end:
            return Hypothesis(hypothesis.tokens, log_probs, ended=True, bonus=bonus)
        state = None
        if self.bias is not None and hypothesis.state is not None:
            state = self.bias.next(hypothesis.state, candidate.token)
        return Hypothesis((*hypothesis.tokens, candidate.token), log_probs, ended=False, bonus=bonus, state=state)

    def done(self) -> bool:
        """Return whether no live hypothesis can enter the best `beam` finished ones."""
        if not self.live:
            return True
        if len(self.finished) < self.config.beam:
            return False
        penalty = self.config.length_penalty
        worst = sorted(h.rank(penalty) for h in self.finished)[-self.config.beam]
        # a longer text has a lower log probability, so this is the best that the live ones can reach
        longest = max(1.0, self.max_tokens ** max(0.0, penalty))
        return max(h.log_prob + h.bonus for h in self.live) / longest <= worst or self.config.beam == 1

    def best(self) -> list[Hypothesis]:
        """Return the finished hypotheses, the best first; those cut by the length bound come last."""
        penalty = self.config.length_penalty
        return sorted(self.finished, key=lambda h: (not h.ended, -h.rank(penalty)))[: self.config.beam]

    def loops(self) -> bool:
        """Return whether the best text, live or not, has begun to repeat itself."""
        first = self.live[0] if self.live else max(self.finished, key=lambda h: h.rank(0.0), default=None)
        return first is not None and not self.guarded and Repeats(first.tokens).too_many()

"""The decoder: rows of a search side by side, refilled as utterances end, with no token computed that is not needed.

Every forward reads the next token of each row at work and the whole question of each new one (`model.slots`). Drafts,
where there are any, are read along and kept as far as they are what greedy search takes itself.
Shapes: n tokens of a forward, x positions whose next token is asked for, l positions, d LM width, v vocabulary.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from speechllm.decode.draft import LOOK, resume
from speechllm.decode.search import Candidate, Search
from speechllm.errors import ModelError, is_out_of_memory
from speechllm.model.slots import Slots
from speechllm.model.splice import on

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from speechllm.config.schema import DecodeConfig
    from speechllm.decode.bias import UtteranceBias
    from speechllm.decode.search import Hypothesis
    from speechllm.model.lm import LanguageModel

log = logging.getLogger(__name__)

LOOKS_EVERY = 8  # tokens: a loop need not be seen at once


@dataclass(frozen=True)
class Job:
    """An utterance to be decoded."""

    key: str
    embeds_ld: Tensor
    """What the language model reads of it behind what all share."""
    max_tokens: int
    bias: UtteranceBias | None = None
    draft: tuple[int, ...] = ()
    """Tokens that may be the text; greedy search alone takes them."""
    guarded: bool = False
    """Whether it has begun to repeat itself once, and may not again."""


@dataclass(frozen=True)
class Found:
    """The n-best of an utterance, the best first."""

    key: str
    nbest: tuple[Hypothesis, ...]
    looped: bool


@dataclass
class Spent:
    """What a run has taken."""

    forwards: int = 0
    rows: int = 0
    """Rows of all forwards together."""
    needed: int = 0
    """Tokens of the texts that were found, ends included: with greedy search and no drafts a row each."""
    positions: int = 0
    halved: int = 0
    """How often the memory did not hold the rows."""


class Feed(Protocol):
    """Where utterances come from."""

    def take(self) -> Job | None:
        """Return the next utterance, or None where there is none left."""
        ...

    def shrink(self) -> None:
        """Prepare fewer at a time from now on."""
        ...


@dataclass
class _Work:
    """An utterance whose rows are at work."""

    job: Job
    search: Search
    draft: tuple[int, ...]
    is_new: bool = True

    @property
    def drafted(self) -> tuple[int, ...]:
        """Return the draft tokens that are read along: a few, and those that fit below the bound."""
        room = self.search.max_tokens - len(self.search.live[0].tokens) - 1
        return self.draft[: max(0, min(LOOK, room))]


@dataclass(frozen=True)
class _Kept:
    """An utterance that goes on, the rows that its texts come from, and how much of each is theirs."""

    work: _Work
    rows: list[int]
    lengths: list[int]


def _in_place(still: Sequence[_Kept]) -> list[_Kept]:
    """Return utterances of a row each in an order in which few of them must move: the last ones fill the gaps."""
    stay = {one.rows[0]: one for one in still if one.rows[0] < len(still)}
    move = [one for one in still if one.rows[0] >= len(still)]
    return [stay.get(row) or move.pop() for row in range(len(still))]


@dataclass
class Engine:
    """Decodes utterances, `utterances` of them at a time."""

    lm: LanguageModel
    shared_ld: Tensor
    """What all utterances begin with."""
    config: DecodeConfig
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        """Take the end of a text from the tokenizer."""
        self.utterances = self.config.batch_size
        self.end: int = self.lm.tokenizer.eos_token_id
        self._again: deque[Job] = deque()

    def run(self, feed: Feed) -> Iterator[Found]:
        """Yield every utterance of `feed` as it ends.

        Raises:
            ModelError: the memory does not hold a single utterance.
        """
        slots, work = self._begin(), list[_Work]()
        while True:
            try:
                self._admit(feed, work)
                if not work:
                    return
                log_probs_xv = self._read(slots, work)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                feed.shrink()
                self._halve(work)
                slots, work = self._begin(), []
                continue
            found, work = self._advance(slots, work, log_probs_xv)
            yield from found

    @torch.inference_mode()
    def _begin(self) -> Slots:
        slots = Slots(self.lm)
        slots.share(self.shared_ld)
        return slots

    def _admit(self, feed: Feed, work: list[_Work]) -> None:
        """Fill up `work`; what is in it when the memory runs out meanwhile is not lost."""
        while len(work) < self.utterances:
            job = self._again.popleft() if self._again else feed.take()
            if job is None:
                return
            search = Search(job.max_tokens, self.config, self.end, job.bias, job.guarded)
            drafts = self.config.beam == 1 and job.bias is None and not job.guarded
            work.append(_Work(job, search, job.draft if drafts else ()))

    def _halve(self, work: Sequence[_Work]) -> None:
        """Begin the utterances at work again, half as many at a time."""
        if self.utterances == 1:
            what = "the memory does not hold one utterance"
            raise ModelError("decode", what, "set decode.beam lower, take a smaller model or cut the sounds") from None
        self._again.extendleft(entry.job for entry in reversed(work))
        self.utterances //= 2
        self.spent.halved += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("decode out of memory, fewer utterances at a time now=%d", self.utterances)

    @torch.inference_mode()
    def _read(self, slots: Slots, work: Sequence[_Work]) -> Tensor:
        """Return log probabilities [x v]: a line for each row, and one more for each token of its draft."""
        old = [entry for entry in work if not entry.is_new]
        new = [entry for entry in work if entry.is_new]
        ids = [t for entry in old for hypothesis in entry.search.live for t in (hypothesis.tokens[-1], *entry.drafted)]
        drafted = [token for entry in new for token in entry.drafted]
        vectors_nd = self.lm.embed([*ids, *drafted])
        pieces, at = [vectors_nd[: len(ids)]], len(ids)
        for entry in new:
            pieces += [entry.job.embeds_ld, vectors_nd[at : at + len(entry.drafted)]]
            at += len(entry.drafted)
        more = [1 + len(entry.drafted) for entry in old for _ in entry.search.live]
        fresh = [len(entry.job.embeds_ld) + len(entry.drafted) for entry in new]
        states_nd = slots.read(torch.cat(pieces), more, fresh)
        asked, end = list(range(len(ids))), len(ids)
        for entry, count in zip(new, fresh, strict=True):
            end += count
            asked += range(end - 1 - len(entry.drafted), end)
        self.spent.forwards += 1
        self.spent.rows += len(more) + len(fresh)
        self.spent.positions += len(states_nd)
        return self.lm.logits(states_nd[on(asked, states_nd.device)]).log_softmax(dim=-1)

    @torch.inference_mode()
    def _advance(self, slots: Slots, work: Sequence[_Work], log_probs_xv: Tensor) -> tuple[list[Found], list[_Work]]:
        """Extend every text; return those that ended and the utterances that go on, whose rows are kept."""
        candidates = self._candidates(work, log_probs_xv)
        found, still = list[Found](), list[_Kept]()
        row = 0
        for entry in work:
            width = len(entry.search.live)
            picked, in_vain = self._extend(entry, candidates)
            if entry.search.done():
                found.append(Found(entry.job.key, tuple(entry.search.best()), entry.job.guarded))
                self.spent.needed += len(found[-1].nbest[0].log_probs)
            elif self._loops(entry):
                self._again.append(replace(entry.job, guarded=True, draft=()))
            else:
                rows = [row + candidate.row for candidate in picked]
                still.append(_Kept(entry, rows, [slots.lengths[kept] - in_vain for kept in rows]))
            row += width
        if self.config.beam == 1:
            still = _in_place(still)
        slots.keep([row for one in still for row in one.rows], [length for one in still for length in one.lengths])
        return found, [one.work for one in still]

    def _extend(self, entry: _Work, candidates: Iterator[list[Candidate]]) -> tuple[list[Candidate], int]:
        """Extend the texts of one utterance; return those that live on, and how many tokens read in vain."""
        drafted, entry.is_new = entry.drafted, False
        if not drafted:
            gathered = [one for _ in list(entry.search.live) for one in next(candidates)]
            return entry.search.advance(gathered), 0
        steps = [next(candidates) for _ in range(1 + len(drafted))]
        for taken, step in enumerate(steps):
            picked = entry.search.advance(step)
            chosen = picked[0].token if picked else self.end
            if entry.search.done() or taken == len(drafted) or chosen != drafted[taken]:
                break
        entry.draft = resume(entry.draft, taken, chosen)
        return picked, len(drafted) - taken

    def _loops(self, entry: _Work) -> bool:
        written = len(entry.search.live[0].tokens)
        return self.config.mend_loops and written % LOOKS_EVERY == 0 and entry.search.loops()

    def _candidates(self, work: Sequence[_Work], log_probs_xv: Tensor) -> Iterator[list[Candidate]]:
        """Yield the best candidates of each line, hotwords and bans counted in."""
        changes: dict[tuple[int, int], float] = {}
        row_of_x = list[int]()
        for entry in work:
            for row, hypothesis in enumerate(entry.search.live):
                for ahead in range(1 + len(entry.drafted)):
                    if entry.search.is_changed(len(hypothesis.tokens) + ahead):
                        written = replace(hypothesis, tokens=(*hypothesis.tokens, *entry.drafted[:ahead]))
                        for token, nats in entry.search.changes(written).items():
                            changes[len(row_of_x), token] = nats
                    row_of_x.append(row)
        scores_xv = _changed(log_probs_xv, changes)
        top = scores_xv.topk(min(2 * self.config.beam, scores_xv.shape[1]), dim=-1)
        for x, (row, values, tokens) in enumerate(
            zip(row_of_x, top.values.tolist(), top.indices.tolist(), strict=True)
        ):
            boosts = [changes.get((x, token), 0.0) for token in tokens]
            yield [
                Candidate(row, token, value - boost, boost)
                for token, value, boost in zip(tokens, values, boosts, strict=True)
                if value > -torch.inf
            ]


@dataclass
class _Listed:
    """A feed of jobs that are there already."""

    jobs: deque[Job]

    def take(self) -> Job | None:
        return self.jobs.popleft() if self.jobs else None

    def shrink(self) -> None:
        """Do nothing: nothing is prepared."""


def search(
    lm: LanguageModel, shared_ld: Tensor, own_ld: Sequence[Tensor], max_tokens: Sequence[int], config: DecodeConfig
) -> list[list[Hypothesis]]:
    """Return the n-best of each utterance, the best first.

    `shared_ld` is what all begin with, `own_ld` what follows in each, `max_tokens` the bound of each text.
    """
    jobs = [Job(str(number), *parts) for number, parts in enumerate(zip(own_ld, max_tokens, strict=True))]
    found = {one.key: list(one.nbest) for one in Engine(lm, shared_ld, config).run(_Listed(deque(jobs)))}
    return [found[job.key] for job in jobs]


def _changed(log_probs_xv: Tensor, changes: dict[tuple[int, int], float]) -> Tensor:
    if not changes:
        return log_probs_xv
    lines, tokens = (on(side, log_probs_xv.device) for side in zip(*changes, strict=True))
    added = torch.tensor(list(changes.values()), device=log_probs_xv.device)
    return log_probs_xv.clone().index_put((lines, tokens), added, accumulate=True)

"""What one utterance scores: normalised texts, counts by metric, alignments, causes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from speechllm.score.causes import Forgiven, edit_causes, forgiven_pairs
from speechllm.score.errors import Counts, Step, align, count_edits, counts_of
from speechllm.score.lenient import alike_pairs
from speechllm.text import reading

if TYPE_CHECKING:
    from speechllm.score.texts import JoinedText
    from speechllm.text.normalize import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to compute for each utterance."""

    profile: Profile
    metrics: frozenset[str]
    """Beside ``cer`` and ``ser``, which are always there."""
    kana_best: bool = False
    """Take the better of the given and the automatic reading of the reference."""


@dataclass(frozen=True, slots=True)
class Leniency:
    """What a lenient alignment left over, and what it forgave."""

    counts: Counts
    steps: list[Step] = field(repr=False)
    """Lenient alignment; forgiven pairs are ``alike``."""
    forgiven: list[Forgiven] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)
    """All edits of the plain alignment by cause."""


@dataclass(frozen=True, slots=True)
class Kana:
    """Readings of both sides, one spelling per sound, and their edits."""

    ref: str
    hyp: str
    counts: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class UttScore:
    """One utterance, scored."""

    text: JoinedText
    ref_norm: str
    hyp_norm: str
    counts: dict[str, Counts]
    """By metric."""
    steps: list[Step] = field(repr=False)
    """Character alignment of the normalised texts."""
    leniency: Leniency | None = None
    kana: Kana | None = None

    @property
    def shown_steps(self) -> list[Step]:
        """The alignment that says most: the lenient one where there is one."""
        return self.leniency.steps if self.leniency else self.steps


def score_utterance(text: JoinedText, wanted: Wanted, given_kana: str | None = None) -> UttScore:
    """Counts, alignment and causes of one utterance; ``given_kana`` is a hand-made reading of the reference."""
    ref, hyp = wanted.profile.apply(text.ref), wanted.profile.apply(text.hyp)
    steps = align(ref, hyp)
    counts = {"cer": counts_of(steps), "ser": Counts(sub=int(ref != hyp), ref=1)}
    if "wer" in wanted.metrics:
        counts["wer"] = count_edits(reading.words(ref), reading.words(hyp))
    leniency = kana = None
    if "cer_lenient" in wanted.metrics:
        leniency = _forgive(ref, hyp, steps)
        counts["cer_lenient"] = leniency.counts
    if "kana_cer" in wanted.metrics:
        kana = _compare_kana(ref, hyp, given_kana, best=wanted.kana_best)
        counts["kana_cer"] = kana.counts
    return UttScore(
        text=text,
        ref_norm=ref,
        hyp_norm=hyp,
        counts=counts,
        steps=steps,
        leniency=leniency,
        kana=kana,
    )


def _forgive(ref: str, hyp: str, steps: list[Step]) -> Leniency:
    """The lenient alignment of two texts whose plain one is ``steps``."""
    plain = counts_of(steps)
    if not plain.edits:
        return Leniency(plain, steps)
    ref_units, hyp_units = reading.short_units(ref), reading.short_units(hyp)
    lenient = align(ref, hyp, alike_pairs(steps, ref_units, hyp_units))
    forgiven = forgiven_pairs(lenient, ref_units, hyp_units)
    causes = edit_causes(ref, hyp, steps, lenient, forgiven)
    return Leniency(counts_of(lenient), lenient, forgiven, causes)


def _compare_kana(ref: str, hyp: str, given: str | None, *, best: bool) -> Kana:
    """Edits between readings: the given one of the reference if there is any, else the automatic one."""
    hyp_kana = reading.sound_key(reading.katakana_reading(hyp))
    candidates = [] if given is None else [reading.sound_key(reading.plain_kana(given))]
    if given is None or best:
        candidates.append(reading.sound_key(reading.katakana_reading(ref)))
    scored = [Kana(kana, hyp_kana, count_edits(kana, hyp_kana)) for kana in candidates]
    return min(scored, key=lambda one: one.counts.edits)

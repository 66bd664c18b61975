"""Edit counts and alignments of two sequences. Owns rapidfuzz.

Every alignment has the fewest edits (Levenshtein 1966), and among those the fewest substitutions, so that the split
into substitutions, deletions and insertions is a property of the two sequences and not of a tie-break; sclite's
weights (4/3/3) prefer the same ones. `align` can also be given pairs of spans that cost nothing: that is how a
lenient score forgives.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rapidfuzz.distance import Levenshtein

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from numpy.typing import NDArray

Kind = Literal["equal", "sub", "del", "ins", "alike"]


@dataclass(frozen=True, slots=True)
class Counts:
    """Edits between a reference and a hypothesis, and the reference's length, all in tokens."""

    sub: int = 0
    dele: int = 0
    """Deletions; ``del`` in files, a keyword here."""
    ins: int = 0
    ref: int = 0

    @property
    def edits(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.sub + self.dele + self.ins

    def __add__(self, other: Counts) -> Counts:
        """Counts of two utterances together."""
        return Counts(self.sub + other.sub, self.dele + other.dele, self.ins + other.ins, self.ref + other.ref)


@dataclass(frozen=True, slots=True)
class Step:
    """One stretch of an alignment: half-open token ranges of the reference and of the hypothesis."""

    kind: Kind
    """``alike`` is a forgiven pair; ``sub`` ranges are of equal length."""
    ref_start: int
    ref_end: int
    hyp_start: int
    hyp_end: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A reference span and a hypothesis span, neither empty, that may stand for each other at no cost."""

    ref_start: int
    ref_end: int
    hyp_start: int
    hyp_end: int


def count_edits(ref: Sequence[Hashable], hyp: Sequence[Hashable]) -> Counts:
    """Edit counts of the best alignment, without building it.

    >>> count_edits("今日は晴れ", "今日晴れた")
    Counts(sub=0, dele=1, ins=1, ref=5)
    """
    scale = len(ref) + len(hyp) + 1
    # one edit costs `scale`, a substitution one more: the total holds both numbers, edits first
    total = Levenshtein.distance(ref, hyp, weights=(scale, scale, scale + 1))
    edits, sub = divmod(total, scale)
    surplus = len(ref) - len(hyp)
    dele = (edits - sub + surplus) // 2
    return Counts(sub, dele, edits - sub - dele, len(ref))


def sclite_counts(ref: Sequence[Hashable], hyp: Sequence[Hashable]) -> Counts:
    """Edit counts of the alignment that sclite chooses: weights 4 for a substitution, 3 for the others.

    Its total can exceed `count_edits` by one in some ten thousand tokens (SCTK, doc/sclite.htm).
    """
    scale = 2 * (len(ref) + len(hyp)) + 1
    total = Levenshtein.distance(ref, hyp, weights=(3 * scale + 1, 3 * scale + 1, 4 * scale + 1))
    weighted, edits = divmod(total, scale)
    sub = weighted - 3 * edits
    dele = (edits - sub + len(ref) - len(hyp)) // 2
    return Counts(sub, dele, edits - sub - dele, len(ref))


def sum_counts(counts: Iterable[Counts]) -> Counts:
    """Counts of all utterances together."""
    total = Counts()
    for one in counts:
        total += one
    return total


def align(ref: Sequence[Hashable], hyp: Sequence[Hashable], pairs: Sequence[Pair] = ()) -> list[Step]:
    """The best alignment as stretches that cover both sequences in order.

    Fewest edits first, then fewest substitutions, then the least text in forgiven pairs.
    """
    if not pairs:
        steps = [_from_opcode(op) for op in Levenshtein.opcodes(ref, hyp)]
        if counts_of(steps) == count_edits(ref, hyp):
            return steps
    head, tail = _common_ends(ref, hyp, pairs)
    ids: dict[Hashable, int] = {}
    ref_ids, hyp_ids = (
        np.array(
            [ids.setdefault(token, len(ids)) for token in tokens[head : len(tokens) - tail]],
            dtype=np.int64,
        )
        for tokens in (ref, hyp)
    )
    inner = [Pair(p.ref_start - head, p.ref_end - head, p.hyp_start - head, p.hyp_end - head) for p in pairs]
    steps = _trace(*_fill(ref_ids, hyp_ids, inner), ref_ids, hyp_ids)
    return _with_ends(steps, head, tail)


def counts_of(steps: Iterable[Step]) -> Counts:
    """Edit counts of an alignment; forgiven pairs cost nothing."""
    lengths = dict.fromkeys(("equal", "sub", "del", "ins", "alike"), 0)
    num_ref = 0
    for step in steps:
        num_ref += step.ref_end - step.ref_start
        lengths[step.kind] += (step.hyp_end - step.hyp_start) if step.kind == "ins" else step.ref_end - step.ref_start
    return Counts(lengths["sub"], lengths["del"], lengths["ins"], num_ref)


_KIND_OF_TAG: dict[str, Kind] = {
    "equal": "equal",
    "replace": "sub",
    "delete": "del",
    "insert": "ins",
}
_SUB, _DEL, _INS, _JUMP = range(4)


def _from_opcode(op: Any) -> Step:
    """Rapidfuzz's opcode as a step."""
    return Step(_KIND_OF_TAG[op.tag], op.src_start, op.src_end, op.dest_start, op.dest_end)


def _common_ends(ref: Sequence[Hashable], hyp: Sequence[Hashable], pairs: Sequence[Pair]) -> tuple[int, int]:
    """Tokens at the start and at the end that are the same and in no pair; leaving them out changes no cost."""
    shorter = min(len(ref), len(hyp))
    head_limit = min([shorter, *(min(p.ref_start, p.hyp_start) for p in pairs)])
    head = next((at for at in range(head_limit) if ref[at] != hyp[at]), head_limit)
    room = shorter - head
    tail_limit = min([room, *(min(len(ref) - p.ref_end, len(hyp) - p.hyp_end) for p in pairs)])
    tail = next((at for at in range(tail_limit) if ref[-1 - at] != hyp[-1 - at]), tail_limit)
    return head, tail


def _fill(
    ref: NDArray[np.int64], hyp: NDArray[np.int64], pairs: Sequence[Pair]
) -> tuple[list[NDArray[np.int8]], dict[tuple[int, int], Pair]]:
    """Dynamic programme: the last move into every cell, and the pair that a jump took.

    A cost holds three numbers by weight: edits, substitutions, length of forgiven text. Rows are vectors; within a
    row the chain of insertions is a running minimum after the ramp of their costs is taken off.
    """
    scale = 2 * (len(ref) + len(hyp)) + 1
    edit = scale * scale
    ramp = edit * np.arange(len(hyp) + 1, dtype=np.int64)
    by_end: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_end[pair.ref_end].append(pair)
    rows, jumps = [ramp], {}
    moves = [np.full(len(hyp) + 1, _INS, dtype=np.int8)]
    for at in range(1, len(ref) + 1):
        last = rows[-1]
        row = last + edit
        diagonal = last[:-1] + np.where(hyp == ref[at - 1], 0, edit + scale)
        move = np.full(len(hyp) + 1, _DEL, dtype=np.int8)
        move[1:][diagonal <= row[1:]] = _SUB
        np.minimum(row[1:], diagonal, out=row[1:])
        for pair in by_end.get(at, ()):
            cost = rows[pair.ref_start][pair.hyp_start] + _span_length(pair)
            if cost < row[pair.hyp_end]:
                row[pair.hyp_end], move[pair.hyp_end] = cost, _JUMP
                jumps[at, pair.hyp_end] = pair
        chained = np.minimum.accumulate(row - ramp) + ramp
        move[chained < row] = _INS
        rows.append(chained)
        moves.append(move)
    return moves, jumps


def _span_length(pair: Pair) -> int:
    """Tokens on both sides of a pair."""
    return pair.ref_end - pair.ref_start + pair.hyp_end - pair.hyp_start


def _trace(
    moves: list[NDArray[np.int8]],
    jumps: dict[tuple[int, int], Pair],
    ref: NDArray[np.int64],
    hyp: NDArray[np.int64],
) -> list[Step]:
    """The path through the moves, from the end to the start and turned round."""
    steps: list[Step] = []
    at_ref, at_hyp = len(ref), len(hyp)
    while at_ref or at_hyp:
        move = int(moves[at_ref][at_hyp])
        if move == _JUMP:
            pair = jumps[at_ref, at_hyp]
            steps.append(Step("alike", pair.ref_start, at_ref, pair.hyp_start, at_hyp))
            at_ref, at_hyp = pair.ref_start, pair.hyp_start
            continue
        from_ref, from_hyp = at_ref - (move != _INS), at_hyp - (move != _DEL)
        kind: Kind = "ins" if move == _INS else "del"
        if move == _SUB:
            kind = "equal" if ref[from_ref] == hyp[from_hyp] else "sub"
        steps.append(Step(kind, from_ref, at_ref, from_hyp, at_hyp))
        at_ref, at_hyp = from_ref, from_hyp
    return steps[::-1]


def _with_ends(steps: Iterable[Step], head: int, tail: int) -> list[Step]:
    """Steps shifted behind the common start, the common ends added, equal neighbours merged."""
    merged = [Step("equal", 0, head, 0, head)] if head else []
    for step in steps:
        _append(
            merged,
            Step(
                step.kind,
                step.ref_start + head,
                step.ref_end + head,
                step.hyp_start + head,
                step.hyp_end + head,
            ),
        )
    if tail:
        at_ref, at_hyp = (merged[-1].ref_end, merged[-1].hyp_end) if merged else (0, 0)
        _append(merged, Step("equal", at_ref, at_ref + tail, at_hyp, at_hyp + tail))
    return merged


def _append(steps: list[Step], step: Step) -> None:
    """Add a step, joined to the last one where both are of one kind; forgiven pairs stay apart."""
    if steps and steps[-1].kind == step.kind != "alike":
        last = steps.pop()
        step = Step(step.kind, last.ref_start, step.ref_end, last.hyp_start, step.hyp_end)
    steps.append(step)

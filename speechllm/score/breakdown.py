"""Where the errors of a set are: by cause, by utterance length, the commonest confusions and forgiven pairs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from speechllm.score.causes import CAUSES, Forgiven, regions
from speechllm.score.errors import sum_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from speechllm.score.utterance import UttScore

LENGTH_EDGES = (0, 10, 20, 30, 40, 60, 100)
"""Reference lengths in characters at which a bin begins, after its lower end: 1 to 10, 11 to 20, and so on."""
TOP_CONFUSIONS = 50


def breakdown(scores: Sequence[UttScore]) -> dict[str, Any]:
    """Everything that score.json says beside the rates."""
    return {
        "causes": by_cause(scores),
        "lengths": by_length(scores),
        "confusions": [
            {"ref": ref, "hyp": hyp, "count": count} for (ref, hyp), count in confusions(scores)[:TOP_CONFUSIONS]
        ],
        "forgiven": [
            {"ref": pair.ref, "hyp": pair.hyp, "cause": pair.cause, "count": count}
            for pair, count in forgiven(scores)[:TOP_CONFUSIONS]
        ],
    }


def by_cause(scores: Sequence[UttScore]) -> dict[str, dict[str, float]]:
    """Edits, their share of all, and utterances concerned, for each cause that occurs; edits add up to ``cer``'s."""
    edits: Counter[str] = Counter()
    utterances: Counter[str] = Counter()
    for score in scores:
        if score.leniency:
            edits += score.leniency.causes
            utterances.update(score.leniency.causes.keys())
    total = max(1, edits.total())
    return {
        cause: {
            "edits": edits[cause],
            "share": edits[cause] / total,
            "utterances": utterances[cause],
        }
        for cause in CAUSES
        if edits[cause]
    }


def by_length(scores: Sequence[UttScore]) -> list[dict[str, Any]]:
    """Utterances, characters and edits by reference length; bins without utterances are left out."""
    bins: dict[int, list[UttScore]] = {}
    for score in scores:
        edge = max((edge for edge in LENGTH_EDGES if edge < len(score.ref_norm)), default=-1)
        bins.setdefault(edge, []).append(score)
    rows = []
    for edge, members in sorted(bins.items()):
        longer = [one for one in LENGTH_EDGES if one > edge]
        row: dict[str, Any] = {"from": edge + 1, "to": longer[0] if longer else None, "num_utts": len(members)}
        for metric in ("cer", "cer_lenient"):
            if metric in members[0].counts:
                total = sum_counts(one.counts[metric] for one in members)
                row[metric] = {"edits": total.edits, "ref": total.ref}
        rows.append(row)
    return rows


def confusions(scores: Sequence[UttScore]) -> list[tuple[tuple[str, str], int]]:
    """Differing stretches that were not forgiven, reference and hypothesis text, commonest first."""
    pairs = Counter(
        (
            score.ref_norm[region[0].ref_start : region[-1].ref_end],
            score.hyp_norm[region[0].hyp_start : region[-1].hyp_end],
        )
        for score in scores
        for region in regions(score.shown_steps)
    )
    return sorted(pairs.items(), key=lambda item: (-item[1], item[0]))


def forgiven(scores: Sequence[UttScore]) -> list[tuple[Forgiven, int]]:
    """Pairs that the lenient score forgave, commonest first."""
    pairs = Counter(pair for score in scores if score.leniency for pair in score.leniency.forgiven)
    return sorted(pairs.items(), key=lambda item: (-item[1], item[0].ref, item[0].hyp))

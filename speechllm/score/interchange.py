"""Files that other programs read: sclite's trn, its Sum/Avg block, alignments one JSON object a line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from speechllm.score.causes import main_cause
from speechllm.score.errors import sclite_counts, sum_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from speechllm.score.causes import Forgiven
    from speechllm.score.errors import Counts
    from speechllm.score.utterance import UttScore

_SCLITE_SYNTAX = frozenset("(){}/;@*<>#\\")
"""ASCII characters that a trn file could mean something by; written by code point."""


def trn_lines(texts: Sequence[tuple[str, str]]) -> str:
    """A trn file of (id, normalised text): characters apart by blanks, then the id in parentheses.

    A blank is ``<space>`` as in ESPnet; a character of sclite's own syntax is written by its code point, the same
    on both sides, so that counts do not change (SCTK, doc/infmts.htm).
    """
    return "".join(f"{' '.join(map(_trn_token, text))} ({utt_id})\n" for utt_id, text in texts)


def _trn_token(char: str) -> str:
    """A character as one trn token."""
    if char == " ":
        return "<space>"
    return f"<U+{ord(char):04X}>" if char in _SCLITE_SYNTAX or not char.isprintable() else char


def sclite_total(scores: Sequence[UttScore]) -> dict[str, int]:
    """Character counts of a set as sclite's own alignment gives them."""
    total = sum_counts(sclite_counts(one.ref_norm, one.hyp_norm) for one in scores)
    return counts_record(total)


def sum_avg_block(scores: Sequence[UttScore], title: str) -> str:
    """Sclite's summary table of the characters, one Sum/Avg row, for scripts that grep it.

    Counts are `sclite_total`'s, so that the row is the one that sclite prints for ref.trn and hyp.trn.
    """
    total = sclite_total(scores)
    wrong = sum(one.ref_norm != one.hyp_norm for one in scores)
    num_ref = max(1, total["ref"])
    edits = total["sub"] + total["del"] + total["ins"]
    right = total["ref"] - total["sub"] - total["del"]
    shares = [100 * part / num_ref for part in (right, total["sub"], total["del"], total["ins"], edits)]
    shares.append(100 * wrong / max(1, len(scores)))
    heads = ("Corr", "Sub", "Del", "Ins", "Err", "S.Err")
    rows = [
        f"| SPKR    | {'# Snt':>7} {'# Wrd':>8} | {' '.join(f'{head:>6}' for head in heads)} |",
        f"| Sum/Avg | {len(scores):>7} {total['ref']:>8} | {' '.join(f'{share:6.1f}' for share in shares)} |",
    ]
    rule = "-" * (len(rows[0]) - 2)
    middle = "".join("+" if char == "|" else "-" for char in rows[0][1:-1])
    return "\n".join([f"SYSTEM {title}", f",{rule}.", rows[0], f"|{middle}|", rows[1], f"`{rule}'", ""])


def counts_record(counts: Counts) -> dict[str, int]:
    """Counts as JSON files name them."""
    return {"sub": counts.sub, "del": counts.dele, "ins": counts.ins, "ref": counts.ref}


def alignment_line(score: UttScore) -> str:
    """One utterance as a line of alignment.jsonl.

    ``ops`` covers both normalised texts: [kind, reference text, hypothesis text].
    """
    record: dict[str, object] = {
        "id": score.text.utt_id,
        "ref": score.text.ref,
        "hyp": score.text.hyp,
        "missing": score.text.is_missing,
        "ref_norm": score.ref_norm,
        "hyp_norm": score.hyp_norm,
        "ops": [
            [
                step.kind,
                score.ref_norm[step.ref_start : step.ref_end],
                score.hyp_norm[step.hyp_start : step.hyp_end],
            ]
            for step in score.steps
        ],
        "counts": {name: counts_record(one) for name, one in score.counts.items()},
    }
    if score.leniency:
        record["cause"] = main_cause(score.leniency.causes)
        record["causes"] = dict(score.leniency.causes)
        record["forgiven"] = [[one.ref, one.hyp, one.cause] for one in score.leniency.forgiven]
    if score.kana:
        record["kana"] = {"ref": score.kana.ref, "hyp": score.kana.hyp}
    return json.dumps(record, ensure_ascii=False) + "\n"


def forgiven_table(pairs: Sequence[tuple[Forgiven, int]]) -> str:
    """Every forgiven pair with its cause and count, tab-separated, commonest first."""
    rows = [f"{count}\t{pair.cause}\t{pair.ref}\t{pair.hyp}\n" for pair, count in pairs]
    return "".join(["count\tcause\tref\thyp\n", *rows])

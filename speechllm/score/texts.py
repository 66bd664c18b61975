"""The join of references with hypotheses by utterance id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.data.kaldi import byte_order, read_table
from speechllm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SHOWN_IDS = 3


@dataclass(frozen=True, slots=True)
class JoinedText:
    """What one utterance should be and what the system wrote."""

    utt_id: str
    ref: str
    hyp: str
    is_missing: bool = False
    """The hypothesis file has no such line; counted as all deletions."""


def read_joined(ref: Path, hyp: Path, *, missing_as_deletions: bool = False) -> list[JoinedText]:
    """The utterances of two Kaldi ``text`` files, as `join_texts`.

    Raises:
        DataError: a file is at fault (see `read_table`), the reference holds nothing, or the ids do not match.
    """
    refs = read_table(ref)
    if not refs:
        raise DataError(ref, "no utterance in it", "give the reference transcripts of the set")
    return join_texts(refs, read_table(hyp), hyp, missing_as_deletions=missing_as_deletions)


def join_texts(
    refs: Mapping[str, str],
    hyps: Mapping[str, str],
    hyp_name: str | Path,
    *,
    missing_as_deletions: bool = False,
) -> list[JoinedText]:
    """References with their hypotheses, sorted by the bytes of the id.

    Raises:
        DataError: a hypothesis has no reference; or a reference has no hypothesis, unless those count as deletions.
    """
    if unknown := byte_order(hyps.keys() - refs.keys()):
        raise DataError(
            hyp_name,
            f"no reference for {some_ids(unknown)}",
            "score against the reference of the same set",
        )
    missing = refs.keys() - hyps.keys()
    if missing and not missing_as_deletions:
        raise DataError(
            hyp_name,
            f"no hypothesis for {some_ids(byte_order(missing))} of {len(refs)} references",
            "finish decoding, or pass --missing-as-deletions to count them as deleted",
        )
    return [JoinedText(one, refs[one], hyps.get(one, ""), one in missing) for one in byte_order(refs)]


def some_ids(ids: list[str]) -> str:
    """How many utterances, the first few by name."""
    shown = ", ".join(ids[:_SHOWN_IDS]) + (", ..." if len(ids) > _SHOWN_IDS else "")
    return f"{len(ids)} utterance{'s' * (len(ids) != 1)} ({shown})"

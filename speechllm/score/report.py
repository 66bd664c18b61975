"""The error report: one HTML page that opens from disk and needs nothing else; report.html is its template."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from speechllm.data.kaldi import wav_path
from speechllm.score.causes import CAUSES, main_cause

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from speechllm.score.utterance import UttScore

PLACEHOLDER = "/*REPORT_DATA*/null"
_CODES = {"sub": "s", "del": "d", "ins": "i", "alike": "a"}

System = tuple[str, dict[str, Any], "Sequence[UttScore]"]
"""Name, content of score.json, utterances."""


def page(systems: Sequence[System], audio: Mapping[str, str]) -> str:
    """The page for systems that scored the same utterances; ``audio`` is links by utterance id."""
    data = json.dumps(report_data(systems, audio), ensure_ascii=False, separators=(",", ":"))
    # inside a script element only "<" could end the element or open a comment
    template = files("speechllm.score").joinpath("report.html").read_text(encoding="utf-8")
    before, after = template.split(PLACEHOLDER)
    return before + data.replace("<", "\\u003c") + after


def audio_links(wav_scp: Mapping[str, str], out: Path) -> dict[str, str]:
    """Links from a page in ``out`` to audio files, by utterance id.

    Raises:
        DataError: an entry of wav.scp is a command or empty.
    """
    base = out.resolve()
    return {
        utt_id: quote(os.path.relpath(wav_path(f"wav.scp: {utt_id}", value).resolve(), base))
        for utt_id, value in wav_scp.items()
    }


def report_data(systems: Sequence[System], audio: Mapping[str, str]) -> dict[str, Any]:
    """What the page shows, as its script reads it; the keys of utterances are short because there are many."""
    return {
        "causes": CAUSES,
        "systems": [_system(name, result) for name, result, _ in systems],
        "utts": [
            _utterance(members, audio.get(members[0].text.utt_id))
            for members in zip(*(scores for _, _, scores in systems), strict=True)
        ],
    }


def _system(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """One system's figures."""
    kept = (
        "num_utts",
        "num_missing",
        "num_excluded",
        "profile",
        "signature",
        "metrics",
        "breakdown",
    )
    return {"name": name, **{key: result[key] for key in kept}}


def _utterance(members: Sequence[UttScore], link: str | None) -> dict[str, Any]:
    """One utterance: id, reference, its normalised length, audio, reading, and every system's version of it."""
    first = members[0]
    record: dict[str, Any] = {"i": first.text.utt_id, "r": first.text.ref, "n": len(first.ref_norm)}
    if link:
        record["a"] = link
    if first.kana:
        record["k"] = first.kana.ref
    record["s"] = [_version(one) for one in members]
    return record


def _version(score: UttScore) -> dict[str, Any]:
    """One system's version of an utterance: hypothesis, alignment, edits, cause, reading."""
    version: dict[str, Any] = {
        "h": score.text.hyp,
        "o": _compact_steps(score),
        "e": score.counts["cer"].edits,
    }
    if score.leniency:
        version["l"] = score.leniency.counts.edits
        version["c"] = main_cause(score.leniency.causes)
    if score.kana and score.counts["kana_cer"].edits:
        version["k"] = score.kana.hyp
    return version


def _compact_steps(score: UttScore) -> list[Any]:
    """The alignment: a string where both sides are equal, else [code, reference text, hypothesis text]."""
    steps: list[Any] = []
    for step in score.shown_steps:
        ref, hyp = (
            score.ref_norm[step.ref_start : step.ref_end],
            score.hyp_norm[step.hyp_start : step.hyp_end],
        )
        steps.append(ref if step.kind == "equal" else [_CODES[step.kind], ref, hyp])
    return steps

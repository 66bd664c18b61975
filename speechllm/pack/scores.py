"""Score files for the model card: only those of the model that is packed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from speechllm.errors import DataError
from speechllm.runtime import portable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_SCORE_BYTES = 64 << 20
AGAIN = "score again (stage 5)"
SHOWN = {"cer": "CER", "cer_lenient": "CER, spellings alike", "kana_cer": "kana CER", "wer": "WER", "ser": "SER"}
"""Metrics of a score file in the order of the card."""


@dataclass(frozen=True)
class Metric:
    """One figure; rates are fractions."""

    name: str
    value: float
    low: float
    high: float
    signature: str


@dataclass(frozen=True)
class Score:
    """What one score file says."""

    data: str
    """Name of the test set: that of the folder of the score file."""
    num_utts: int
    metrics: tuple[Metric, ...]


def read_score(path: Path, training: Mapping[str, object]) -> Score:
    """Return the figures of a score file.

    `training` is what the packed model says of its training; a score that says otherwise is another model's.

    Raises:
        DataError: it cannot be read, or scores another model.
    """
    content = _content(path)
    run = content.get("made_from", {}).get("run") or {}
    trained = run.get("training") or {}
    if trained and training and _core(trained) != _core(training):
        raise DataError(path, "scores the texts of another model", "give the score file of this one")
    try:
        metrics = [_metric(name, content["metrics"][name]) for name in SHOWN if name in content["metrics"]]
        return Score(path.resolve().parent.name, int(content["num_utts"]), tuple(metrics))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(path, f"is no score file ({type(error).__name__}: {error})", AGAIN) from error


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(path, "no such score file", AGAIN)
    if path.stat().st_size > MAX_SCORE_BYTES:
        raise DataError(path, "is larger than 64 MiB", "give a score.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(path, f"cannot be read as JSON ({error})", AGAIN) from error
    if not isinstance(content, dict):
        raise DataError(path, "does not hold a JSON object", AGAIN)
    return content


def _core(training: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in portable(training).items() if key != "packed"}


def _metric(name: str, entry: Mapping[str, Any]) -> Metric:
    low, high = entry["ci95"]
    return Metric(name, float(entry["value"]), float(low), float(high), str(entry["signature"]))

"""Score files for the model card: only those of the model that is packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.errors import DataError
from speechllm.runtime import portable
from speechllm.score.record import Rate, read_score_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SHOWN = {"cer": "CER", "cer_lenient": "CER, spellings alike", "kana_cer": "kana CER", "wer": "WER", "ser": "SER"}
"""Metrics of a score file in the order of the card."""


@dataclass(frozen=True)
class Score:
    """What one score file says."""

    data: str
    """Name of the test set: that of the folder of the score file."""
    num_utts: int
    rates: Mapping[str, Rate]
    """Those that the card shows, in its order."""


def read_score(path: Path, training: Mapping[str, object]) -> Score:
    """Return the figures of a score file.

    `training` is what the packed model says of its training; a score that says otherwise is another model's.

    Raises:
        DataError: it cannot be read, or scores another model.
    """
    found = read_score_file(path)
    trained = found.made_from.run.training.as_record()
    if trained and training and _core(trained) != _core(training):
        raise DataError(path, "scores the texts of another model", "give the score file of this one")
    rates = {name: found.metrics[name] for name in SHOWN if name in found.metrics}
    return Score(path.resolve().parent.name, found.num_utts, rates)


def _core(training: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in portable(training).items() if key != "packed"}

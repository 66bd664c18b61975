"""What is read from a score file by the results table and the model card; whatever else it holds is passed over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from speechllm.errors import DataError, first_of

if TYPE_CHECKING:
    from pathlib import Path

MAX_SCORE_BYTES = 64 << 20
AGAIN = "score again (stage 5)"


class _Part(BaseModel):
    """A part of a score file."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Rate(_Part):
    """One metric: rates are fractions."""

    value: float
    ci95: tuple[float, float]
    signature: str = ""


class Group(_Part):
    """The rates of one group of utterances."""

    metrics: dict[str, Rate] = {}


class Training(_Part):
    """How a model was trained; what the fields do not name is kept, for it tells one training from another."""

    model_config = ConfigDict(extra="allow")

    trainable: int | None = None
    minutes: float | None = None
    trained_on: dict[str, str | int | float] = {}

    def as_record(self) -> dict[str, Any]:
        """Return all that the file says."""
        return self.model_dump(exclude_unset=True)


class Weights(_Part):
    """The weights of a model that was not trained here."""

    fingerprint: str
    source: str | None = None


class Run(_Part):
    """How the hypotheses came about, as far as their folder says."""

    training: Training = Training()
    model: Weights | None = None
    weights: dict[str, str] = {}
    versions: dict[str, str] = {}
    source: str | None = None
    hypotheses: str | None = None
    data: str | None = None
    commit: str | None = None
    device: str | None = None


class MadeFrom(_Part):
    """What was scored, by its SHA-256 sums."""

    ref_sha256: str
    hyp_sha256: str
    run: Run = Run()


class ScoreFile(_Part):
    """What ``score.json`` says; rates by the name of their metric."""

    signature: str
    num_utts: int
    metrics: dict[str, Rate]
    groups: dict[str, Group] = {}
    made_from: MadeFrom


def read_score_file(path: Path) -> ScoreFile:
    """Return what a score file says.

    Raises:
        DataError: there is none, or it is none that stage 5 writes.
    """
    if not path.is_file():
        raise DataError(path, "no such score file", AGAIN)
    if path.stat().st_size > MAX_SCORE_BYTES:
        raise DataError(path, "is larger than 64 MiB", "give a score.json")
    try:
        found = ScoreFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(path, f"is no score file of ours ({first_of(error)})", AGAIN) from error
    if "cer" not in found.metrics:
        raise DataError(path, "is no score file of ours (metrics: cer is not there)", AGAIN)
    return found

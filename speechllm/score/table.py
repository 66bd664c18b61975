"""The results table: Markdown from a description in YAML and from score files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from speechllm.config.load import read_yaml
from speechllm.errors import ConfigError, DataError
from speechllm.runtime import write_text

METRICS = {"cer": "CER %", "wer": "WER %"}


class Row(BaseModel):
    """One system."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    score: Path
    """Its score.json, from the recipe's folder."""
    exp: Path | None = None
    """Our experiment folder, for what training took."""
    command: str
    """What makes the score file."""
    note: str = ""


class Table(BaseModel):
    """A table of systems, all scored on one set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    about: str
    """A paragraph below the title."""
    rows: Annotated[list[Row], Field(min_length=1)]


def write_table(path: Path, out: Path) -> str:
    """Write the table that `path` describes to `out`, and return it.

    Raises:
        ConfigError: the description is wrong.
        DataError: a score file is broken or older than its hypotheses.
    """
    try:
        table = Table.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(path, f"{where}: {first['msg']}", "mend the table's description") from error
    scores = {row.name: _read_score(row) for row in table.rows}
    text = _markdown(table, scores)
    write_text(out, text)
    return text


def _read_score(row: Row) -> dict[str, Any] | None:
    """Return the content of a row's score file, None where the row was not run."""
    if not row.score.is_file():
        return None
    hypotheses = row.score.parent / "text"
    if hypotheses.is_file() and hypotheses.stat().st_mtime > row.score.stat().st_mtime:
        raise DataError(row.score, f"is older than the hypotheses of row {row.name}", "run stage 5 again")
    try:
        content: dict[str, Any] = json.loads(row.score.read_text(encoding="utf-8"))
        _ = content["metrics"]["cer"]["value"], content["signature"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(row.score, f"is no score file of ours ({error!r})", "run stage 5 again") from error
    return content


def _markdown(table: Table, scores: dict[str, dict[str, Any] | None]) -> str:
    groups = sorted({name for score in scores.values() if score for name in score.get("groups", {})})
    head = [
        "system",
        "trained",
        *METRICS.values(),
        *(f"CER %, {name}" for name in groups),
        "utterances",
    ]
    lines = [f"# {table.title}", "", table.about.strip(), "", _row(head), _row(["---"] * len(head))]
    for row in table.rows:
        score = scores[row.name]
        if score is None:
            lines.append(_row([row.name, "", f"not run: `{row.command}`", *[""] * (len(head) - 3)]))
            continue
        shown = [_metric(score["metrics"].get(name)) for name in METRICS]
        shown += [_metric(score.get("groups", {}).get(name, {}).get("metrics", {}).get("cer")) for name in groups]
        lines.append(_row([row.name, _trained(row), *shown, str(score["num_utts"])]))
    lines += ["", "In brackets: 95 % interval (utterance bootstrap).", ""]
    lines += [f"* {row.name}: {row.note}" for row in table.rows if row.note]
    for signature in sorted({score["signature"] for score in scores.values() if score}):
        lines.append(f"* signature: `{signature}`")
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _metric(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return ""
    low, high = metric["ci95"]
    return f"{100 * metric['value']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _trained(row: Row) -> str:
    """Return trainable parameters and minutes of one of our runs."""
    if row.exp is None or not (row.exp / "provenance.json").is_file():
        return "no"
    content = json.loads((row.exp / "provenance.json").read_text(encoding="utf-8"))
    return f"{content['trainable'] / 1e6:.1f}M, {content['minutes']:.0f} min"

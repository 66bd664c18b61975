"""The results table: Markdown and LaTeX from a description in YAML and from score files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from speechllm.config.load import read_yaml
from speechllm.errors import ConfigError, DataError, first_of
from speechllm.runtime import sha256, write_text
from speechllm.score.layout import Grid, as_latex, as_markdown
from speechllm.score.record import AGAIN, read_score_file
from speechllm.score.signature import made_by, tool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from speechllm.score.record import Rate, ScoreFile

METRICS = {"cer": "CER %", "wer": "WER %"}
SEED = "{seed}"


class Published(BaseModel):
    """What was published of a system."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cer: Annotated[float, Field(ge=0, le=10)] | None = None
    """Fraction, as score files have it."""
    wer: Annotated[float, Field(ge=0, le=10)] | None = None
    """Fraction."""
    trainable: str = ""
    """As written there."""
    source: str


class Row(BaseModel):
    """One system."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    score: Path
    """Its score.json, from the recipe's folder; ``{seed}`` stands for the seed where there are several."""
    command: str
    """What makes the score file."""
    kept: Path | None = None
    """A score file in the repository, shown where the row was not run here."""
    conf: Path | None = None
    """Its configuration, for one of our systems."""
    model: str | None = None
    """Its checkpoint, for a Whisper that was trained whole."""
    seeds: tuple[int, ...] = (1,)
    """One line of the table each."""
    published: Published | None = None
    note: str = ""

    @model_validator(mode="after")
    def _each_seed_has_its_score(self) -> Row:
        if len(self.seeds) > 1 and (SEED not in str(self.score) or self.kept is not None):
            raise ValueError("several seeds need {seed} in score, and none can be kept")
        return self


class Table(BaseModel):
    """A table of systems, all scored on one set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    about: str
    """A paragraph below the title."""
    rows: Annotated[list[Row], Field(min_length=1)]


@dataclass(frozen=True)
class Entry:
    """A line of the table: a row with one seed, and its score where there is one."""

    name: str
    row: Row
    command: str
    score: ScoreFile | None
    kept: bool
    """Whether the score is the one in the repository."""


def recipe_of(path: Path) -> Path:
    """Return the folder that the paths of a table start from: a table lies in ``tables/`` of its recipe."""
    return path.resolve().parent.parent


def read_table(path: Path) -> Table:
    """Return a table's description, its paths made whole.

    Raises:
        ConfigError: it is wrong; the key is named.
    """
    try:
        table = Table.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(path, first_of(error), "mend the table's description") from error
    recipe = recipe_of(path)
    rows = [
        row.model_copy(
            update={name: recipe / value for name in ("score", "kept", "conf") if (value := getattr(row, name))}
        )
        for row in table.rows
    ]
    return table.model_copy(update={"rows": rows})


def write_table(paths: Sequence[Path], out: Path) -> str:
    """Write the tables that `paths` describe to `out`, and beside it as LaTeX; return the Markdown.

    Raises:
        ConfigError: a description is wrong.
        DataError: a score file is broken, older than its hypotheses, or made by another version of the scorer.
    """
    made = {out.resolve(), out.with_suffix(".tex").resolve()}
    if own := next((path for path in paths if path.resolve() in made), None):
        raise ConfigError(own, "describes the table that would be written over it", "name another --out")
    grids = [_grid(read_table(path)) for path in paths]
    text = "\n".join(map(as_markdown, grids))
    write_text(out.with_suffix(".tex"), "\n".join(map(as_latex, grids)))
    write_text(out, text)
    return text


def _entries(row: Row) -> list[Entry]:
    """Return a row's lines: one for each seed."""
    entries = []
    for seed in row.seeds:
        place = Path(str(row.score).replace(SEED, str(seed)))
        name = row.name if len(row.seeds) == 1 else f"{row.name}, seed {seed}"
        score, kept = _read_score(place, name), False
        if score is None and row.kept is not None:
            score, kept = _read_score(row.kept, name), True
        entries.append(Entry(name, row, row.command.replace(SEED, str(seed)), score, kept and score is not None))
    return entries


def _read_score(path: Path, name: str) -> ScoreFile | None:
    """Return what a score file says, None where there is none."""
    if not path.is_file():
        return None
    found = read_score_file(path)
    if (scorer := made_by(found.signature)) != tool():
        raise DataError(path, f"of row {name} was made by {scorer}, this is {tool()}", AGAIN)
    beside = path.parent / "text"
    if beside.is_file() and sha256(beside) != found.made_from.hyp_sha256:
        raise DataError(path, f"is older than the hypotheses of row {name}", AGAIN)
    return found


def _grid(table: Table) -> Grid:
    entries = [entry for row in table.rows for entry in _entries(row)]
    groups = sorted({name for entry in entries if entry.score for name in entry.score.groups})
    published = any(row.published for row in table.rows)
    head = ["system", "trained"]
    for title in METRICS.values():
        head += [f"{title} published", title] if published else [title]
    head += [*(f"CER %, {name}" for name in groups), "utterances"]
    rows = [_cells(entry, groups, published=published) for entry in entries]
    return Grid(table.title, table.about.strip(), head, rows, _notes(table, entries))


def _cells(entry: Entry, groups: Sequence[str], *, published: bool) -> list[str]:
    """Return the cells of a line; where there was no run, the first measured one names the command."""
    score = entry.score
    measured = {name: _rate(score.metrics.get(name) if score else None) for name in METRICS}
    if score is None:
        measured["cer"] = f"not run: `{entry.command}`"
    cells = [entry.name, _trained(entry)]
    for name, shown in measured.items():
        if published:
            value = getattr(entry.row.published, name, None)
            cells.append("" if value is None else f"{100 * value:.1f}")
        cells.append(shown)
    found = score.groups if score else {}
    cells += [_rate(found[name].metrics.get("cer") if name in found else None) for name in groups]
    return [*cells, str(score.num_utts) if score else ""]


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return ""
    low, high = rate.ci95
    return f"{100 * rate.value:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _trained(entry: Entry) -> str:
    """Return trainable parameters and time of a run of ours, or the published number of parameters."""
    training = entry.score.made_from.run.training if entry.score else None
    if training is None or training.trainable is None or training.minutes is None:
        return entry.row.published.trainable if entry.row.published else ""
    minutes = training.minutes
    took = f"{minutes / 60:.1f} h" if minutes > 120 else f"{minutes:.0f} min"  # noqa: PLR2004 - two hours
    return f"{training.trainable / 1e6:.1f}M, {took}"


def _notes(table: Table, entries: Sequence[Entry]) -> list[str]:
    """Return what is written below the table: notes, origins, and how the numbers came about."""
    notes = ["In brackets: 95 % interval (utterance bootstrap)."]
    notes += [f"{row.name}: {row.note}" for row in table.rows if row.note]
    sources: dict[str, list[str]] = {}
    for row in table.rows:
        if row.published:
            sources.setdefault(row.published.source, []).append(row.name)
    notes += [f"published figures of {'; '.join(names)}: {source}" for source, names in sources.items()]
    notes += [f"{entry.name}: {_origin(entry)}" for entry in entries if entry.score]
    signatures = {entry.score.signature: None for entry in entries if entry.score}
    return notes + [f"signature: `{signature}`" for signature in signatures]


def _origin(entry: Entry) -> str:
    """Return what was run on what, as far as the score file knows."""
    assert entry.score is not None
    made_from, run = entry.score.made_from, entry.score.made_from.run
    parts = ["score in the repository" if entry.kept else "run here"]
    parts += [f"{name} {value}" for name, value in run.training.trained_on.items()]
    parts += [
        f"{name} {value}"
        for name in ("source", "hypotheses", "data", "commit", "device")
        if (value := getattr(run, name))
    ]
    if run.model:
        parts.append(f"weights {run.model.fingerprint}" + (f" ({run.model.source})" if run.model.source else ""))
    parts += [f"{name} weights {value}" for name, value in run.weights.items()]
    versions = {} if run.hypotheses else run.versions  # what made others' texts is not known
    parts += [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    return ", ".join([*parts, f"references {made_from.ref_sha256[:12]}"])

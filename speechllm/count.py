"""Counts parameters part by part, without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speechllm.config import load as configs
from speechllm.errors import ConfigError
from speechllm.model.shapes import skeleton, trained, whole_skeleton
from speechllm.score.table import read_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from speechllm.config.schema import Config

PARTS = ("encoder", "projector", "lora", "llm")
COLUMNS = ("row", *PARTS, "trainable", "total", "published")


def count_config(config: Config) -> dict[str, int]:
    """Return the parameters of each part of a configuration, those that are trained, and all."""
    parts = skeleton(config).counts()
    return {**parts, "trainable": trained(config, parts), "total": sum(parts.values())}


def count_conf(conf: Path) -> list[dict[str, object]]:
    """Return one record: that of a configuration."""
    return [{"row": conf.stem, **count_config(configs.load(conf))}]


def count_table(path: Path) -> list[dict[str, object]]:
    """Return a record for each row of a table: our configurations, and models trained whole; None where not known.

    Raises:
        ConfigError: no row names a configuration or a model.
    """
    records: list[dict[str, object]] = []
    for row in read_table(path).rows:
        published = {"published": row.published.trainable} if row.published else {}
        if row.conf is not None:
            records.append({"row": row.name, **count_config(configs.load(row.conf)), **published})
        elif row.model is not None:
            parts = whole_skeleton(row.model)
            whole = sum(parts.values())
            records.append({"row": row.name, **parts, "trainable": whole, "total": whole, **published})
        else:
            unknown = dict.fromkeys((*PARTS, "trainable", "total"))
            records.append({"row": row.name, **unknown, **published})
    if all(record["total"] is None for record in records):
        raise ConfigError(path, "no row names a configuration or a model", "add conf: or model: to its rows")
    return records


def as_text(records: Sequence[dict[str, object]]) -> str:
    """Return records as a table for the terminal, columns aligned."""
    shown = [COLUMNS, *([_cell(record.get(column)) for column in COLUMNS] for record in records)]
    widths = [max(len(row[n]) for row in shown) for n in range(len(COLUMNS))]
    lines = []
    for first, *rest in shown:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)

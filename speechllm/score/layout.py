"""How a table is set: Markdown for the reader on the web, LaTeX for the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LATEX_SPECIAL = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
}


@dataclass(frozen=True)
class Grid:
    """A table and the texts around it."""

    title: str
    about: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def as_markdown(grid: Grid) -> str:
    """Return the table as Markdown."""
    parts = [f"# {grid.title}", "", grid.about, "", _bars(grid.head), _bars(["---"] * len(grid.head))]
    parts += [*map(_bars, grid.rows), "", *(f"* {note}" for note in grid.notes)]
    return "\n".join(parts) + "\n"


def _bars(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def as_latex(grid: Grid) -> str:
    """Return the table as a LaTeX ``table`` with booktabs' rules; the notes stand as comments before it."""
    columns = "l" + "r" * (len(grid.head) - 1)
    rows = [" & ".join(map(_escaped, row)) + r" \\" for row in grid.rows]
    parts = [
        *(f"% {note}" for note in grid.notes),
        r"\begin{table}",
        rf"\caption{{{_escaped(grid.title)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(_escaped, grid.head)) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return "".join(LATEX_SPECIAL.get(char, char) for char in text.replace("`", ""))

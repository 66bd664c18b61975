"""What every benchmark shares: timed rounds, the record that is written, and the table that is printed."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import statistics
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from speechllm.runtime import device_name, portable, provenance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    Row = Mapping[str, object]

CPU_INFO = Path("/proc/cpuinfo")
THOUSAND = 1000


class Unequal(Exception):  # noqa: N818 - the fault is ours, and it is shown as one line
    """Two things that were to be compared gave different results: nothing was timed."""


@dataclass(frozen=True)
class Options:
    """What the command line may ask of a benchmark."""

    quick: bool = False
    """Fewer utterances and one round."""
    size: str | None = None
    """Name of the models' size; None takes the benchmark's own."""
    tokens: tuple[int, ...] = ()
    """Budgets of a batch at which ours is looked at closer."""


@dataclass(frozen=True)
class Seconds:
    """What one piece of work took."""

    cpu: float
    """Processor time of this process and of those that it started and that ended meanwhile."""
    wall: float


@dataclass
class Outcome:
    """What a benchmark found."""

    name: str
    settings: dict[str, object]
    differences: dict[str, dict[str, float]]
    """Largest difference of each system's results from the reference's, by kind."""
    ratios: dict[str, float]
    counters: dict[str, dict[str, float]]
    seconds: dict[str, list[Seconds]]
    clock: str
    """Which of a `Seconds` the ratios are of: cpu or wall."""
    machine: dict[str, object]
    closer: list[dict[str, object]] = field(default_factory=list)
    """Ours alone, at several budgets of a batch."""

    def record(self) -> dict[str, object]:
        """Return what is written as JSON; results that are not equal never come so far."""
        return {
            "bench": self.name,
            "equal": True,
            "settings": self.settings,
            "differences": self.differences,
            "ratios": {key: round(value, 3) for key, value in self.ratios.items()},
            "counters": self.counters,
            "seconds": {
                name: {
                    kind: {"median": round(median(rounds, kind), 3), "rounds": [round(one, 3) for one in all_of]}
                    for kind in ("cpu", "wall")
                    if (all_of := [float(vars(one)[kind]) for one in rounds])
                }
                for name, rounds in self.seconds.items()
            },
            "clock": self.clock,
            "machine": self.machine,
            "closer": self.closer,
        }

    def as_text(self) -> str:
        """Return the tables for the terminal."""
        kinds = dict.fromkeys(kind for one in self.differences.values() for kind in one)
        worst = {kind: max(one[kind] for one in self.differences.values() if kind in one) for kind in kinds}
        times: list[Row] = [
            {"system": name, "cpu s": median(rounds, "cpu"), "wall s": median(rounds, "wall")}
            for name, rounds in self.seconds.items()
        ]
        parts = [
            f"bench {self.name}: {_listed(self.settings)}\n",
            f"equal; largest differences: {_listed(worst)}\n",
            table(times),
            f"ratios of {self.clock} seconds, over 1 means ours is faster: {_listed(self.ratios)}\n",
            table([{"system": name, **counted} for name, counted in self.counters.items()]),
        ]
        for one in self.closer:
            profile = one.get("profile")
            parts.append(table([{key: value for key, value in one.items() if key != "profile"}]))
            parts += [table(profile)] if isinstance(profile, list) else []
        return "\n".join(parts)


def _listed(values: Row) -> str:
    return ", ".join(f"{key} {shown(value)}" for key, value in values.items())


def median(rounds: Sequence[Seconds], kind: str) -> float:
    """Return the median over the rounds of one kind of seconds."""
    return statistics.median(float(vars(one)[kind]) for one in rounds)


def table(rows: Sequence[Row]) -> str:
    """Return rows below their names, numbers to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([shown(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = []
    for line in cells:
        first = line[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    """Return a number with three digits that count, or all before the point, anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= THOUSAND else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def timed(work: Callable[[], object], device: torch.device) -> Seconds:
    """Return what `work` took, all that it set going on `device` included."""
    gc.collect()
    _wait(device)
    cpu, wall = _cpu_seconds(), time.perf_counter()
    work()
    _wait(device)
    return Seconds(_cpu_seconds() - cpu, time.perf_counter() - wall)


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute with one thread on a CPU: its processor time is work, and not threads that wait for each other."""
    import torch

    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def machine(device: torch.device) -> dict[str, object]:
    """Return what the figures were taken on, when, and from which commit."""
    import torch

    models = {line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")}
    return {
        **portable(provenance()),
        "cpu": ", ".join(sorted(models)) or "unknown",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "device": device_name(device),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cpu_lines() -> list[str]:
    return CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPU_INFO.is_file() else []

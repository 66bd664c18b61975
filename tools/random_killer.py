"""Runs a recipe twice, once undisturbed and once killed at random moments until it completes, and compares the results.

    python tools/random_killer.py                                # conf/debug of the JSUT recipe, at least 30 kills
    python tools/random_killer.py --seed 7 --kills 100

Both runs happen in copies of the tree. A kill is SIGKILL to the whole process group, at a moment drawn within the stage
that is at work; then the same command is given again, from its first stage or from the one that was struck. Printed are
the seed, every kill, the kills by stage, and whether models, texts and scores are equal to the bit (exit 0) or not (1).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).resolve().parents[1]
RECIPE = "egs/jsut/asr1"
BEGINS = re.compile(r"== stage (\d): (\w+) \(")
DIES_S = 30
SURE_KILLS = 4  # of a stage: so many moments lie within the time that it took undisturbed, later ones also behind it
BEYOND = 1.5
AGAIN_FROM_START = 0.15  # share of the kills after which the whole command is given again
IN_FINISHED = 0.3  # share of the finished stages that it passes through that are struck, too
RESULTS = (
    "data/*/text",
    "data/wav/**/*.wav",
    "dump/**/*.ark",
    "dump/**/feats.scp",
    "dump/**/utt2crc",
    "exp/*/metrics.jsonl",
    "exp/*/best.safetensors",
    "exp/*/model/trained.safetensors",
    "exp/*/model/config.yaml",
    "exp/*/decode_*/*/text",
    "exp/*/decode_*/*/nbest.jsonl",
    "exp/*/decode_*/*/ctm",
    "exp/*/decode_*/*/score.json",
    "exp/*/packed/trained.safetensors",
)
"""What is compared, in the recipe's folder; of records and scores all but times and what they were made on."""
OF_THE_RUN = frozenset({"minutes", "memory_gib", "made_from"})


def copy_tree(top: Path, folder: Path) -> Path:
    """Return `folder`, filled with the files of the project, and with this environment."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=top, capture_output=True, check=True).stdout.decode()
    for name in listed.rstrip("\0").split("\0"):
        if (top / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(top / name, folder / name)
    (folder / ".venv").symlink_to(top / ".venv")
    (folder / "tools/setup.sh").write_text("#!/bin/sh\n", encoding="utf-8")  # would install the copy into .venv
    return folder


@dataclass
class Command:
    """A ``run.sh`` at work in a process group of its own; its lines as they come."""

    tree: Path
    options: list[str]
    log: Path

    def __post_init__(self) -> None:
        """Start it."""
        command = [str(self.tree / "run.sh"), *self.options]
        # its own session: what it starts is killed with it. The copy's code is run, whatever is installed
        variables = {**os.environ, "PYTHONPATH": str(self.tree), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, env=variables
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.log.open("ab") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                self.lines.put(line.decode("utf-8", "replace"))
        self.lines.put(None)

    def line(self, until: float | None) -> str | None:
        """Return the next line, None at the end.

        Raises:
            queue.Empty: the time `until` came first.
        """
        return self.lines.get(timeout=None if until is None else max(0.0, until - time.monotonic()))

    def kill(self) -> None:
        """Kill the whole group, and return when none of it is left."""
        deadline = time.monotonic() + DIES_S
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.poll()
                time.sleep(0.02)
        self.process.wait(DIES_S)
        self._reader.join(DIES_S)

    def end(self) -> None:
        """Return when it has ended well.

        Raises:
            SystemExit: it has not.
        """
        if status := self.process.wait():
            shown = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
            sys.exit(f"{shown}\nthe command ended with {status}, see {self.log}")


def undisturbed(tree: Path, options: list[str]) -> dict[int, float]:
    """Run a recipe; return how many seconds each stage took."""
    command = Command(tree, options, tree / "log")
    began: dict[int, float] = {}
    while (line := command.line(None)) is not None:
        if match := BEGINS.match(line):
            began[int(match[1])] = time.monotonic()
    command.end()
    ends = [*began.values(), time.monotonic()][1:]
    return {stage: end - began[stage] for stage, end in zip(began, ends, strict=True)}


@dataclass
class Killer:
    """Runs a recipe to its end through `least` kills, as far as one run takes them."""

    rng: random.Random
    took_s: dict[int, float]
    least: int
    kills: Counter[int] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)

    def run(self, tree: Path, options: list[str]) -> None:
        """Kill a recipe until it completes."""
        reached = 1
        while True:
            first = 1 if self.rng.random() < AGAIN_FROM_START else reached
            command = Command(tree, [*options, "--stage", str(first)], tree / "log")
            stage = self._watch(command, reached)
            if stage is None:
                command.end()
                return
            self.kills[stage] += 1
            reached = max(reached, stage)
            print(f"kill {self.kills.total():3} in stage {stage} {self.names[stage]}", flush=True)

    def _watch(self, command: Command, reached: int) -> int | None:
        """Return the stage in which the command was killed, or None where it ended by itself."""
        stage, until = 0, None
        while True:
            try:
                line = command.line(until)
            except queue.Empty:
                if command.process.poll() is not None:  # it ended just now, well or not
                    return None
                command.kill()
                return stage
            if line is None:
                return None
            if match := BEGINS.match(line):
                stage, self.names[int(match[1])] = int(match[1]), match[2]
                until = self._moment(stage, is_finished=stage < reached)
                reached = max(reached, stage)

    def _moment(self, stage: int, *, is_finished: bool) -> float | None:
        """Return when a stage that begins now is struck, if it is still at work then; None for never."""
        if self.kills.total() >= 2 * self.least or (is_finished and self.rng.random() > IN_FINISHED):
            return None
        beyond = 1.0 if is_finished or self.kills[stage] < SURE_KILLS else BEYOND
        return time.monotonic() + self.rng.uniform(0, beyond * self.took_s[stage])


def results(recipe: Path) -> dict[str, object]:
    """Return what must be the same of two runs, by name."""
    found: dict[str, object] = {}
    for pattern in RESULTS:
        for path in sorted(recipe.glob(pattern)):
            text = path.suffix in {".json", ".jsonl"}
            found[str(path.relative_to(recipe))] = list(_records(path)) if text else path.read_bytes()
    return found


def _records(path: Path) -> Iterator[dict[str, object]]:
    """Yield the records of a file without times."""
    text = path.read_text(encoding="utf-8")
    for part in text.rstrip("\n").split("\n") if path.suffix == ".jsonl" else [text]:
        yield {key: value for key, value in json.loads(part).items() if key not in OF_THE_RUN}


def differing(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Return the names of what is not the same."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def main() -> int:
    """Return 0 where the killed runs end as the undisturbed one does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conf", default="debug")
    parser.add_argument("--kills", type=int, default=30, help="fewest kills; the killed run is repeated until then")
    parser.add_argument("--stop-stage", type=int, default=6)
    parser.add_argument("--seed", type=int, help="of the moments; drawn where none is given")
    parser.add_argument("--tree", type=Path, default=TOP, help="of which copies are made")
    parser.add_argument("--work", type=Path, help="folder for the copies, kept; a temporary one is removed")
    given = parser.parse_args()
    if given.kills < 1:
        parser.error("--kills must be at least 1")
    seed = secrets.randbelow(1 << 31) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="random-killer-") as temporary:
        return _compare(given.work or Path(temporary), seed, given)


def _compare(work: Path, seed: int, given: argparse.Namespace) -> int:
    options = ["--conf", given.conf, "--stop-stage", str(given.stop_stage)]
    whole = copy_tree(given.tree, work / "undisturbed")
    took_s = undisturbed(whole, options)
    print("undisturbed, seconds by stage:", {stage: round(seconds, 1) for stage, seconds in took_s.items()}, flush=True)
    wanted = results(whole / RECIPE)
    killer = Killer(random.Random(seed), took_s, given.kills)  # noqa: S311 - moments, no secrets
    rounds, unequal = 0, list[str]()
    while killer.kills.total() < given.kills:
        rounds += 1
        killed = copy_tree(given.tree, work / f"killed-{rounds}")
        killer.run(killed, options)
        unequal += [f"run {rounds}: {name}" for name in differing(results(killed / RECIPE), wanted)]
    by_stage = ", ".join(f"{killer.names[stage]} {count}" for stage, count in sorted(killer.kills.items()))
    print(f"{killer.kills.total()} kills in {rounds} runs: {by_stage}")
    print("different:", *unequal, sep="\n  ") if unequal else print(f"all {len(wanted)} files equal to the bit")
    return 1 if unequal or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())

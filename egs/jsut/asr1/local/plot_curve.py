"""Draws dev CER against the minutes of training that were measured, for one or more experiments.

Usage: plot_curve.py --out curve.png NAME=EXP_DIR [NAME=EXP_DIR ...]
With --seconds-a-step S against steps, and minutes at S seconds a step above: for runs that were disturbed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib as mpl

from speechllm.errors import DataError, exit_status

mpl.use("Agg")


def curve(exp: Path, unit: str) -> tuple[list[float], list[float]]:
    """Return steps or minutes, as `unit` says, and dev CER in per cent at each validation.

    Raises:
        DataError: the experiment has no record of training.
    """
    path = exp / "metrics.jsonl"
    if not path.is_file():
        raise DataError(path, "no such record", "run stage 3 first")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    points = [record for record in records if record["kind"] == "valid"]
    return [point[unit] for point in points], [100 * point["cer"] for point in points]


def draw(experiments: dict[str, Path], seconds_a_step: float | None, out: Path) -> None:
    """Write the picture."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=120, layout="constrained")
    unit = "minutes" if seconds_a_step is None else "step"
    for name, exp in experiments.items():
        places, cer_percent = curve(exp, unit)
        axes.plot(places, cer_percent, marker="o", label=name)
        end = (places[-1], cer_percent[-1])
        axes.annotate(f"{cer_percent[-1]:.1f}", end, textcoords="offset points", xytext=(4, 6))
    axes.set(
        xlabel="minutes of training" if seconds_a_step is None else "steps",
        ylabel="dev CER, per cent",
        ylim=(0, None),
        xlim=(0, None),
    )
    if seconds_a_step is not None:
        above = axes.twiny()
        above.set_xlim(0, axes.get_xlim()[1] * seconds_a_step / 60)
        above.set_xlabel(f"minutes at {seconds_a_step:g} s a step")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(out)


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds-a-step", type=float)
    parser.add_argument("experiments", nargs="+", metavar="NAME=EXP_DIR")
    options = parser.parse_args()
    pairs = (item.partition("=") for item in options.experiments)
    experiments = {name: Path(folder) for name, _, folder in pairs}
    return exit_status(lambda: draw(experiments, options.seconds_a_step, options.out))


if __name__ == "__main__":
    sys.exit(main())

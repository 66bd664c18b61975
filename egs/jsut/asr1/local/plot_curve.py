"""Draws dev CER against steps and minutes of training for one or more experiments.

Usage: plot_curve.py --seconds-a-step S --out curve.png NAME=EXP_DIR [NAME=EXP_DIR ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib as mpl

from speechllm.errors import DataError, exit_status

mpl.use("Agg")


def curve(exp: Path) -> tuple[list[int], list[float]]:
    """Return steps and dev CER in per cent at each validation.

    Raises:
        DataError: the experiment has no record of training.
    """
    path = exp / "metrics.jsonl"
    if not path.is_file():
        raise DataError(path, "no such record", "run stage 3 first")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    points = [record for record in records if record["kind"] == "valid"]
    return [point["step"] for point in points], [100 * point["cer"] for point in points]


def draw(experiments: dict[str, Path], seconds_a_step: float, out: Path) -> None:
    """Write the picture; the axis above turns steps into minutes."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=120, layout="constrained")
    for name, exp in experiments.items():
        steps, cer_percent = curve(exp)
        axes.plot(steps, cer_percent, marker="o", label=name)
        end = (steps[-1], cer_percent[-1])
        axes.annotate(f"{cer_percent[-1]:.1f}", end, textcoords="offset points", xytext=(4, 6))
    axes.set(xlabel="steps", ylabel="dev CER, per cent", ylim=(0, None), xlim=(0, None))
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
    parser.add_argument("--seconds-a-step", type=float, required=True)
    parser.add_argument("experiments", nargs="+", metavar="NAME=EXP_DIR")
    options = parser.parse_args()
    pairs = (item.partition("=") for item in options.experiments)
    experiments = {name: Path(folder) for name, _, folder in pairs}
    return exit_status(lambda: draw(experiments, options.seconds_a_step, options.out))


if __name__ == "__main__":
    sys.exit(main())

"""Stage 1: makes the data directories of a corpus.

Usage: data.py --corpus mini|mini_open|debug|jsut|reazonspeech-SIZE --out data [--nj N] [--profile NAME]

jsut               the folder of $JSUT; where that is not set it is fetched into downloads/
reazonspeech-SIZE  tiny, small, medium (1,000 h), large or all: the copy in $REAZONSPEECH, or fetched;
                   --profile names the text profile of its training texts (default: train)

Where the texts of both are there, it is measured how much of JSUT's was trained on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import jsut
import mini
import overlap
import reazonspeech

from speechllm.data.kaldi import read_table
from speechllm.errors import ConfigError, exit_status

DOWNLOADS = Path("downloads")
DEBUG_MODELS = DOWNLOADS / "debug"
PROFILE = "train"


def prepare(corpus: str, out: Path, workers: int, profile: str = PROFILE) -> None:
    """Write the data directories of `corpus` to `out`.

    Raises:
        UserError: no such corpus, or its files are at fault.
    """
    if profile != PROFILE and not corpus.startswith(reazonspeech.PREFIX):
        raise ConfigError("--profile", f"{corpus} has none", f"leave it out, or take {reazonspeech.PREFIX}SIZE")
    if corpus == "jsut":
        jsut.prepare(_given("JSUT") or jsut.obtain(DOWNLOADS), out)
    elif corpus.startswith(reazonspeech.PREFIX):
        source = reazonspeech.Source(DOWNLOADS, _given("REAZONSPEECH"))
        reazonspeech.prepare(corpus.removeprefix(reazonspeech.PREFIX), out, workers, profile, source)
    elif corpus in mini.CORPORA:
        mini.prepare(mini.CORPORA[corpus](), out, workers)
    else:
        names = ["jsut", *(f"{reazonspeech.PREFIX}{size}" for size in reazonspeech.NUM_TARS), *mini.CORPORA]
        raise ConfigError(corpus, "no such corpus", f"choose one of {', '.join(names)}")
    if corpus == "debug":
        import debug_models

        debug_models.make(DEBUG_MODELS, list(read_table(out / "debug_train" / "text").values()))
    if corpus not in mini.CORPORA:
        _measure_overlap(out)


def _given(variable: str) -> Path | None:
    """Return the folder that an environment variable names, or None."""
    value = os.environ.get(variable)
    return Path(value) if value else None


def _measure_overlap(out: Path) -> None:
    """Measure how much of JSUT's test texts is in the texts of each training set that is there."""
    held_out = [out / f"jsut_{name}" for name in jsut.HELD_OUT]
    whole = out / f"jsut_{jsut.WHOLE_SUBSET}"
    pairs = [(train, [whole, *held_out]) for train in sorted(out.glob("reazonspeech_*_train"))]
    for train, tests in [*pairs, (out / "jsut_train", held_out)]:  # most of basic5000 is in jsut_train
        if all((folder / "wav.scp").is_file() for folder in (train, *tests)):
            print(overlap.measure(train, tests))


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nj", type=int, default=2)
    parser.add_argument("--profile", default=PROFILE)
    options = parser.parse_args()
    return exit_status(lambda: prepare(options.corpus, options.out, options.nj, options.profile))


if __name__ == "__main__":
    sys.exit(main())

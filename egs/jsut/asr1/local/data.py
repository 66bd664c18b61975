"""Stage 1: makes the data directories of a corpus.

Usage: data.py --corpus mini|mini_open|debug|jsut --out data [--nj N]; the folder of JSUT comes from $JSUT.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import jsut
import mini

from speechllm.data.kaldi import read_table
from speechllm.errors import ConfigError, exit_status

DEBUG_MODELS = Path("downloads/debug")


def prepare(corpus: str, out: Path, workers: int) -> None:
    """Write the data directories of `corpus` to `out`.

    Raises:
        UserError: no such corpus, or its files are at fault.
    """
    if corpus == "jsut":
        if not os.environ.get("JSUT"):
            raise ConfigError("JSUT", "is not set", "set it to the folder of the unpacked corpus: JSUT=/path ./run.sh")
        jsut.prepare(Path(os.environ["JSUT"]), out)
        return
    if corpus not in mini.CORPORA:
        raise ConfigError(corpus, "no such corpus", f"choose one of jsut, {', '.join(mini.CORPORA)}")
    mini.prepare(mini.CORPORA[corpus](), out, workers)
    if corpus == "debug":
        import debug_models

        debug_models.make(DEBUG_MODELS, list(read_table(out / "debug_train" / "text").values()))


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nj", type=int, default=2)
    options = parser.parse_args()
    return exit_status(lambda: prepare(options.corpus, options.out, options.nj))


if __name__ == "__main__":
    sys.exit(main())

"""Stage 1: hands `utterances` of data_prep.py to the stage 1 of all such recipes. Nothing to fill in here."""

from __future__ import annotations

import sys
from pathlib import Path

import data_prep

SHARED = Path(__file__).resolve().parents[3] / "TEMPLATE/asr1/skeleton"


def main() -> int:
    """Return the exit status."""
    sys.path.append(str(SHARED))
    import from_utterances

    return from_utterances.main(data_prep.utterances, Path(data_prep.__file__))


if __name__ == "__main__":
    sys.exit(main())

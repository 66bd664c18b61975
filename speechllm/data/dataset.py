"""Examples of a dump directory: features by id, with their transcripts."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.data.archive import Store
from speechllm.data.audio import MAX_DURATION_S
from speechllm.data.kaldi import byte_order, read_table
from speechllm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Example:
    """One utterance: its id, how many frames it has, and what was said."""

    utt_id: str
    num_frames: int
    text: str
    duration_s: float


class FeatureSet:
    """The examples of one dump directory, in byte order of their ids."""

    def __init__(self, folder: Path) -> None:
        """Read the tables of `folder`; features are read when asked for.

        Raises:
            DataError: a table is missing, or features and transcripts are of different utterances.
        """
        self.folder = folder
        self.store = Store(folder)
        texts, durations = read_table(folder / "text"), read_table(folder / "utt2dur")
        for name, table in (("text", texts), ("utt2dur", durations)):
            for utt_id in byte_order(table.keys() ^ self.store.places.keys())[:1]:
                raise DataError(folder, f"{utt_id} is not in both {name} and feats.scp", "run stage 2 again")
        self.examples = {
            key: Example(key, self.store.frames[key], texts[key], _seconds(folder, key, durations[key]))
            for key in byte_order(texts)
        }

    def frames(self, utt_id: str) -> NDArray[np.float32]:
        """Return the features [e h] of an utterance."""
        return self.store.read(utt_id)

    def frames_of(self, utt_ids: Sequence[str]) -> list[NDArray[np.float32]]:
        """Return the features [e h] of several utterances."""
        return [self.frames(utt_id) for utt_id in utt_ids]


def _seconds(folder: Path, utt_id: str, value: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(value)) <= MAX_DURATION_S:
            return seconds
    raise DataError(folder / "utt2dur", f"{utt_id} has no number of seconds", "run stage 2 again")

"""The Nue-ASR baseline: the published checkpoint on our own decoder, greedy, each sound through the encoder alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speechllm.decode.run import decode_dir
from speechllm.model import rinna

if TYPE_CHECKING:
    from pathlib import Path


def transcribe_dir(data_dir: Path, out: Path, model_name: str, batch_size: int) -> int:
    """Write Nue-ASR's texts of a data directory to ``out/text``; return the number of utterances decoded now.

    The length cap is the published one: four tokens a second and twenty more.

    Raises:
        UserError: data or model are at fault.
    """
    folder = rinna.imported(model_name)
    return decode_dir(folder / rinna.MODEL, data_dir, out, {"batch_size": batch_size})

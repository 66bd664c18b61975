"""The baseline that is a ready hypothesis file, made elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speechllm.data import kaldi
from speechllm.data.archive import sha256
from speechllm.errors import ConfigError
from speechllm.runtime import provenance, write_json

if TYPE_CHECKING:
    from pathlib import Path


def take_over(data_dir: Path, out: Path, hyp: Path | None) -> int:
    """Copy the texts of `hyp` to ``out/text`` with a note of their file; return their number.

    Raises:
        ConfigError: no file was given.
        DataError: the file is malformed.
    """
    if hyp is None:
        raise ConfigError("--hyp", "no hypothesis file was given", "add --hyp FILE")
    kaldi.load(data_dir)
    texts = kaldi.read_table(hyp)
    write_json(out / "provenance.json", provenance({"hypotheses": hyp.name, "sha256": sha256(hyp)}))
    kaldi.write_table(out / "text", texts)
    return len(texts)

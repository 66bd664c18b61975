"""The baseline that is a ready hypothesis file, made elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speechllm.data import kaldi
from speechllm.errors import ConfigError, DataError
from speechllm.runtime import provenance, sha256, write_json

if TYPE_CHECKING:
    from pathlib import Path


def take_over(data_dir: Path, out: Path, hyp: Path | None, source: str | None = None) -> int:
    """Copy the texts of `hyp` to ``out/text`` with a note of where they came from; return their number.

    The data directory may hold nothing but ``text``: nothing is heard here.

    Raises:
        ConfigError: no file was given.
        DataError: the file is malformed, or holds texts of other utterances.
    """
    if hyp is None:
        raise ConfigError("--hyp", "no hypothesis file was given", "add --hyp FILE")
    wanted = kaldi.read_table(data_dir / "text")
    texts = kaldi.read_table(hyp)
    for utt_id in kaldi.byte_order(texts.keys() ^ wanted.keys())[:1]:
        raise DataError(hyp, f"{utt_id} is not in both this file and {data_dir}", "give the texts of this very set")
    write_json(out / "provenance.json", provenance({"hypotheses": hyp.name, "sha256": sha256(hyp), "source": source}))
    kaldi.write_table(out / "text", texts)
    return len(texts)

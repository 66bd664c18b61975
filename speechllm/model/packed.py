"""Reads what `speechllm pack` adds to a trained model's folder: its form, its text profile, the sums of its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speechllm.errors import ModelError
from speechllm.folders import leads_out
from speechllm.runtime import read_json, sha256
from speechllm.text.normalize import get_profile

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from speechllm.config.schema import Config

ADAPTER, MERGED = "adapter", "merged"
FORMS = (ADAPTER, MERGED)
"""The language model's share: what was trained of it alone, or the whole of it with that merged in."""
LM_FOLDER = "lm"
SUMS_FILE = "SHA256SUMS"
MAX_SUMS_BYTES = 1 << 20


def as_packed(folder: Path, record: Path, config: Config) -> Config:
    """Return the configuration that loads `folder`; that of a folder which was never packed stays as it is.

    A merged folder holds its language model, whole and with its vocabulary cut, so nothing is left to be added or cut.

    Raises:
        ModelError: it has a form that this version does not know.
        UserError: it was trained on texts of a profile, or of a version of one, that this version does not know.
    """
    content = read_json(record)
    for tag in _listed(content.get("text_profiles")):
        get_profile(tag)
    form = content.get("form", ADAPTER)
    if form == ADAPTER:
        return config
    if form != MERGED:
        fix = f"use a version that reads it; this one reads {', '.join(FORMS)}"
        raise ModelError(record, f"has the unknown form {form}", fix)
    whole = {"name": str(folder / LM_FOLDER), "revision": None, "cut_vocabulary": False, "train": False}
    return config.model_copy(update={"lm": config.lm.model_copy(update=whole), "lora": None})


def _listed(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


def read_sums(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 as `speechllm pack` noted it; empty for a folder that was never packed.

    Raises:
        ModelError: the list cannot be read.
    """
    path = folder / SUMS_FILE
    if not path.is_file():
        return {}
    again = "copy the folder again"
    if path.stat().st_size > MAX_SUMS_BYTES:
        raise ModelError(path, "is larger than 1 MiB", again)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(path, f"cannot be read ({error})", again) from error
    pairs = [line.split("  ", maxsplit=1) for line in lines if line]
    if any(len(pair) != 2 for pair in pairs):  # noqa: PLR2004 - a sum and a name
        raise ModelError(path, "is no list of sums and file names", again)
    if outside := next((name for _, name in pairs if leads_out(name)), None):
        raise ModelError(path, f"names {outside}, which is not in the folder", again)
    return {name: digest for digest, name in pairs}


def check_sums(folder: Path, names: Iterable[str]) -> None:
    """Check files of a packed folder against its list of sums; names that the list lacks are let pass.

    Raises:
        ModelError: a file is missing or was changed.
    """
    sums = read_sums(folder)
    for name in names:
        if name not in sums:
            continue
        if not (folder / name).is_file():
            raise ModelError(folder, f"{name} is missing", "copy the folder again")
        if sha256(folder / name) != sums[name]:
            raise ModelError(folder / name, f"is damaged: its SHA-256 is not that in {SUMS_FILE}", "copy it again")


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that hold weights, as the list of sums has them."""
    found = [*folder.glob("*.safetensors"), *(folder / LM_FOLDER).glob("*.safetensors")]
    return sorted(path.relative_to(folder).as_posix() for path in found)

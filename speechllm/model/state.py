"""Tensors on disk: safetensors only, compared by name and shape before they are used."""

from __future__ import annotations

import errno
import os
import re
import zlib
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from speechllm.errors import ModelError

CRC = "crc32"  # in the file's own record
AGAIN = "copy it again, or remove the folder and train again"

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and sync them to disk.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    try:
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(whole, path, {CRC: _crc(whole)})
    except SafetensorError as error:
        # it hides the system's error in a text: I/O error: No space left on device (os error 28)
        code = int(found[1]) if (found := re.search(r"\bos error (\d+)", str(error))) else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ModelError: it is missing, no safetensors file (a pickle is never opened), or not as it was written.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
        with safe_open(path, framework="pt") as file:
            wanted = (file.metadata() or {}).get(CRC)  # files made before there were sums have none
    except (OSError, SafetensorError) as error:
        raise ModelError(path, f"is no readable safetensors file ({error})", AGAIN) from error
    if wanted not in {None, _crc(tensors)}:
        raise ModelError(path, "holds other values than were written: a bit has flipped", AGAIN)
    return tensors


def _crc(tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of all values, in the order of their names."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def check_keys(where: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check that a saved state has exactly the names and shapes that the model has.

    Raises:
        ModelError: it has not; the first difference is named.
    """
    fix = "use the configuration that it was trained with"
    for name in sorted(found.keys() ^ wanted.keys()):
        side = "has no" if name in wanted else "has the unknown"
        raise ModelError(where, f"{side} tensor {name}", fix)
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise ModelError(where, f"{name} is {tuple(value.shape)}, not {tuple(wanted[name].shape)}", fix)

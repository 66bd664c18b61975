"""Tensors on disk: safetensors only, compared by name and shape before they are used."""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from speechllm.errors import ModelError

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
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    except SafetensorError as error:
        # it hides the system's error in a text: I/O error: No space left on device (os error 28)
        code = int(found[1]) if (found := re.search(r"\bos error (\d+)", str(error))) else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ModelError: it is missing, or no safetensors file (a pickle is never opened).
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(path, f"is no readable safetensors file ({error})", "make the model again") from error
    return tensors


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

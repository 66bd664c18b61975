"""Feature archives: kaldiio ark/scp with float16 matrices, opened only where their bytes are known.

kaldiio would unpickle a value that begins with ``PKL`` and run a shell for ``cmd |``; `read_scp` and `Store` let
neither reach it. The only module that touches kaldiio.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import kaldiio
import numpy as np

from speechllm.data.kaldi import read_table
from speechllm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

DUMP_AGAIN = "run stage 2 again"
MAX_HEADER_BYTES = 4096
MATRIX_RANK = 2
NUMPY_FLAG = b"NPY"
VALUE = re.compile(r"(?P<ark>[^|:]+\.ark):(?P<offset>\d{1,15})")


def write_archive(ark: Path, items: Iterator[tuple[str, NDArray[np.float16]]]) -> dict[str, int]:
    """Write matrices [e h] to `ark` in turn and return key -> number of frames."""
    frames = {}
    scp = ark.with_suffix(".scp")
    with kaldiio.WriteHelper(f"ark,scp:{ark},{scp}", write_function="numpy") as writer:
        for key, matrix in items:
            writer(key, np.ascontiguousarray(matrix, dtype=np.float16))
            frames[key] = len(matrix)
    return frames


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Store:
    """The matrices of one dump directory, read by key."""

    def __init__(self, folder: Path) -> None:
        """Read ``feats.scp``; every value must name an ark inside `folder`.

        Raises:
            DataError: it does not, or the scp is malformed.
        """
        self.folder = folder
        self.places: dict[str, tuple[Path, int]] = {}
        for key, value in read_table(folder / "feats.scp").items():
            match = VALUE.fullmatch(value)
            if match is None or "/" in match["ark"]:
                raise DataError(
                    f"{folder}/feats.scp: {key}",
                    f"{value!r} names no ark of this folder",
                    DUMP_AGAIN,
                )
            self.places[key] = (folder / match["ark"], int(match["offset"]))
        self.frames = _counts(folder / "utt2num_frames")
        if self.frames.keys() != self.places.keys():
            raise DataError(folder / "utt2num_frames", "names other utterances than feats.scp", DUMP_AGAIN)

    def read(self, key: str) -> NDArray[np.float16]:
        """Return the matrix [e h] of `key`.

        Raises:
            DataError: its bytes are not a float16 matrix of the length in ``utt2num_frames``, or not finite.
        """
        ark, offset = self.places[key]
        where = f"{ark}:{offset}"
        rows, columns = _numpy_shape(ark, offset)
        if rows != self.frames[key]:
            raise DataError(
                where,
                f"{key} has {rows} frames, utt2num_frames says {self.frames[key]}",
                DUMP_AGAIN,
            )
        if offset + 2 * rows * columns > ark.stat().st_size:
            raise DataError(where, f"{key} runs past the end of the file", DUMP_AGAIN)
        matrix: NDArray[np.float16] = kaldiio.load_mat(where)
        if not np.isfinite(matrix).all():
            raise DataError(where, f"{key} holds values that are NaN or infinite", DUMP_AGAIN)
        return matrix


def _counts(path: Path) -> Mapping[str, int]:
    counts = {}
    for key, value in read_table(path).items():
        if not value.isdecimal():
            raise DataError(path, f"{key} has no number of frames", DUMP_AGAIN)
        counts[key] = int(value)
    return counts


def _numpy_shape(ark: Path, offset: int) -> tuple[int, int]:
    """Return the shape in the header at `offset`, before anything of its size is allocated."""
    where = f"{ark}:{offset}"
    if not ark.is_file():
        raise DataError(ark, "no such archive", DUMP_AGAIN)
    with ark.open("rb") as stream:
        stream.seek(offset)
        if stream.read(len(NUMPY_FLAG)) != NUMPY_FLAG:
            raise DataError(where, "is not a NumPy matrix of ours", DUMP_AGAIN)
        try:
            stream.read(stream.read(1)[0])  # kaldiio writes the length of what follows, in so many bytes
            version = np.lib.format.read_magic(stream)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = reader(stream, max_header_size=MAX_HEADER_BYTES)
        except (ValueError, EOFError, IndexError) as error:
            raise DataError(where, f"has a broken header ({error})", DUMP_AGAIN) from error
    if len(shape) != MATRIX_RANK or fortran or dtype != np.float16:
        raise DataError(where, f"holds {dtype} {shape}, not a float16 matrix", DUMP_AGAIN)
    return shape[0], shape[1]

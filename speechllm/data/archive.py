"""Feature archives: kaldiio ark/scp with float16 matrices, opened only where their bytes are known.

kaldiio writes them. It would unpickle a value that begins with ``PKL`` and run a shell for ``cmd |``, so it never
reads: `Store` takes the values of a header that it knows byte by byte. The only module that touches kaldiio.
"""

from __future__ import annotations

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
MAX_HEADER_BYTES = 512
# kaldiio's flag and length, then NumPy's header: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
HEADER = re.compile(
    rb"NPY[\x01-\x08].{1,8}?\x93NUMPY\x01\x00.."
    rb"\{'descr': '<f2', 'fortran_order': False, 'shape': \((?P<rows>\d{1,12}), (?P<columns>\d{1,12})\), \} *\n",
    re.DOTALL,
)
NUMBER = re.compile(r"\d{1,15}", re.ASCII)
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
        begin, rows, columns = _header(ark, offset)
        if rows != self.frames[key]:
            raise DataError(
                where,
                f"{key} has {rows} frames, utt2num_frames says {self.frames[key]}",
                DUMP_AGAIN,
            )
        if begin + 2 * rows * columns > ark.stat().st_size:
            raise DataError(where, f"{key} runs past the end of the file", DUMP_AGAIN)
        matrix = np.fromfile(ark, np.dtype("<f2"), count=rows * columns, offset=begin).reshape(rows, columns)
        if not np.isfinite(matrix).all():
            raise DataError(where, f"{key} holds values that are NaN or infinite", DUMP_AGAIN)
        return matrix


def _counts(path: Path) -> Mapping[str, int]:
    counts = {}
    for key, value in read_table(path).items():
        if not NUMBER.fullmatch(value):
            raise DataError(path, f"{key} has no number of frames", DUMP_AGAIN)
        counts[key] = int(value)
    return counts


def _header(ark: Path, offset: int) -> tuple[int, int, int]:
    """Return where the values of the matrix at `offset` begin, its rows and its columns."""
    if not ark.is_file():
        raise DataError(ark, "no such archive", DUMP_AGAIN)
    with ark.open("rb") as stream:
        stream.seek(offset)
        match = HEADER.match(stream.read(MAX_HEADER_BYTES))
    if match is None:
        raise DataError(f"{ark}:{offset}", "is not a float16 matrix of ours", DUMP_AGAIN)
    return offset + match.end(), int(match["rows"]), int(match["columns"])

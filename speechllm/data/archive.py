"""Feature archives: kaldiio ark/scp of matrices, mapped into memory, opened only where their bytes are known.

kaldiio writes them. It would unpickle a value that begins with ``PKL`` and run a shell for ``cmd |``, so it never
reads: `Store` takes the values of a header that it knows byte by byte. The only module that touches kaldiio.

A matrix of e frames and h channels is stored in one of two ways, which NumPy's header tells apart:

* ``float16``: [e h], two bytes a value.
* ``int8``: [e h+4], one byte a value, and behind the values of each frame its scale, a float32 with the lowest byte
  first. A feature is value times scale. The scale is the frame's largest magnitude divided by 127, so no feature is
  off by more than half of it. With kaldiio alone: ``rows = kaldiio.load_mat(place)`` and then
  ``rows[:, :-4] * rows[:, -4:].copy().view("<f4")``.

``utt2crc`` holds the CRC-32 of each matrix's bytes as they are stored, in hexadecimal. Every read checks it.

Shapes: e encoder frames, h encoder width.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import re
import threading
import zlib
from typing import TYPE_CHECKING, Any, Literal

import kaldiio
import numpy as np

from speechllm.data.kaldi import read_table, write_table
from speechllm.errors import DataError
from speechllm.runtime import naming

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

Stored = Literal["float16", "int8"]
DUMP_AGAIN = "run stage 2 again"
MAX_HEADER_BYTES = 512
MAX_OPEN_ARKS = 256  # a map holds a file descriptor, and a process may have few of them
# kaldiio's flag and length, then NumPy's header: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
HEADER = re.compile(
    rb"NPY[\x01-\x08].{1,8}?\x93NUMPY\x01\x00.."
    rb"\{'descr': '(?P<type><f2|\|i1)', 'fortran_order': False, "
    rb"'shape': \((?P<rows>\d{1,12}), (?P<columns>\d{1,12})\), \} *\n",
    re.DOTALL,
)
NUMBER = re.compile(r"\d{1,15}", re.ASCII)
CRC = re.compile(r"[0-9a-f]{8}")
VALUE = re.compile(r"(?P<ark>[^|:]+\.ark):(?P<offset>\d{1,15})")
SCALE = np.dtype("<f4")
MAX_CHANNELS = 1 << 16
LARGEST = 127
TOO_LARGE = 3e38  # 127 scales must be a float32
HALF_INFINITY = 0x7C00  # the bits of float16's; those of NaN are larger


def write_archive(ark: Path, items: Iterable[tuple[str, NDArray[Any]]], stored: Stored = "float16") -> dict[str, int]:
    """Write matrices [e h] to `ark` in turn, and ``.scp`` beside it; return key -> number of frames.

    Raises:
        DataError: a matrix holds what cannot be stored.
    """
    frames = {}
    table = {}
    with naming(ark), ark.open("wb") as stream:
        for key, frames_eh in items:
            table[key] = f"{ark.name}:{stream.tell() + len(key.encode()) + 1}"  # the value stands behind key and blank
            kaldiio.save_ark(stream, {key: pack(key, frames_eh, stored)}, write_function="numpy")
            frames[key] = len(frames_eh)
    write_table(ark.with_suffix(".scp"), table)
    return frames


def places(scp: Path) -> dict[str, tuple[Path, int]]:
    """Return key -> archive and offset; every archive lies beside the table.

    Raises:
        DataError: a value names something else.
    """
    found = {}
    for key, value in read_table(scp).items():
        match = VALUE.fullmatch(value)
        if match is None or "/" in match["ark"]:
            raise DataError(f"{scp}: {key}", f"{value!r} names no ark of this folder", DUMP_AGAIN)
        found[key] = (scp.parent / match["ark"], int(match["offset"]))
    return found


def pack(key: str, frames_eh: NDArray[Any], stored: Stored) -> NDArray[Any]:
    """Return a matrix [e h] as it is stored: float16 [e h], or int8 [e h+4].

    Raises:
        DataError: it holds NaN, or a value too large; that is an error, not an infinity.
    """
    packed = _half(frames_eh) if stored == "float16" else _with_scales(frames_eh)
    if packed is None:
        raise DataError(key, f"has features that {stored} cannot hold", "take the utterance out")
    return packed


def _half(frames_eh: NDArray[Any]) -> NDArray[np.float16] | None:
    with np.errstate(over="ignore"):
        half_eh = np.ascontiguousarray(frames_eh, dtype="<f2")
    magnitude_eh = half_eh.view(np.uint16) & 0x7FFF  # NumPy takes four times as long over the float16 itself
    return half_eh if magnitude_eh.max(initial=0) < HALF_INFINITY else None


def _with_scales(frames_eh: NDArray[Any]) -> NDArray[np.int8] | None:
    frames_eh = frames_eh.astype(np.float32, copy=False)
    peak_e1 = np.abs(frames_eh).max(axis=1, keepdims=True, initial=0)
    if not (peak_e1 < TOO_LARGE).all():
        return None
    scale_e1 = np.maximum(peak_e1 / LARGEST, np.finfo(SCALE).tiny, dtype=SCALE)
    values_eh = np.rint(frames_eh / scale_e1).astype(np.int8)
    return np.concatenate([values_eh, scale_e1.view(np.int8)], axis=1)


def unpack(packed: NDArray[Any]) -> NDArray[np.float32]:
    """Return the features [e h] of what `pack` made."""
    if packed.dtype == np.float16:
        return packed.astype(np.float32)
    scale_e1 = np.ascontiguousarray(packed[:, -SCALE.itemsize :]).view(SCALE)
    frames_eh: NDArray[np.float32] = packed[:, : -SCALE.itemsize] * scale_e1
    return frames_eh


def as_stored(frames_eh: NDArray[np.float32], stored: Stored) -> NDArray[np.float32]:
    """Return features [e h] as they come back from a store.

    Raises:
        DataError: as `pack`.
    """
    return unpack(pack("a sound", frames_eh, stored))


def checksums(ark: Path) -> dict[str, str]:
    """Return key -> CRC-32 of every matrix of an archive that lies beside its ``.scp``.

    Raises:
        DataError: they are not ours, or do not fit together.
    """
    mapped = _map(ark)
    entries = places(ark.with_suffix(".scp")).items()
    return {key: _crc(_Matrix(mapped, offset, f"{ark}:{offset}").values(key)) for key, (_, offset) in entries}


class Store:
    """The matrices of one dump directory, read by key, from any number of threads."""

    def __init__(self, folder: Path) -> None:
        """Read ``feats.scp``; every value must name an ark inside `folder`.

        Raises:
            DataError: it does not or holds none, an ark is missing, or a table is malformed.
        """
        self.folder = folder
        self.places = places(folder / "feats.scp")
        if not self.places:
            raise DataError(folder / "feats.scp", "names no utterance", DUMP_AGAIN)
        for ark in {ark: None for ark, _ in self.places.values()}:
            _require(ark)
        counts = self._table("utt2num_frames", NUMBER, "number of frames")
        self.frames = {key: int(value) for key, value in counts.items()}
        # dumps made before there were checksums have no such table
        self.crcs = self._table("utt2crc", CRC, "CRC-32") if (folder / "utt2crc").is_file() else {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def width_h(self) -> int:
        """Return the number of channels of the first matrix, which all must have.

        Raises:
            DataError: it is no matrix of ours.
        """
        ark, offset = next(iter(self.places.values()))
        with _noted(ark):
            return _Matrix(self._mapped(ark), offset, f"{ark}:{offset}").width

    def _table(self, name: str, pattern: re.Pattern[str], what: str) -> dict[str, str]:
        """Return a table of the utterances of ``feats.scp``, each value of which is `what`."""
        table = read_table(self.folder / name)
        for key, value in table.items():
            if not pattern.fullmatch(value):
                raise DataError(self.folder / name, f"{key} has no {what}", DUMP_AGAIN)
        if table.keys() != self.places.keys():
            raise DataError(self.folder / name, "names other utterances than feats.scp", DUMP_AGAIN)
        return table

    def read(self, key: str) -> NDArray[np.float32]:
        """Return the matrix [e h] of `key`, whatever it is stored as.

        Raises:
            DataError: its bytes are not those that were written, or no matrix of the length in ``utt2num_frames``, or
                not finite. The archive is then noted as one that stage 2 makes again.
        """
        ark, offset = self.places[key]
        width_h = self.width_h  # not below: a fault of the first archive is none of this one
        mapped = self._mapped(ark)
        with _noted(ark):
            where = f"{ark}:{offset}"
            return self._values(key, _Matrix(mapped, offset, where), width_h, where)

    def _values(self, key: str, matrix: _Matrix, width_h: int, where: str) -> NDArray[np.float32]:
        if matrix.rows != self.frames[key]:
            what = f"{key} has {matrix.rows} frames, utt2num_frames says {self.frames[key]}"
            raise DataError(where, what, DUMP_AGAIN)
        packed = matrix.values(key)
        if matrix.width != width_h:
            what = f"{key} has {matrix.width} channels, {next(iter(self.places))} has {width_h}"
            raise DataError(where, what, DUMP_AGAIN)
        wanted = self.crcs.get(key)
        if wanted is None and matrix.type == np.int8:  # so that float16 whose header was changed is not taken for it
            raise DataError(where, f"{key} is stored as int8 without a checksum in utt2crc", DUMP_AGAIN)
        if wanted is not None and wanted != (found := _crc(packed)):
            what = f"{key} is not what was written there (its CRC-32 is {found}, not {wanted})"
            raise DataError(where, what, DUMP_AGAIN)
        frames_eh = unpack(packed)
        if not np.isfinite(frames_eh).all():
            raise DataError(where, f"{key} holds values that are NaN or infinite", DUMP_AGAIN)
        return frames_eh

    def _mapped(self, ark: Path) -> mmap.mmap:
        """Return the map of an archive, which is made on first use and kept."""
        with self._lock:
            mapped = self._maps.get(ark)
            if mapped is None:
                mapped = _map(ark)
                if len(self._maps) >= MAX_OPEN_ARKS:
                    # the oldest; it is closed when the last thread that reads from it lets go
                    del self._maps[next(iter(self._maps))]
                self._maps[ark] = mapped
        return mapped


def suspect(ark: Path) -> Path:
    """Return the file whose being there says that a reader found the archive damaged."""
    return ark.with_suffix(".suspect")


@contextlib.contextmanager
def _noted(ark: Path) -> Iterator[None]:
    """Note a fault that is found in an archive."""
    try:
        yield
    except DataError:
        with contextlib.suppress(OSError):  # the folder may be another user's
            suspect(ark).touch()
        raise


class _Matrix:
    """A stored matrix, as its header says."""

    def __init__(self, mapped: mmap.mmap, offset: int, where: str) -> None:
        """Read the header at `offset`; `where` is for messages."""
        self.mapped, self.where = mapped, where
        # what was cut off a file after it was mapped must not be touched: that would end the process
        self.end = min(len(mapped), mapped.size())
        match = HEADER.match(mapped[offset : min(offset + MAX_HEADER_BYTES, self.end)])
        if match is None:
            raise DataError(where, "is no float16 or int8 matrix of ours", DUMP_AGAIN)
        self.begin = offset + match.end()
        self.type = np.dtype(match["type"].decode())
        self.rows, self.columns = int(match["rows"]), int(match["columns"])
        if not 1 <= self.columns <= MAX_CHANNELS:
            raise DataError(where, f"has {self.columns} channels", DUMP_AGAIN)

    @property
    def width(self) -> int:
        """Return the number of channels; a row of int8 holds its scale, too."""
        return self.columns - (SCALE.itemsize if self.type == np.int8 else 0)

    def values(self, key: str) -> NDArray[Any]:
        """Return the values, still on disk; `key` is for messages."""
        count = self.rows * self.columns
        if self.begin + self.type.itemsize * count > self.end:
            raise DataError(self.where, f"{key} runs past the end of the file", DUMP_AGAIN)
        if self.type == np.int8 and self.columns <= SCALE.itemsize:
            raise DataError(self.where, f"{key} has no room for a scale", DUMP_AGAIN)
        # a slice of the map would be a copy; this is none
        values = np.frombuffer(memoryview(self.mapped)[self.begin :], self.type, count)
        return values.reshape(self.rows, self.columns)


def _crc(packed: NDArray[Any]) -> str:
    return f"{zlib.crc32(packed.data):08x}"


def _require(ark: Path) -> None:
    try:
        found = ark.is_file()
    except OSError:  # its folder may not be looked into, or its name is too long to be one
        found = False
    if not found:
        raise DataError(ark, "no such archive", DUMP_AGAIN)


def _map(ark: Path) -> mmap.mmap:
    _require(ark)
    with ark.open("rb") as stream:
        try:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise DataError(ark, "is empty", DUMP_AGAIN) from error

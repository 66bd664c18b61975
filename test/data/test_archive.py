"""Feature archives: what was written comes back, and nothing else is ever opened, run or allocated."""

from __future__ import annotations

import io
import os
import pickle
from typing import TYPE_CHECKING, Any

import kaldiio
import numpy as np
import pytest

from speechllm.data import archive, kaldi
from speechllm.errors import DataError
from speechllm.runtime import sha256

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MATRICES: dict[str, NDArray[np.float16]] = {
    "u1": np.arange(12, dtype=np.float16).reshape(4, 3) / np.float16(7),
    "u2": np.full((5, 3), -65_504, dtype=np.float16),
    "u3": np.zeros((0, 3), dtype=np.float16),
}


def _store(folder: Path, matrices: dict[str, NDArray[np.float16]] | None = None) -> Path:
    matrices = MATRICES if matrices is None else matrices
    folder.mkdir(exist_ok=True)
    frames = archive.write_archive(folder / "feats.ark", iter(matrices.items()))
    places = (folder / "feats.scp").read_text(encoding="utf-8").replace(f"{folder}/", "")
    (folder / "feats.scp").write_text(places, encoding="utf-8")
    kaldi.write_table(folder / "utt2num_frames", {key: str(count) for key, count in frames.items()})
    return folder


def _value(folder: Path, content: bytes, rows: int = 4) -> str:
    """Return what is said of an archive with these bytes for a value."""
    (folder / "feats.ark").write_bytes(b"u1 " + content)
    (folder / "feats.scp").write_text("u1 feats.ark:3\n", encoding="utf-8")
    (folder / "utt2num_frames").write_text(f"u1 {rows}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        archive.Store(folder).read("u1")
    return str(caught.value).removeprefix(f"{folder}/")


def _numpy_value(array: NDArray[Any], shape: str | None = None) -> bytes:
    """Return an array as kaldiio stores it; `shape` is written in the place of the true one."""
    stream = io.BytesIO()
    np.save(stream, array)
    content = stream.getvalue()
    if shape is not None:
        old = str(array.shape).encode()
        longer = len(shape) - len(old)
        content = content.replace(old, shape.encode()).replace(b" " * longer + b"\n", b"\n", 1)
    length = len(content).to_bytes(2, "little")
    return b"NPY\x02" + length + content


def test_matrices_come_back_bit_for_bit_and_as_kaldiio_reads_them(tmp_path: Path) -> None:
    store = archive.Store(_store(tmp_path))
    for key, matrix in MATRICES.items():
        read = store.read(key)
        assert read.dtype == np.float16
        assert np.array_equal(read, matrix)
        ark, offset = store.places[key]
        assert np.array_equal(read, kaldiio.load_mat(f"{ark}:{offset}"))
    assert store.frames == {"u1": 4, "u2": 5, "u3": 0}


def test_the_folder_may_move(tmp_path: Path) -> None:
    _store(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "neu: |")
    assert np.array_equal(archive.Store(tmp_path / "neu: |").read("u1"), MATRICES["u1"])


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (os.environ["BOMB"], 0o700)


def test_a_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "went_off"))
    bomb = b"PKL" + pickle.dumps(_Bomb())
    assert _value(tmp_path, bomb) == "feats.ark:3: is not a float16 matrix of ours; run stage 2 again"
    assert not (tmp_path / "went_off").exists()
    kaldiio.load_mat(f"{tmp_path}/feats.ark:3")  # the bomb is a live one
    assert (tmp_path / "went_off").exists()


def test_an_array_of_python_objects_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "went_off"))
    objects = np.array([[_Bomb()]], dtype=object)
    assert "is not a float16 matrix of ours" in _value(tmp_path, _numpy_value(objects), 1)
    assert not (tmp_path / "went_off").exists()


@pytest.mark.parametrize("value", ["../feats.ark:3", "/etc/feats.ark:3", "sub/feats.ark:3", "touch went_off |"])
def test_a_value_that_leaves_the_folder_or_is_a_command_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    folder = _store(tmp_path / "store", {"u1": MATRICES["u1"]})
    monkeypatch.chdir(tmp_path)
    (folder / "feats.scp").write_text(f"u1 {value}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        archive.Store(folder)
    assert str(caught.value) == f"{folder}/feats.scp: u1: {value!r} names no ark of this folder; run stage 2 again"
    assert not (tmp_path / "went_off").exists()


@pytest.mark.parametrize("value", ["feats.ark", "feats.ark:", "feats.ark:-3", "feats.ark:3[0:2]", "feats.txt:3", ""])
def test_a_value_without_an_offset_is_refused(tmp_path: Path, value: str) -> None:
    folder = _store(tmp_path, {"u1": MATRICES["u1"]})
    (folder / "feats.scp").write_text(f"u1 {value}\n", encoding="utf-8")
    with pytest.raises(DataError, match="names no ark of this folder"):
        archive.Store(folder)


def test_a_header_that_claims_two_to_the_31_rows_allocates_nothing(tmp_path: Path) -> None:
    value = _numpy_value(MATRICES["u1"], f"({2**31}, 3)")
    assert _value(tmp_path, value, 2**31) == "feats.ark:3: u1 runs past the end of the file; run stage 2 again"
    assert _value(tmp_path, value, 4) == (
        "feats.ark:3: u1 has 2147483648 frames, utt2num_frames says 4; run stage 2 again"
    )


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 3), np.float32),
        np.zeros((4, 3), ">f2"),
        np.zeros(12, np.float16),
        np.zeros((4, 3, 2), np.float16),
        np.zeros((4, 3), np.float16, order="F"),
    ],
    ids=["float32", "big-endian", "vector", "cube", "fortran"],
)
def test_only_a_float16_matrix_is_taken(tmp_path: Path, array: NDArray[Any]) -> None:
    assert "is not a float16 matrix of ours" in _value(tmp_path, _numpy_value(array))


@pytest.mark.parametrize("shape", ["(-4, 3)", "(4, -3)", "(4, 1e9)", "(4, 3", "[4, 3]", "(4, 9999999999999)"])
def test_a_broken_header_is_refused(tmp_path: Path, shape: str) -> None:
    assert "is not a float16 matrix of ours" in _value(tmp_path, _numpy_value(MATRICES["u1"], shape))


@pytest.mark.parametrize("lost", [1, 10, 24, 25, 100, 150])
def test_an_archive_that_was_cut_short_is_refused(tmp_path: Path, lost: int) -> None:
    whole = _numpy_value(MATRICES["u1"])
    assert f"; {archive.DUMP_AGAIN}" in _value(tmp_path, whole[:-lost])
    (tmp_path / "feats.ark").write_bytes(b"u1 " + whole)
    assert np.array_equal(archive.Store(tmp_path).read("u1"), MATRICES["u1"])


def test_damaged_bytes_never_give_anything_but_a_matrix_or_a_data_error(tmp_path: Path) -> None:
    folder = _store(tmp_path, {"u1": MATRICES["u1"]})
    whole = (folder / "feats.ark").read_bytes()
    store = archive.Store(folder)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            damaged[int(rng.integers(3, len(damaged)))] = int(rng.integers(256))
        (folder / "feats.ark").write_bytes(damaged)
        try:
            assert store.read("u1").shape == (4, 3)
        except DataError:
            refused += 1
    assert refused > 100


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for value in (np.nan, np.inf):
        matrix = MATRICES["u1"].copy()
        matrix[2, 1] = value
        assert _value(tmp_path, _numpy_value(matrix)) == (
            "feats.ark:3: u1 holds values that are NaN or infinite; run stage 2 again"
        )


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    store = archive.Store(_store(tmp_path))
    (tmp_path / "feats.ark").unlink()
    with pytest.raises(DataError, match=r"feats\.ark: no such archive; run stage 2 again"):
        store.read("u1")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("u1 4\nu2 5\n", "names other utterances than feats.scp"),
        ("u1 4\nu2 5\nu3 0\nu4 1\n", "names other utterances than feats.scp"),
        ("u1 4\nu2 -5\nu3 0\n", "u2 has no number of frames"),
        ("u1 4\nu2 fünf\nu3 0\n", "u2 has no number of frames"),
        (f"u1 {'9' * 5000}\nu2 5\nu3 0\n", "u1 has no number of frames"),
    ],
)
def test_frame_counts_that_disagree_are_named(tmp_path: Path, table: str, message: str) -> None:
    folder = _store(tmp_path)
    (folder / "utt2num_frames").write_text(table, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        archive.Store(folder)
    assert str(caught.value) == f"{folder}/utt2num_frames: {message}; run stage 2 again"


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")

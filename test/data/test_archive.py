"""Feature archives: what was written comes back, and nothing else is ever opened, run or allocated."""

from __future__ import annotations

import io
import os
import pickle
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import kaldiio
import numpy as np
import pytest

from speechllm.data import archive, kaldi
from speechllm.errors import DataError
from speechllm.runtime import sha256

if TYPE_CHECKING:
    import mmap
    from pathlib import Path

    from numpy.typing import NDArray

MATRICES: dict[str, NDArray[np.float16]] = {
    "u1": np.arange(12, dtype=np.float16).reshape(4, 3) / np.float16(7),
    "u2": np.full((5, 3), -65_504, dtype=np.float16),
    "u3": np.zeros((0, 3), dtype=np.float16),
}


def _frames(length: int = 40, width: int = 256, seed: int = 3) -> NDArray[np.float32]:
    """Return features of the kind that Transformers make: most values small, the same few channels large."""
    frames = np.random.default_rng(seed).standard_normal((length, width), dtype=np.float32)
    frames[:, 7 % width] += 6
    frames[:, 100 % width] -= 9
    return frames


def _store(
    folder: Path,
    matrices: dict[str, NDArray[Any]] | None = None,
    stored: archive.Stored = "float16",
    *,
    crcs: bool = True,
) -> Path:
    matrices = {**MATRICES} if matrices is None else matrices
    folder.mkdir(exist_ok=True)
    frames = archive.write_archive(folder / "feats.ark", iter(matrices.items()), stored)
    if crcs:
        kaldi.write_table(folder / "utt2crc", archive.checksums(folder / "feats.ark"))
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
        assert read.dtype == np.float32
        assert np.array_equal(read, matrix)
        ark, offset = store.places[key]
        theirs = kaldiio.load_mat(f"{ark}:{offset}")
        assert theirs.dtype == np.float16
        assert np.array_equal(read, theirs)
        assert store.crcs[key] == f"{zlib.crc32(theirs.tobytes()):08x}"
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
    assert _value(tmp_path, bomb) == "feats.ark:3: is no float16 or int8 matrix of ours; run stage 2 again"
    assert not (tmp_path / "went_off").exists()
    kaldiio.load_mat(f"{tmp_path}/feats.ark:3")  # the bomb is a live one
    assert (tmp_path / "went_off").exists()


def test_an_array_of_python_objects_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "went_off"))
    objects = np.array([[_Bomb()]], dtype=object)
    assert "is no float16 or int8 matrix of ours" in _value(tmp_path, _numpy_value(objects), 1)
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


def test_a_name_that_is_too_long_to_be_one_is_no_archive(tmp_path: Path) -> None:
    folder = _store(tmp_path, {"u1": MATRICES["u1"]})
    (folder / "feats.scp").write_text(f"u1 {'9' * 300}.ark:3\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"9\.ark: no such archive"):
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
        np.zeros((4, 3), np.uint8),
        np.zeros((4, 3), ">f2"),
        np.zeros(12, np.float16),
        np.zeros((4, 3, 2), np.float16),
        np.zeros((4, 3), np.float16, order="F"),
    ],
    ids=["float32", "uint8", "big-endian", "vector", "cube", "fortran"],
)
def test_only_a_matrix_of_a_known_kind_is_taken(tmp_path: Path, array: NDArray[Any]) -> None:
    assert "is no float16 or int8 matrix of ours" in _value(tmp_path, _numpy_value(array))


@pytest.mark.parametrize("shape", ["(-4, 3)", "(4, -3)", "(4, 1e9)", "(4, 3", "[4, 3]", "(4, 9999999999999)"])
def test_a_broken_header_is_refused(tmp_path: Path, shape: str) -> None:
    assert "is no float16 or int8 matrix of ours" in _value(tmp_path, _numpy_value(MATRICES["u1"], shape))


@pytest.mark.parametrize("lost", [1, 10, 24, 25, 100, 150])
def test_an_archive_that_was_cut_short_is_refused(tmp_path: Path, lost: int) -> None:
    whole = _numpy_value(MATRICES["u1"])
    assert f"; {archive.DUMP_AGAIN}" in _value(tmp_path, whole[:-lost])
    (tmp_path / "feats.ark").write_bytes(b"u1 " + whole)
    assert np.array_equal(archive.Store(tmp_path).read("u1"), MATRICES["u1"])


def test_damaged_bytes_never_give_anything_but_a_matrix_or_a_data_error(tmp_path: Path) -> None:
    folder = _store(tmp_path, {"u1": MATRICES["u1"]}, crcs=False)
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


@pytest.mark.parametrize("stored", ["float16", "int8"])
def test_with_checksums_damaged_bytes_give_what_was_written_or_a_data_error(
    tmp_path: Path, stored: archive.Stored
) -> None:
    folder = _store(tmp_path, {"u1": _frames(4, 5), "u2": _frames(4, 5, 4)}, stored)
    whole = (folder / "feats.ark").read_bytes()
    store = archive.Store(folder)
    wanted = store.read("u1")
    rng = np.random.default_rng(2)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[int(rng.integers(3, len(damaged) // 2))] ^= 1 << int(rng.integers(8))
        (folder / "feats.ark").write_bytes(damaged)
        try:
            assert np.array_equal(store.read("u1"), wanted)
        except DataError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    "frames",
    [
        _frames(),
        np.random.default_rng(5).standard_normal((30, 64), dtype=np.float32) * np.float32(1e-30),
        np.zeros((3, 8), np.float32),
        np.array([[0, 0, 0], [1e-45, -1e-44, 0], [-3, 2, 1], [2.9e38, -1, 0]], np.float32),
        np.zeros((0, 8), np.float32),
        _frames().astype(np.float16),
    ],
    ids=["features", "tiny", "silence", "extremes", "no frame", "float16"],
)
def test_int8_is_off_by_half_a_scale_at_most(tmp_path: Path, frames: NDArray[Any]) -> None:
    read = archive.Store(_store(tmp_path, {"u1": frames}, "int8")).read("u1")
    assert read.dtype == np.float32
    assert read.shape == frames.shape
    exact = frames.astype(np.float64)
    scale = np.maximum(np.abs(exact).max(axis=1, keepdims=True, initial=0) / 127, np.finfo(np.float32).tiny)
    assert (np.abs(read - exact) <= 0.5 * scale * (1 + 1e-5)).all()
    assert np.array_equal(read, archive.as_stored(frames, "int8"))


def test_int8_of_gaussian_features_is_off_by_under_one_percent(tmp_path: Path) -> None:
    frames = np.random.default_rng(6).standard_normal((200, 1_024), dtype=np.float32)
    read = archive.Store(_store(tmp_path, {"u1": frames}, "int8")).read("u1")
    assert 0.005 < np.linalg.norm(read - frames) / np.linalg.norm(frames) < 0.01
    # a frame's scale is its own: one that is loud takes nothing from the others
    frames[0] *= 1_000
    louder = archive.as_stored(frames, "int8")
    assert np.array_equal(louder[1:], read[1:])


def test_int8_takes_half_the_bytes_and_kaldiio_reads_it_as_documented(tmp_path: Path) -> None:
    frames = _frames()
    store = archive.Store(_store(tmp_path / "int8", {"u1": frames}, "int8"))
    ark, offset = store.places["u1"]
    rows = kaldiio.load_mat(f"{ark}:{offset}")
    assert rows.dtype == np.int8
    assert rows.shape == (40, 256 + 4)
    assert np.array_equal(rows[:, :-4] * rows[:, -4:].copy().view("<f4"), store.read("u1"))
    assert store.crcs["u1"] == f"{zlib.crc32(rows.tobytes()):08x}"
    _store(tmp_path / "half", {"u1": frames})
    assert ark.stat().st_size < 0.53 * (tmp_path / "half/feats.ark").stat().st_size


@pytest.mark.parametrize("stored", ["float16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.2e38, 65_520.0])
def test_what_cannot_be_stored_is_named(tmp_path: Path, stored: archive.Stored, value: float) -> None:
    frames = _frames()
    frames[3, 5] = value
    if stored == "int8" and value == 65_520.0:
        assert archive.as_stored(frames, stored).max() == pytest.approx(value)
        return
    with pytest.raises(DataError, match=f"^u1: has features that {stored} cannot hold; take the utterance out$"):
        _store(tmp_path, {"u1": frames}, stored)


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(("stored", "place"), [("float16", 5), ("int8", 0), ("int8", 258)])
def test_a_flipped_bit_names_archive_utterance_and_fix(tmp_path: Path, stored: archive.Stored, place: int) -> None:
    folder = _store(tmp_path, {"u1": _frames(), "u2": _frames(seed=4)}, stored)
    store = archive.Store(folder)
    ark, offset = store.places["u1"]
    first = (ark.read_bytes()[offset:]).index(b"\n") + 1 + offset
    good = store.read("u2")
    _flip(ark, first + place)
    with pytest.raises(DataError) as caught:
        store.read("u1")
    found = f"{zlib.crc32(kaldiio.load_mat(f'{ark}:{offset}').tobytes()):08x}"
    assert str(caught.value) == (
        f"{ark}:{offset}: u1 is not what was written there (its CRC-32 is {found}, not {store.crcs['u1']}); "
        "run stage 2 again"
    )
    assert archive.suspect(ark).is_file()
    assert np.array_equal(store.read("u2"), good)


@pytest.mark.parametrize(("old", "new"), [(b"<f2", b"|i1"), (b"(40, 256)", b"(40, 255)"), (b"False", b"True ")])
def test_a_changed_header_is_refused_with_checksums_and_without(tmp_path: Path, old: bytes, new: bytes) -> None:
    folder = _store(tmp_path, {"u1": _frames(), "u2": _frames()})
    ark = folder / "feats.ark"
    ark.write_bytes(ark.read_bytes().replace(old, new, 1))
    for message in ("is not what was written|is no float16 or int8", "without a checksum|is no float16 or int8"):
        if new != b"(40, 255)" or (folder / "utt2crc").exists():  # without checksums a width is what it says
            with pytest.raises(DataError, match=message):
                archive.Store(folder).read("u1")
        (folder / "utt2crc").unlink(missing_ok=True)


def test_int8_whose_header_says_float16_is_refused(tmp_path: Path) -> None:
    folder = _store(tmp_path, {"u1": _frames(), "u2": _frames(), "u3": _frames()}, "int8")
    ark = folder / "feats.ark"
    ark.write_bytes(ark.read_bytes().replace(b"|i1", b"<f2", 1))
    with pytest.raises(DataError, match="u1 is not what was written there"):
        archive.Store(folder).read("u1")


def test_int8_without_room_for_a_scale_is_refused(tmp_path: Path) -> None:
    message = "feats.ark:3: u1 has no room for a scale; run stage 2 again"
    assert _value(tmp_path, _numpy_value(np.zeros((4, 4), np.int8))) == message


def test_a_store_of_before_there_were_checksums_is_read(tmp_path: Path) -> None:
    store = archive.Store(_store(tmp_path, crcs=False))
    assert store.crcs == {}
    for key, matrix in MATRICES.items():
        assert np.array_equal(store.read(key), matrix)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("u1 00000000\nu2 00000000\n", "names other utterances than feats.scp"),
        ("u1 00000000\nu2 0000000G\nu3 00000000\n", "u2 has no CRC-32"),
        ("u1 00000000\nu2\nu3 00000000\n", "u2 has no CRC-32"),
    ],
)
def test_checksums_that_disagree_with_the_features_are_named(tmp_path: Path, table: str, message: str) -> None:
    folder = _store(tmp_path)
    (folder / "utt2crc").write_text(table, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        archive.Store(folder)
    assert str(caught.value) == f"{folder}/utt2crc: {message}; run stage 2 again"


def _many(folder: Path, num_arks: int) -> tuple[archive.Store, dict[str, NDArray[np.float32]]]:
    """Return a store of several archives and what it holds, rounded as it rounds."""
    folder.mkdir()
    matrices = {f"u{at}{part}": _frames(10 + at, 32, 10 * at + part) for at in range(num_arks) for part in range(4)}
    places: dict[str, str] = {}
    crcs: dict[str, str] = {}
    for at in range(num_arks):
        ark = folder / f"feats.{at}.ark"
        own = {key: matrix for key, matrix in matrices.items() if key.startswith(f"u{at}")}
        archive.write_archive(ark, iter(own.items()), "int8")
        places |= kaldi.read_table(ark.with_suffix(".scp"))
        crcs |= archive.checksums(ark)
    kaldi.write_table(folder / "feats.scp", places)
    kaldi.write_table(folder / "utt2crc", crcs)
    kaldi.write_table(folder / "utt2num_frames", {key: str(len(matrix)) for key, matrix in matrices.items()})
    return archive.Store(folder), {key: archive.as_stored(matrix, "int8") for key, matrix in matrices.items()}


@pytest.mark.parametrize("most_open", [2, 256])
def test_many_threads_read_the_same_and_no_archive_is_opened_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_open: int
) -> None:
    store, wanted = _many(tmp_path / "many", 5)
    opened: list[Path] = []
    mapped = archive._map

    def counted(ark: Path) -> mmap.mmap:
        opened.append(ark)
        return mapped(ark)

    monkeypatch.setattr(archive, "_map", counted)
    monkeypatch.setattr(archive, "MAX_OPEN_ARKS", most_open)
    together = threading.Barrier(6)

    def read(seed: int) -> None:
        together.wait()
        for key in np.random.default_rng(seed).permutation([*wanted] * 10):
            assert np.array_equal(store.read(str(key)), wanted[str(key)])

    with ThreadPoolExecutor(6) as pool:
        for job in [pool.submit(read, seed) for seed in range(6)]:
            job.result()
    assert set(opened) == {ark for ark, _ in store.places.values()}
    if most_open == 256:
        assert len(opened) == 5
    else:
        assert len(store._maps) == 2


def test_what_was_read_belongs_to_the_reader(tmp_path: Path) -> None:
    for stored in ("float16", "int8"):
        store = archive.Store(_store(tmp_path / stored, {"u1": _frames()}, stored))
        first = store.read("u1")
        kept = first.copy()
        first[:] = 0
        assert np.array_equal(store.read("u1"), kept)


def test_an_archive_that_was_cut_after_it_was_opened_is_an_error_not_a_crash(tmp_path: Path) -> None:
    store = archive.Store(_store(tmp_path, {"u1": _frames(400), "u2": _frames(400)}))
    ark, offset = store.places["u2"]
    store.read("u1")
    for length, message in ((offset + 1_000, "u2 runs past the end of the file"), (10, "is no float16 or int8")):
        os.truncate(ark, length)
        with pytest.raises(DataError, match=message):
            store.read("u2")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for value in (np.nan, np.inf):
        matrix = MATRICES["u1"].copy()
        matrix[2, 1] = value
        assert _value(tmp_path, _numpy_value(matrix)) == (
            "feats.ark:3: u1 holds values that are NaN or infinite; run stage 2 again"
        )


def test_a_matrix_of_another_width_is_named(tmp_path: Path) -> None:
    matrices = {**MATRICES, "u2": np.ones((5, 1), np.float16)}
    store = archive.Store(_store(tmp_path, matrices))
    assert store.width_h == 3
    assert store.read("u1").shape == (4, 3)
    with pytest.raises(DataError, match=r"feats\.ark:\d+: u2 has 1 channels, u1 has 3; run stage 2 again"):
        store.read("u2")


@pytest.mark.parametrize("columns", [0, 999_999_999_999])
def test_a_width_that_no_encoder_has_is_refused(tmp_path: Path, columns: int) -> None:
    assert _value(tmp_path, _numpy_value(np.zeros((0, 3), np.float16), f"(0, {columns})"), 0) == (
        f"feats.ark:3: has {columns} channels; run stage 2 again"
    )


def test_a_missing_archive_is_named_when_the_store_is_opened_and_when_it_is_read(tmp_path: Path) -> None:
    store = archive.Store(_store(tmp_path))
    (tmp_path / "feats.ark").unlink()
    with pytest.raises(DataError, match=r"feats\.ark: no such archive; run stage 2 again"):
        store.read("u1")
    with pytest.raises(DataError, match=r"feats\.ark: no such archive; run stage 2 again"):
        archive.Store(tmp_path)
    (tmp_path / "feats.ark").touch()
    with pytest.raises(DataError, match=r"feats\.ark: is empty; run stage 2 again"):
        archive.Store(tmp_path).read("u1")


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

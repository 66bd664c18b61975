"""Random bytes in every file that is read: one of our faults or what the file says; no traceback, hang or growth."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scenes
import yaml
from fuzzing import EXAMPLES, ODD, Hangs, Watch, changed, lines, often
from hypothesis import given
from hypothesis import strategies as st

from speechllm.config import load as configs
from speechllm.data import archive, kaldi, pipes
from speechllm.decode.hotwords import Hotwords, read_hotwords
from speechllm.dump_mark import read_mark
from speechllm.errors import DataError, UserError
from speechllm.model import assemble
from speechllm.score import table
from speechllm.score.run import ScoreOptions, score_files
from speechllm.score.signature import tool
from speechllm.text.reading import katakana_reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

TEXT = ("u0 今日はいい天気です。", "u1 明日は 雨が降ります。", "u2 これは3冊の本です。", "u3\t東京")
SEGMENTS = ("u0 r0 0.0 0.2", "u1 r0 0.2 0.5", "u2 r1 0 0.4", "u3 r1 0.25 0.5")
COMMANDS = ("sox a.wav -t wav - |", "sph2pipe -f wav 'a b.sph' | sox -t wav - -r 16000 -t wav - |", "cat x |")
WORDS = ("難波\tナンバ", "日本橋\tにっぽんばし", "東京", "ＡＢＣ\tエービーシー")
DEBUG = Path(__file__).resolve().parents[2] / "egs/jsut/asr1/conf/debug.yaml"
YAML = tuple(DEBUG.read_text(encoding="utf-8").splitlines())
PLAIN = (
    "1",
    "-3",
    "1e-4",
    "true",
    "no",
    "~",
    "2001-01-01",
    "1:30",
    "0x1F",
    "<<",
    "=",
    "wavlm",
    "[1, 2]",
    "{a: b}",
    *ODD,
)
KEYS = ("seed", "encoder", "lm", "name", "projector", "kind", "lora", "rank", "train", "decode", "extends", "beam", "x")


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    """Watch over the readers; none may have been asked seldom, as where hypothesis finds nothing new."""
    katakana_reading("難波")  # its dictionaries stay
    watch = Watch()
    yield watch
    assert all(count > EXAMPLES / 2 for count in watch.calls.values()), watch.calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data directory of four utterances."""
    return scenes.corpus(tmp_path_factory.mktemp("fuzz")).data


def accepted(data: bytes) -> list[str]:
    """Return the lines of a file that was not refused, found by other means."""
    text = data.decode("utf-8")
    return [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line.strip(" \t")]


@often
@given(data=lines(TEXT))
def test_text(watch: Watch, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "text"
    path.write_bytes(data)
    read = watch.outcome("text", len(data), lambda: len(kaldi.read_table(path)))
    if isinstance(read, UserError):
        return
    table = kaldi.read_table(path)
    wanted = accepted(data)
    assert list(table) == [line.replace("\t", " ").split(" ")[0] for line in wanted]
    assert [key + value for key, value in table.items()] == [
        line[: len(key)] + line[len(key) :].strip(" \t") for key, line in zip(table, wanted, strict=True)
    ]
    assert not any("/" in key or "\x00" in key + value for key, value in table.items())


@often
@given(data=lines(TEXT), name=st.sampled_from(["text", "utt2spk", "spk2utt", "utt2dur"]))
def test_a_data_directory_with_one_odd_table(watch: Watch, folder: Path, data: bytes, name: str) -> None:
    before = (folder / name).read_bytes() if (folder / name).exists() else None
    (folder / name).write_bytes(data)
    try:
        faults = watch.outcome("tables", len(data), lambda: len(kaldi.validate(folder).faults))
    finally:
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
    assert isinstance(faults, int)


@often
@given(data=st.data())
def test_wav_scp(watch: Watch, folder: Path, data: st.DataObject) -> None:
    good = (folder / "wav.scp").read_text(encoding="utf-8")
    written = data.draw(lines((*good.splitlines(), *(f"u0 {command}" for command in COMMANDS))))
    (folder / "wav.scp").write_bytes(written)
    try:
        faults = watch.outcome("wav.scp", len(written), lambda: len(kaldi.validate(folder, with_audio=True).faults))
    finally:
        (folder / "wav.scp").write_text(good, encoding="utf-8")
    assert isinstance(faults, int)


@often
@given(data=lines(COMMANDS))
def test_commands_in_wav_scp(watch: Watch, data: bytes) -> None:
    value = data.decode("utf-8", "replace")
    read = watch.outcome("commands", len(data), lambda: len(pipes.commands_of("here", value)))
    if isinstance(read, int):
        chain = pipes.commands_of("here", value)
        assert {words[0] for words in chain} <= set(pipes.PROGRAMS)
        assert not any("$" in word or "`" in word for words in chain for word in words)


@often
@given(data=lines(SEGMENTS))
def test_segments(watch: Watch, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "cut"
    folder.mkdir(exist_ok=True)
    scenes.write_table(folder / "wav.scp", {"r0": "/a.wav", "r1": "/b.wav"})
    (folder / "segments").write_bytes(data)
    read = watch.outcome("segments", len(data), lambda: len(kaldi.load(folder, need_text=False)))
    if not isinstance(read, UserError):
        for utt in kaldi.load(folder, need_text=False).utterances.values():
            assert utt.end_s is not None
            assert 0 <= utt.start_s < utt.end_s < math.inf


@dataclass(frozen=True)
class Archive:
    """A store of features, its archive's bytes, and what it holds."""

    folder: Path
    ark: bytes
    matrices: dict[str, NDArray[np.float32]]

    def read(self) -> int:
        """Return the number of matrices that can be read; each must be a matrix of finite values."""
        store = archive.Store(self.folder)
        good = 0
        for key in store.places:
            try:
                frames = store.read(key)
            except DataError:
                continue
            good += 1
            assert np.isfinite(frames).all()
            assert len(frames) == store.frames[key]
            if store.crcs:
                np.testing.assert_array_equal(frames, self.matrices[key])
        return good


@pytest.fixture(scope="module", params=["with checksums", "without"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(3)
    matrices = {f"u{n}": rng.integers(-9, 9, (n + 2, 4)).astype(np.float32) for n in range(3)}
    ark = folder / "feats.0000.ark"
    frames = archive.write_archive(ark, iter(matrices.items()))
    (folder / "feats.scp").write_bytes((folder / "feats.0000.scp").read_bytes())
    kaldi.write_table(folder / "utt2num_frames", {key: str(count) for key, count in frames.items()})
    if request.param == "with checksums":
        kaldi.write_table(folder / "utt2crc", archive.checksums(ark))
    return Archive(folder, ark.read_bytes(), matrices)


@often
@given(data=st.data())
def test_headers_of_archives(watch: Watch, store: Archive, data: st.DataObject) -> None:
    first = data.draw(st.sampled_from([store.ark.index(b"NPY", n) for n in (0, 100, 250)]))
    blob = data.draw(changed(store.ark, first, first + 140))
    if data.draw(st.booleans()):
        old, new = data.draw(
            st.sampled_from([(b"(2, ", b"(2147483648, "), (b"<f2", b"|i1"), (b"4)", b"999999999999)")])
        )
        blob = store.ark.replace(old, new, 1)
    (store.folder / "feats.0000.ark").write_bytes(blob)
    good = watch.outcome("headers", len(blob), store.read)
    assert isinstance(good, UserError) or 0 <= good <= len(store.matrices)


@often
@given(data=st.data(), name=st.sampled_from(["feats.scp", "utt2num_frames"]))
def test_tables_of_archives(watch: Watch, store: Archive, data: st.DataObject, name: str) -> None:
    (store.folder / "feats.0000.ark").write_bytes(store.ark)
    good = (store.folder / name).read_text(encoding="utf-8")
    blob = data.draw(lines(good.splitlines()))
    (store.folder / name).write_bytes(blob)
    try:
        read = watch.outcome("tables of archives", len(blob), store.read)
    finally:
        (store.folder / name).write_text(good, encoding="utf-8")
    assert isinstance(read, UserError) or 0 <= read <= max(len(store.matrices), len(blob.splitlines()))


def nested(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), nested, max_leaves=8
)
TREES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5).map(lambda tree: yaml.safe_dump(tree).encode())
ENTRIES = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(PLAIN)).map(": ".join), max_size=4)


@often
@given(
    data=lines(YAML) | TREES | ENTRIES.map(lambda made: "\n".join(made).encode("utf-8", "surrogatepass")),
    whole=st.booleans(),
    override=st.none() | st.tuples(st.sampled_from(KEYS), st.sampled_from(PLAIN)).map("=".join) | st.text(max_size=20),
)
def test_yaml(
    watch: Watch, tmp_path_factory: pytest.TempPathFactory, data: bytes, override: str | None, *, whole: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "conf.yaml"
    (path.parent / "wavlm.yaml").write_bytes(DEBUG.read_bytes())
    path.write_bytes(DEBUG.read_bytes() + b"\n" + data if whole else data)
    changes = () if override is None else (override,)

    def read() -> None:
        assert configs.load(path, changes).encoder.name

    watch.outcome("yaml", len(data) + 1000, read)


@often
@given(
    ref=lines(TEXT),
    hyp=st.none() | lines(TEXT),
    more=st.sampled_from(["groups", "ref_kana", ""]),
    extra=lines(("u0 キョウ", "u1 a", "u2 b")),
    deletions=st.booleans(),
)
def test_score_inputs(  # noqa: PLR0913 - the files of a scoring
    watch: Watch,
    tmp_path_factory: pytest.TempPathFactory,
    ref: bytes,
    hyp: bytes | None,
    more: str,
    extra: bytes,
    *,
    deletions: bool,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "score"
    folder.mkdir(exist_ok=True)
    for name, blob in (("ref", ref), ("hyp", ref if hyp is None else hyp), ("more", extra)):
        (folder / name).write_bytes(blob)
    chosen = {more: folder / "more"} if more else {}
    options = ScoreOptions(bootstrap=10, report=False, missing_as_deletions=deletions, **chosen)  # type: ignore[arg-type]

    def score() -> None:
        made = score_files(folder / "ref", folder / "hyp", folder / "out", options)
        if hyp is None:
            assert made["metrics"]["cer"]["value"] == 0

    watch.outcome("score", len(ref) + len(hyp or ref) + len(extra), score)


@st.composite
def altered(draw: st.DrawFn, value: object) -> object:
    """Return a value of JSON in which a part is another, or is gone."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        others = {name: one for name, one in value.items() if name != key}
        return {**others, key: draw(altered(value[key]))} if draw(st.integers(0, 3)) else others
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(altered(value[at])), *value[at + 1 :]]
    return draw(VALUES | st.sampled_from(ODD))


def read_a_table(path: Path) -> str:
    description = path.with_name("table.yaml")
    description.write_text(f"title: t\nabout: a\nrows: [{{name: n, score: {path}, command: c}}]\n", encoding="utf-8")
    shown = table.write_table([description], path.with_name("RESULTS.md"))
    (line,) = (line for line in shown.splitlines() if line.startswith("| n |"))
    return line.rpartition(" | ")[2].removesuffix(" |")


def read_a_model(path: Path) -> int:
    (path.parent / assemble.CONFIG_FILE).write_bytes(DEBUG.read_bytes())
    (path.parent / assemble.TRAINED_FILE).touch()
    return assemble.read_model(path.parent)[1].width_h


RATE = {"value": 0.25, "ci95": [0.125, 0.5], "signature": f"metric:cer|tool:{tool()}"}
TRAINING = {"trainable": 4, "minutes": 3.5, "trained_on": {"training set": "a", "training hours": 1.5}}
RUN = {"training": TRAINING, "versions": {"torch": "2"}, "weights": {"encoder": "f0"}, "model": {"fingerprint": "f"}}
RECORDS: dict[str, dict[str, object]] = {
    "score.json": {
        "signature": RATE["signature"],
        "num_utts": 3,
        "metrics": {"cer": RATE, "wer": RATE},
        "groups": {"heard": {"metrics": {"cer": RATE}}},
        "made_from": {"ref_sha256": "0", "hyp_sha256": "1", "run": RUN},
    },
    "feats.0000.json": {
        "fingerprint": "f0",
        "seen": {"bytes": 3, "mtime_ns": 4},
        "sha256": "00",
        "frames": {"u0": 3, "u1": 4},
        "crc32": {"u0": "00", "u1": "01"},
        "dropped": {"u2": "is cut short"},
    },
    "model.json": {
        "format": 1,
        "width_h": 6,
        "encoder_fingerprint": "f0",
        "lm_fingerprint": "f1",
        "kept_ids": [1, 2, 5],
        "text_profiles": ["train_v1"],
    },
}
READ: dict[str, Callable[[Path], object]] = {
    "score.json": read_a_table,
    "feats.0000.json": lambda path: read_mark(path).frames,
    "model.json": read_a_model,
}
SAID: dict[str, Callable[[dict[str, object]], object]] = {
    "score.json": lambda record: str(record["num_utts"]),
    "feats.0000.json": lambda record: record["frames"],
    "model.json": lambda record: record["width_h"],
}


@often
@given(data=st.data(), name=st.sampled_from(sorted(RECORDS)))
def test_records(watch: Watch, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "records"
    folder.mkdir(exist_ok=True)
    blob = json.dumps(data.draw(altered(RECORDS[name]))).encode()
    if data.draw(st.integers(0, 4)) == 0:
        blob = data.draw(changed(blob))
    (folder / name).write_bytes(blob)
    found = watch.outcome("records", len(blob) + 1000, lambda: READ[name](folder / name))
    assert isinstance(found, UserError) or found == SAID[name](json.loads(blob.decode("utf-8")))


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_nothing_was_done_to_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(RECORDS[name]), encoding="utf-8")
    assert READ[name](tmp_path / name) == SAID[name](RECORDS[name])


@often
@given(data=lines(WORDS))
def test_hotwords(watch: Watch, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "words"
    path.write_bytes(data)

    def read() -> int:
        words = read_hotwords(path)
        assert isinstance(words, Hotwords)
        assert all(word.surface and word.reading for word in words.words)
        return len(words)

    count = watch.outcome("hotwords", len(data), read)
    assert isinstance(count, UserError) or count == len([line for line in accepted(data) if line.strip()])


def test_the_watch_sees_a_hang_a_peak_and_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang() -> None:
        while True:
            pass

    own, kept = Watch(), list[bytes]()
    with pytest.raises(AssertionError, match=r"took \d+ bytes for 1"):
        own.outcome("peak", 1, lambda: len(bytes(1 << 25)))
    with pytest.raises(AssertionError, match="bytes are left after"):
        own.outcome("kept", 1, lambda: kept.append(b"x" * len(kept)))
    monkeypatch.setattr("fuzzing.LIMIT_S", 0.05)
    with pytest.raises(Hangs):
        own.outcome("hang", 1, hang)

"""Stage 2: features in shards, each made once, none half believed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
from filelock import FileLock

from speechllm import dump as dumping
from speechllm.config.schema import EncoderConfig
from speechllm.data import audio
from speechllm.data.archive import Store
from speechllm.data.dataset import FeatureSet
from speechllm.dump import MARK, dump
from speechllm.errors import DataError
from speechllm.model.encoder import load_encoder

if TYPE_CHECKING:
    from pathlib import Path

SAMPLES = {"a": 9_000, "b": 4_000, "c": 12_345, "d": 400, "e": 7_000}
SHARDS = 3


@dataclass(frozen=True)
class Setting:
    """Where the sounds and the encoders are, and a dump of them that is whole."""

    data: Path
    wavlm: Path
    whisper: Path
    done: Path


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Make the dump once as a user does, in a process of its own."""
    base = tmp_path_factory.mktemp("dump")
    made = Setting(
        tiny.data_folder(base / "in", SAMPLES),
        tiny.wavlm(base / "wavlm"),
        tiny.whisper(base / "whisper"),
        base / "done",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dumping, "UTTS_PER_SHARD", 2)
        assert dump(EncoderConfig(name=str(made.wavlm)), "cpu", made.data, made.done, workers=1) == len(SAMPLES)
    return made


@pytest.fixture(autouse=True)
def in_this_process(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setting.done.is_dir()
    tiny.HerePool.sizes.clear()
    monkeypatch.setattr(dumping, "UTTS_PER_SHARD", 2)
    monkeypatch.setattr("speechllm.dump.os.cpu_count", lambda: 1)
    monkeypatch.setattr("speechllm.dump.worker_pool", tiny.HerePool)


@pytest.fixture
def out(setting: Setting, tmp_path: Path) -> Path:
    """Return a copy of the whole dump."""
    return shutil.copytree(setting.done, tmp_path / "out")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of the shards that are made from now on."""
    numbers: list[int] = []
    write = dumping._write_shard

    def counted(shard: dumping.Shard) -> int:
        numbers.append(shard.number)
        return write(shard)

    monkeypatch.setattr(dumping, "_write_shard", counted)
    return numbers


def run(setting: Setting, out: Path, **fields: Any) -> int:
    config = EncoderConfig(**{"name": str(setting.wavlm), **fields})
    return dump(config, "cpu", setting.data, out, workers=1)


def interrupt(out: Path) -> None:
    """Leave `out` as a run leaves it that was killed before its end."""
    content = json.loads((out / MARK).read_text(encoding="utf-8"))
    (out / MARK).write_text(json.dumps({**content, "complete": False}), encoding="utf-8")
    for name in ("feats.scp", "utt2num_frames", "text"):
        (out / name).unlink()


def arks(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.ark"))}


def assert_whole(out: Path, setting: Setting) -> None:
    found, wanted = FeatureSet(out), FeatureSet(setting.done)
    assert found.examples == wanted.examples
    for key in wanted.examples:
        np.testing.assert_array_equal(found.frames(key), wanted.frames(key))


def test_features_are_the_encoders_output_in_float16(setting: Setting) -> None:
    encoder = load_encoder(EncoderConfig(name=str(setting.wavlm)), tiny.found(setting.wavlm), tiny.CPU)
    store = Store(setting.done)
    assert store.places.keys() == SAMPLES.keys()
    for key in SAMPLES:
        alone_eh = encoder.encode([audio.read(setting.data.parent / "wav" / f"{key}.wav")])[0].numpy()
        assert store.read(key).dtype == np.float16
        # one by one instead of in a batch: the last bit of float16 may fall otherwise
        np.testing.assert_allclose(store.read(key), alone_eh.astype(np.float16), rtol=2**-10, atol=1e-4)


def test_as_many_frames_are_stored_as_the_encoder_counts(setting: Setting) -> None:
    encoder = load_encoder(EncoderConfig(name=str(setting.wavlm)), tiny.found(setting.wavlm), tiny.CPU)
    assert Store(setting.done).frames == {key: encoder.num_frames(count) for key, count in SAMPLES.items()}


def test_the_tables_of_the_data_directory_come_along(setting: Setting) -> None:
    for name in ("text", "utt2spk", "spk2utt", "utt2dur", "wav.scp"):
        assert (setting.done / name).read_bytes() == (setting.data / name).read_bytes()
    assert len(arks(setting.done)) == SHARDS
    assert not list(setting.done.glob(".tmp*"))


def test_a_dump_can_be_moved_elsewhere(setting: Setting, out: Path) -> None:
    assert_whole(out, setting)
    assert str(setting.done) not in (out / "feats.scp").read_text(encoding="utf-8")


def test_a_second_run_does_nothing(setting: Setting, out: Path, made: list[int]) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    assert run(setting, out) == len(SAMPLES)
    assert made == []
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"} == before


@pytest.mark.parametrize("lost", ["feats.0001.json", "feats.0001.ark", "feats.0001.scp"])
def test_an_interrupted_run_makes_only_the_shards_that_are_not_whole(
    setting: Setting, out: Path, made: list[int], lost: str
) -> None:
    interrupt(out)
    (out / lost).unlink()
    run(setting, out)
    assert made == [1]
    assert_whole(out, setting)


def test_a_run_that_was_killed_before_its_tables_only_writes_them(setting: Setting, out: Path, made: list[int]) -> None:
    interrupt(out)
    run(setting, out)
    assert made == []
    assert_whole(out, setting)


@pytest.mark.parametrize("place", [0, 200, -1])
def test_a_shard_with_a_changed_byte_is_made_again(setting: Setting, out: Path, made: list[int], place: int) -> None:
    interrupt(out)
    ark = out / "feats.0002.ark"
    blob = bytearray(ark.read_bytes())
    blob[place] ^= 1
    ark.write_bytes(blob)
    run(setting, out)
    assert made == [2]
    assert_whole(out, setting)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"fingerprint": "x"}'])
def test_a_shard_with_a_broken_mark_is_made_again(setting: Setting, out: Path, made: list[int], content: str) -> None:
    interrupt(out)
    (out / "feats.0000.json").write_text(content, encoding="utf-8")
    run(setting, out)
    assert made == [0]
    assert_whole(out, setting)


def test_a_shard_that_fails_half_way_leaves_no_archive(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(_matrix: object, utt_id: str) -> object:
        raise DataError(utt_id, "is broken", "mend it")

    monkeypatch.setattr(dumping, "_half", half)
    with pytest.raises(DataError, match="is broken"):
        run(setting, tmp_path / "out")
    assert arks(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layer": 1}, "layer = None, now it is 1"),
        ({"dtype": "bfloat16"}, "dtype = float32, now it is bfloat16"),
        ({"pad_to_30s": True}, "pad_to_30s = False, now it is True"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_another_setting_of_the_encoder_is_refused_by_name(
    setting: Setting, out: Path, fields: dict[str, Any], named: str, *, complete: bool
) -> None:
    before = arks(out)
    if not complete:
        interrupt(out)
    with pytest.raises(DataError, match=f"holds output made with {named}; remove the folder or choose another"):
        run(setting, out, **fields)
    assert arks(out) == before


def test_another_encoder_is_refused_by_name(setting: Setting, out: Path) -> None:
    with pytest.raises(DataError, match="holds output made with encoder"):
        run(setting, out, name=str(setting.whisper))


def test_other_weights_under_the_same_name_are_refused(setting: Setting, out: Path) -> None:
    weights = setting.wavlm / "model.safetensors"
    kept = weights.rename(setting.wavlm / "kept")  # encoders that are loaded still read from it
    blob = kept.read_bytes()
    weights.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    try:
        with pytest.raises(DataError, match="holds output made with encoder_fingerprint = "):
            run(setting, out)
    finally:
        kept.rename(weights)


def test_a_mended_transcript_reaches_a_finished_dump(setting: Setting, out: Path, made: list[int]) -> None:
    text = setting.data / "text"
    before = text.read_text(encoding="utf-8")
    text.write_text(before.replace("今日", "昨日"), encoding="utf-8")
    try:
        run(setting, out)
        assert (out / "text").read_bytes() == text.read_bytes() != before.encode()
    finally:
        text.write_text(before, encoding="utf-8")
    assert made == []


def test_another_sound_under_the_same_name_is_refused(setting: Setting, out: Path) -> None:
    wav = setting.data.parent / "wav/a.wav"
    before = wav.read_bytes()
    wav.write_bytes(before[:-2] + bytes([before[-2] ^ 1, before[-1]]))
    try:
        with pytest.raises(DataError, match="holds output made with data = "):
            run(setting, out)
    finally:
        wav.write_bytes(before)


def test_a_folder_that_another_process_writes_to_is_refused(setting: Setting, out: Path) -> None:
    with FileLock(out / ".lock"), pytest.raises(DataError, match="another process is writing here; wait for it to end"):
        run(setting, out)


def test_a_missing_sound_is_named_before_anything_is_made(setting: Setting, tmp_path: Path, made: list[int]) -> None:
    scp = setting.data / "wav.scp"
    before = scp.read_text(encoding="utf-8")
    scp.write_text(before.replace("c.wav", "gone.wav"), encoding="utf-8")
    try:
        with pytest.raises(DataError, match=r"gone\.wav: no such audio file"):
            run(setting, tmp_path / "out")
    finally:
        scp.write_text(before, encoding="utf-8")
    assert made == []


def test_a_sound_that_is_too_short_is_named(tmp_path: Path, setting: Setting) -> None:
    data = tiny.data_folder(tmp_path / "in", {"short": 399})
    with pytest.raises(DataError, match=r"short\.wav \(utterance short\): lasts 0\.025 s, too short"):
        dump(EncoderConfig(name=str(setting.wavlm)), "cpu", data, tmp_path / "out", workers=1)


def test_a_value_that_float16_cannot_hold_is_named() -> None:
    with pytest.raises(DataError, match="u1: has features that float16 cannot hold"):
        dumping._half(np.array([[1.0, 7e4]], dtype=np.float32), "u1")


@pytest.mark.parametrize(("number", "used"), [(2, 2), (9, SHARDS)])
def test_a_dump_does_not_depend_on_the_number_of_workers(
    setting: Setting, tmp_path: Path, number: int, used: int
) -> None:
    config = EncoderConfig(name=str(setting.wavlm))
    dump(config, "cpu", setting.data, tmp_path / "out", workers=number)
    assert tiny.HerePool.sizes == [used]
    assert_whole(tmp_path / "out", setting)


def test_whisper_is_dumped_like_any_other_encoder(setting: Setting, tmp_path: Path) -> None:
    run(setting, tmp_path / "out", name=str(setting.whisper), pad_to_30s=True)
    assert Store(tmp_path / "out").frames["c"] == 39
    assert Store(tmp_path / "out").read("c").shape == (39, 16)

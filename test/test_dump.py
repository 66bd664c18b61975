"""Stage 2: features in shards, each made once, none half believed."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from filelock import FileLock

from speechllm import cli
from speechllm import dump as dumping
from speechllm.config.schema import EncoderConfig
from speechllm.data import archive, audio, kaldi
from speechllm.data.archive import Store
from speechllm.data.dataset import FeatureSet
from speechllm.dump import MARK, Leeway, dump
from speechllm.errors import ConfigError, DataError
from speechllm.folders import only_writer
from speechllm.model.encoder import load_encoder
from speechllm.model.identity import check_dump
from speechllm.runtime import sha256

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
    monkeypatch.setattr("speechllm.dump.worker_pool", tiny.HerePool)


@pytest.fixture
def out(setting: Setting, tmp_path: Path) -> Path:
    """Return a copy of the whole dump."""
    return shutil.copytree(setting.done, tmp_path / "out")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of the shards that are made from now on."""
    numbers: list[int] = []
    write = dumping._write_shards

    def counted(shards: list[dumping.Shard]) -> int:
        numbers.extend(shard.number for shard in shards)
        return write(shards)

    monkeypatch.setattr(dumping, "_write_shards", counted)
    return numbers


def run(setting: Setting, out: Path, part: dumping.Part | None = None, **fields: Any) -> int:
    config = EncoderConfig(**{"name": str(setting.wavlm), **fields})
    return dump(config, "cpu", setting.data, out, 1, part)


def interrupt(out: Path) -> None:
    """Leave `out` as a run leaves it that was killed before its end."""
    content = json.loads((out / MARK).read_text(encoding="utf-8"))
    (out / MARK).write_text(json.dumps({**content, "complete": False}), encoding="utf-8")
    for name in ("feats.scp", "utt2num_frames", "utt2crc", "text"):
        (out / name).unlink()


def flip(path: Path, place: int) -> None:
    """Change a bit of a file and nothing that `stat` tells of it."""
    status = path.stat()
    blob = bytearray(path.read_bytes())
    blob[place] ^= 1
    path.write_bytes(blob)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def arks(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.ark"))}


def files(out: Path) -> dict[str, bytes]:
    """Return what a dump is, without what says how and when it was made."""
    kept = [path for path in out.iterdir() if path.is_file() and path.name not in {".lock", "provenance.json"}]
    found = {path.name: path.read_bytes() for path in kept}
    for name in [name for name in found if name.startswith("feats.") and name.endswith(".json")]:
        mark = json.loads(found[name])
        del mark["seen"]["mtime_ns"]
        found[name] = json.dumps(mark).encode()
    return found


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
        assert np.array_equal(store.read(key), store.read(key).astype(np.float16))
        # one by one instead of in a batch: the last bit of float16 may fall otherwise
        np.testing.assert_allclose(store.read(key), alone_eh.astype(np.float16), rtol=2**-10, atol=1e-4)


def test_features_are_the_encoders_output_in_int8(setting: Setting, tmp_path: Path) -> None:
    run(setting, tmp_path / "out", stored="int8")
    encoder = load_encoder(EncoderConfig(name=str(setting.wavlm)), tiny.found(setting.wavlm), tiny.CPU)
    found = FeatureSet(tmp_path / "out")
    assert json.loads((tmp_path / "out" / MARK).read_text(encoding="utf-8"))["record"]["stored"] == "int8"
    assert found.store.crcs.keys() == SAMPLES.keys()
    for key in SAMPLES:
        alone_eh = encoder.encode([audio.read(setting.data.parent / "wav" / f"{key}.wav")])[0].numpy()
        scale_e1 = np.abs(alone_eh).max(axis=1, keepdims=True) / 127
        assert (np.abs(found.frames(key) - alone_eh) <= 0.5 * scale_e1 + 1e-4).all()


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
@pytest.mark.parametrize("complete", [True, False])
def test_a_shard_with_a_changed_byte_is_made_again(
    setting: Setting, out: Path, made: list[int], place: int, *, complete: bool
) -> None:
    if not complete:
        interrupt(out)
    flip(out / "feats.0002.ark", place)
    os.utime(out / "feats.0002.ark")
    run(setting, out)
    assert made == [2]
    assert files(out) == files(setting.done)


def test_a_bit_that_flipped_by_itself_is_told_by_the_reader_and_mended_by_the_next_run(
    setting: Setting, out: Path, made: list[int]
) -> None:
    ark, offset = Store(out).places["e"]
    number = int(ark.name.split(".")[1])
    flip(ark, -1)
    run(setting, out)
    assert made == []  # archives that look untouched are not read
    for _ in range(2):
        features = FeatureSet(out)
        with pytest.raises(DataError, match=rf"{ark.name}:{offset}: e is not what was written there .*; run stage 2"):
            [features.frames(key) for key in SAMPLES]
    run(setting, out)
    assert made == [number]
    assert not archive.suspect(ark).exists()
    assert files(out) == files(setting.done)


def test_a_run_that_was_stopped_while_it_mended_goes_on(
    setting: Setting, out: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.suspect(out / "feats.0001.ark").touch()

    def fail(_shards: object) -> int:
        raise DataError("a", "is gone for now", "wait")

    with monkeypatch.context() as patch:
        patch.setattr(dumping, "_write_shards", fail)
        with pytest.raises(DataError, match="is gone for now"):
            run(setting, out)
    assert json.loads((out / MARK).read_text(encoding="utf-8"))["complete"] is False
    run(setting, out)
    assert made == [1]
    assert files(out) == files(setting.done)


@pytest.mark.parametrize("content", ["a feats.0000.ark:2\n", "a feats.0000.ark:x\nd feats.0000.ark:9\n", "\xff"])
@pytest.mark.parametrize("touched", [True, False])
def test_a_shard_whose_places_are_damaged_is_made_again(
    setting: Setting, out: Path, made: list[int], content: str, *, touched: bool
) -> None:
    (out / "feats.0000.scp").write_bytes(content.encode("latin-1"))
    if touched:
        os.utime(out / "feats.0000.ark")
    run(setting, out)
    assert made == [0]
    assert files(out) == files(setting.done)


@pytest.mark.parametrize(
    "damage",
    [{"frames": None}, {"frames": {}}, {"frames": {"a": 0}}, {"frames": {"a": "7"}}, {"dropped": ["a"]}, {"sha256": 7}],
)
def test_a_shard_whose_mark_is_damaged_is_made_again(
    setting: Setting, out: Path, made: list[int], damage: dict[str, object]
) -> None:
    mark = out / "feats.0000.json"
    mark.write_text(json.dumps(json.loads(mark.read_text(encoding="utf-8")) | damage), encoding="utf-8")
    run(setting, out)
    assert made == [0]
    assert files(out) == files(setting.done)


@pytest.mark.parametrize("content", ["", "a 1\n", "b feats.0000.ark:x\n"])
@pytest.mark.parametrize("name", ["feats.scp", "utt2num_frames", "utt2crc"])
def test_a_table_that_was_damaged_is_written_again(
    setting: Setting, out: Path, made: list[int], name: str, content: str
) -> None:
    (out / name).write_text(content, encoding="utf-8")
    run(setting, out)
    assert made == []
    assert files(out) == files(setting.done)


def test_a_dump_of_before_there_were_checksums_is_read_and_gets_them(
    setting: Setting, out: Path, made: list[int]
) -> None:
    (out / "utt2crc").unlink()
    for mark in out.glob("feats.*.json"):
        content = json.loads(mark.read_text(encoding="utf-8"))
        mark.write_text(json.dumps({name: content[name] for name in ("fingerprint", "sha256", "frames")}))
    assert_whole(out, setting)
    run(setting, out)
    assert made == []
    assert files(out) == files(setting.done)


def test_a_copy_with_other_times_is_read_once_and_kept(
    setting: Setting, out: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(ark: Path) -> str:
        read.append(ark.name)
        return sha256(ark)

    monkeypatch.setattr("speechllm.dump.sha256", counted)
    for ark in out.glob("*.ark"):
        os.utime(ark)
    for _ in range(2):
        run(setting, out)
    assert made == []
    assert sorted(read) == sorted(arks(out))
    assert files(out) == files(setting.done)


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
    def pack(utt_id: str, *_rest: object) -> object:
        raise DataError(utt_id, "is broken", "mend it")

    monkeypatch.setattr(archive, "pack", pack)
    with pytest.raises(DataError, match="is broken"):
        run(setting, tmp_path / "out")
    assert arks(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layer": 1}, "layer = None, now it is 1"),
        ({"dtype": "bfloat16"}, "dtype = float32, now it is bfloat16"),
        ({"pad_to_30s": True}, "pad_to_30s = False, now it is True"),
        ({"stored": "int8"}, "stored = float16, now it is int8"),
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


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("stored", ["float16", "int8"])
def test_parts_and_the_run_after_them_make_what_one_run_makes(
    setting: Setting, tmp_path: Path, made: list[int], parts: int, stored: str
) -> None:
    run(setting, tmp_path / "one", stored=stored)
    made.clear()
    out = tmp_path / "out"
    counts = [run(setting, out, (part, parts), stored=stored) for part in reversed(range(parts))]
    assert sum(counts) == len(SAMPLES)
    assert sorted(made) == list(range(SHARDS))
    assert not (out / "feats.scp").exists()
    assert json.loads((out / MARK).read_text(encoding="utf-8"))["complete"] is False
    run(setting, out, (0, parts), stored=stored)
    assert len(made) == SHARDS
    assert run(setting, out, stored=stored) == len(SAMPLES)
    assert len(made) == SHARDS
    assert files(out) == files(tmp_path / "one")


def test_the_run_after_the_parts_makes_what_they_left(setting: Setting, tmp_path: Path, made: list[int]) -> None:
    run(setting, tmp_path / "out", (1, 3))
    assert made == [1]
    run(setting, tmp_path / "out")
    assert sorted(made) == [0, 1, 2]
    assert files(tmp_path / "out") == files(setting.done)


def test_a_part_mends_a_dump_that_was_complete(setting: Setting, out: Path, made: list[int]) -> None:
    archive.suspect(out / "feats.0001.ark").touch()
    run(setting, out, (0, 3))
    assert json.loads((out / MARK).read_text(encoding="utf-8"))["complete"] is True
    run(setting, out, (1, 3))
    assert json.loads((out / MARK).read_text(encoding="utf-8"))["complete"] is False
    run(setting, out)
    assert made == [1]
    assert files(out) == files(setting.done)


def test_two_parts_are_made_at_once(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=60)
    write = dumping._write_shards

    def together(shards: list[dumping.Shard]) -> int:
        if shards[0].number < 2:
            both.wait()
        return write(shards)

    monkeypatch.setattr(dumping, "_write_shards", together)
    out = tmp_path / "out"
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run, setting, out, (part, 2)) for part in range(2)]
        assert sum(job.result() for job in jobs) == len(SAMPLES)
    run(setting, out)
    assert files(out) == files(setting.done)


@pytest.mark.parametrize(
    ("held", "part"),
    [(".", (0, 2)), (".parts/1-of-2", (0, 2)), (".parts/1-of-3", (1, 2)), (".parts/2-of-2", None)],
    ids=["the whole", "the same part", "another division", "a part"],
)
def test_what_another_process_is_at_is_refused(
    setting: Setting,
    tmp_path: Path,
    made: list[int],
    monkeypatch: pytest.MonkeyPatch,
    held: str,
    part: dumping.Part | None,
) -> None:
    monkeypatch.setattr(dumping, "BEGIN_WAIT_S", 0.2)
    out = tmp_path / "out"
    with only_writer(out / held), pytest.raises(DataError) as caught:
        run(setting, out, part)
    assert str(caught.value) == f"{out / held}: another process is writing here; wait for it to end"
    assert made == []
    run(setting, out, part)
    assert made


def test_a_part_of_a_dump_made_with_another_setting_is_refused(setting: Setting, out: Path) -> None:
    with pytest.raises(DataError, match="holds output made with layer = None, now it is 1"):
        run(setting, out, (0, 2), layer=1)


@pytest.mark.parametrize("text", ["", "3", "0/8", "9/8", "3/0", "-1/8", "1/8/2", "a/b", "1 / 8", "3/999999", "３/８"])
def test_what_is_no_part_is_refused_in_one_line(
    text: str, setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = f"encoder: {{name: {setting.wavlm}}}\nlm: {{name: l}}\n"
    (tmp_path / "c.yaml").write_text(conf, encoding="utf-8")
    options = ["--conf", tmp_path / "c.yaml", "--data", setting.data, "--out", tmp_path / "out", f"--part={text}"]
    assert cli.run(["dump", *map(str, options)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --part: ")
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_part_is_made_from_the_command_line(
    setting: Setting, tmp_path: Path, made: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    conf = f"encoder: {{name: {setting.wavlm}}}\nlm: {{name: l}}\ndevice: cpu\n"
    (tmp_path / "c.yaml").write_text(conf, encoding="utf-8")
    options = ["--conf", tmp_path / "c.yaml", "--data", setting.data, "--out", tmp_path / "out", "--part", "2/3"]
    assert cli.run(["dump", *map(str, options)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: 2 utterances in part 2/3\n"
    assert made == [1]


def test_features_stored_otherwise_are_refused_unless_any_store_will_do(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(setting, out, stored="int8")
    config = EncoderConfig(name=str(setting.wavlm), stored="int8")
    assert check_dump(out, config)["stored"] == "int8"
    with pytest.raises(ConfigError) as caught:
        check_dump(out, config.model_copy(update={"stored": "float16"}))
    assert str(caught.value) == (
        f"{out}: was dumped with stored = int8, the model wants float16; "
        "run stage 2 with this configuration, into another folder"
    )
    assert check_dump(out, config.model_copy(update={"stored": "float16"}), any_store=True)["stored"] == "int8"
    with pytest.raises(ConfigError, match="was dumped with layer = None, the model wants 1"):
        check_dump(out, config.model_copy(update={"layer": 1}), any_store=True)


def shards_of(setting: Setting, out: Path) -> list[dumping.Shard]:
    config, data = EncoderConfig(name=str(setting.wavlm)), kaldi.load(setting.data)
    out.mkdir()
    return dumping._shards(config, "cpu", data, out, dumping._record(config, data))


def test_shards_that_are_made_together_are_those_made_alone(setting: Setting, tmp_path: Path, made: list[int]) -> None:
    out = tmp_path / "out"
    assert dumping._write_shards(shards_of(setting, out)) == len(SAMPLES)
    made.clear()
    run(setting, out)
    assert made == []
    assert files(out) == files(setting.done)


def test_a_sound_that_cannot_be_read_costs_only_its_own_features(
    setting: Setting, tmp_path: Path, made: list[int]
) -> None:
    """Of shards that are made together, too; what is whole already is not made again."""
    spoilt = replace(setting, data=tiny.data_folder(tmp_path / "in", SAMPLES))
    (tmp_path / "in/wav/e.wav").write_bytes(b"no sound")
    out = tmp_path / "out"
    assert dumping._write_shards(shards_of(spoilt, out)) == len(SAMPLES)
    made.clear()
    config = EncoderConfig(name=str(setting.wavlm))
    for leeway in (Leeway(0.1), dumping.STRICT):
        with pytest.raises(DataError, match=r"1 of 5 sounds cannot be read .*, first .*e\.wav.* is not audio"):
            dump(config, "cpu", spoilt.data, out, 1, leeway=leeway)
    assert dump(config, "cpu", spoilt.data, out, 1, leeway=Leeway(0.2)) == len(SAMPLES) - 1
    assert made == []
    kept, whole = FeatureSet(out), FeatureSet(setting.done)
    assert list(kept.examples) == [key for key in whole.examples if key != "e"]
    for key in kept.examples:
        np.testing.assert_allclose(kept.frames(key), whole.frames(key), rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize(("workers", "sizes"), [(1, [8, 8, 8, 6]), (2, [8, 8, 8, 6]), (9, [8, 8, 8, 6])])
def test_gpus_take_several_shards_in_one_go_and_one_process_each(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, sizes: list[int]
) -> None:
    jobs: list[list[dumping.Shard]] = []

    def write(shards: list[dumping.Shard]) -> int:
        jobs.append(shards)
        return 0

    monkeypatch.setattr(dumping, "_write_shards", write)
    monkeypatch.setattr("speechllm.dump.pick_device", lambda _name: torch.device("cuda"))
    monkeypatch.setattr(dumping, "_gpus", lambda _name: 2)
    shards = shards_of(setting, tmp_path / "out")
    dumping._write_all(shards * 10, workers)
    assert tiny.HerePool.sizes == [min(workers, 2)]
    assert [len(job) for job in jobs] == sizes
    jobs.clear()
    dumping._write_all(shards, workers)
    assert [len(job) for job in jobs] == ([3] if workers == 1 else [2, 1])


@pytest.mark.parametrize(("name", "turn"), [("SpawnProcess-3", 3), ("SpawnProcess-12", 12), ("MainProcess", 0)])
def test_the_processes_of_a_pool_take_the_gpus_in_turn(name: str, turn: int) -> None:
    assert dumping._turn(name) == turn


def test_an_encoder_is_loaded_once_for_all_shards(setting: Setting, tmp_path: Path) -> None:
    dumping._encoder.cache_clear()
    run(setting, tmp_path / "out")
    assert dumping._encoder.cache_info().misses == 1
    assert dumping._encoder.cache_info().hits == SHARDS - 1


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

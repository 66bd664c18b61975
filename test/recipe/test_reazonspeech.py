"""ReazonSpeech from tar files to data directories: what is kept, what is left out and why, and that a run goes on."""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from local_scripts import LOCAL, load
from local_server import Site, serve

from speechllm.data import audio, kaldi
from speechllm.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

download, _, _, _, _, _, shards, reazonspeech = [
    load(name) for name in ("download", "jsut", "sentences", "synth", "mini", "overlap", "shards", "reazonspeech")
]

TEXTS = ("今日のニュースをお伝えします。", "続いてお天気です。", "それではまた明日。")
NUM_TARS = 12  # of the size small
TIME_LIMIT_S = 120
TRIES = 5


def _sound(duration_s: float, seed: int, rate_hz: int = 16_000, channels: int = 1, kind: str = "FLAC") -> bytes:
    """Return noise as the bytes of a sound file."""
    shape = (round(duration_s * rate_hz), channels)
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).uniform(-0.01, 0.01, shape).astype(np.float32)
    soundfile.write(buffer, noise, rate_hz, subtype="PCM_16", format=kind)
    return buffer.getvalue()


def _names(number: int, *, held_out: bool) -> Iterator[str]:
    """Yield names of one tar that fall to dev, or to training."""
    for count in itertools.count():
        name = f"{number:03x}/{number:03x}{count:010x}.flac"
        if reazonspeech.is_held_out(name.removesuffix(".flac").replace("/", "-")) == held_out:
            yield name


def _write_tar(path: Path, sounds: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in sounds.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _write_table(path: Path, texts: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\t{text}\n" for name, text in texts.items()), encoding="utf-8")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the size small in which nothing is at fault: in each tar two for training, one for dev."""
    folder = tmp_path_factory.mktemp("corpus")
    texts: dict[str, str] = {}
    for number in range(NUM_TARS):
        names = [*itertools.islice(_names(number, held_out=False), 2), next(_names(number, held_out=True))]
        sounds = {name: _sound(1.0 + 0.1 * index, number) for index, name in enumerate(names)}
        _write_tar(folder / "data" / f"{number:03x}.tar", sounds)
        texts |= dict(zip(names, TEXTS, strict=True))
    _write_table(folder / "tsv" / "small.tsv", texts)
    _write_table(folder / "tsv" / "tiny.tsv", {name: text for name, text in texts.items() if name.startswith("000")})
    return folder


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    """Return a copy that may be changed."""
    shutil.copytree(corpus, tmp_path / "copy")
    return tmp_path / "copy"


def _prepare(copy: Path, out: Path, size: str = "small", profile: str = "train") -> None:
    reazonspeech.prepare(size, out, 1, profile, reazonspeech.Source(out.parent / f"{out.name}.downloads", copy))


def _tables(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("reazonspeech_*/*"))}


def _times(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(out.rglob("*")) if path.is_file()}


def test_tar_files_become_two_data_directories(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    _prepare(corpus, out)
    sets = {name: kaldi.load(out / f"reazonspeech_small_{name}") for name in ("train", "dev")}
    assert {name: len(data) for name, data in sets.items()} == {"train": 2 * NUM_TARS, "dev": NUM_TARS}
    for data in sets.values():
        assert kaldi.validate(data.path, with_audio=True).faults == []
    assert set(sets["train"].texts().values()) == set(TEXTS[:2])
    assert set(sets["dev"].texts().values()) == {TEXTS[2]}
    for utt_id, utt in sets["train"].utterances.items():
        assert utt.wav == out / "wav/reazonspeech" / utt_id[:3] / f"{utt_id[4:]}.flac"
        assert utt.speaker == utt_id
    durations = kaldi.read_table(out / "reazonspeech_small_train/utt2dur")
    assert collections.Counter(durations.values()) == {"1.0000": NUM_TARS, "1.1000": NUM_TARS}
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "reazonspeech_small_train: 24 utterances, 0.01 h; left out: none",
        "reazonspeech_small_dev: 12 utterances, 0.00 h; left out: none",
    ]


def test_flac_passes_through_unchanged(corpus: Path, tmp_path: Path) -> None:
    _prepare(corpus, tmp_path / "data", "tiny")
    with tarfile.open(corpus / "data/000.tar") as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None
            assert (tmp_path / "data/wav/reazonspeech" / member.name).read_bytes() == stream.read()


def test_what_is_left_out_is_listed_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every reason there is, among utterances that stay."""
    train, held_out = _names(0, held_out=False), _names(0, held_out=True)
    broken = bytearray(_sound(2.0, 1))
    broken[len(broken) // 2 : len(broken) // 2 + 2000] = b"\xff" * 2000
    cases: list[tuple[str, str, bytes, str]] = [
        (next(train), "ふつうの文です。", _sound(1.5, 2), ""),
        (next(train), "", _sound(1.5, 3), "empty text"),
        (next(train), "　", _sound(1.5, 4), "empty text"),
        (next(train), "♪～", _sound(1.5, 5), "symbols only"),
        (next(train), "短すぎる音です。", _sound(0.9, 6), "shorter than 1 s"),
        (next(train), "長すぎる音です。", _sound(30.2, 7), "longer than 30 s"),
        (next(train), "あ" * 30, _sound(1.0, 8), "more letters than frames"),
        (next(train), "壊れた音です。", bytes(broken), "unreadable sound"),
        (next(train), "音ではありません。", b"<html>" * 50, "unreadable sound"),
        (next(train), "切れた音です。", _sound(2.0, 9)[:9000], "unreadable sound"),
        (next(train), "音がありません。", b"", "no sound"),
        (next(train), "二チャンネルの音です。", _sound(1.5, 10, 44_100, 2), ""),
        (next(train), "ウェブの音です。", _sound(1.5, 11, kind="WAV"), ""),
        (next(held_out), "検証用の文です。", _sound(1.5, 12), ""),
        (next(held_out), "（）", _sound(1.5, 13), "symbols only"),
    ]
    extra = next(train)
    copy, out = tmp_path / "copy", tmp_path / "data"
    _write_tar(copy / "000.tar", {**{name: content for name, _, content, _ in cases if content}, extra: _sound(1, 14)})
    _write_table(copy / "tiny.tsv", {name: text for name, text, _, _ in cases})  # both at the top: so lies a mirror
    _prepare(copy, out, "tiny")

    reasons = {name.removesuffix(".flac").replace("/", "-"): why for name, _, _, why in cases if why}
    reasons[extra.removesuffix(".flac").replace("/", "-")] = "no transcript"
    found: dict[str, str] = {}
    for name in ("train", "dev"):
        head, *lines = (out / f"reazonspeech_tiny_{name}/dropped.tsv").read_text(encoding="utf-8").splitlines()
        assert head == "utt_id\treason"
        assert lines == sorted(lines)
        found |= dict(line.split("\t") for line in lines)
    assert {utt_id: why.partition(" (")[0] for utt_id, why in found.items()} == reasons
    details = sorted(why for why in found.values() if why.startswith("unreadable"))
    assert all(why.endswith(")") for why in details)

    train_set = kaldi.load(out / "reazonspeech_tiny_train")
    assert sorted(train_set.texts().values()) == ["ふつうの文です。", "ウェブの音です。", "二チャンネルの音です。"]
    assert kaldi.validate(train_set.path, with_audio=True).faults == []
    for utt in train_set.utterances.values():
        info = audio.inspect(utt.wav)
        assert (info.sample_rate_hz, info.num_channels, info.duration_s) == (16_000, 1, 1.5)
        assert utt.wav.suffix == (".flac" if utt.text == "ふつうの文です。" else ".wav")
    counts = collections.Counter(why for why in reasons.values())
    printed = capsys.readouterr().out
    for why, count in (counts - collections.Counter(["symbols only"])).items():
        assert f"{count} {why}" in printed.splitlines()[0]
    assert printed.splitlines()[1] == "reazonspeech_tiny_dev: 1 utterances, 0.00 h; left out: 1 symbols only"


@pytest.mark.parametrize(
    ("text", "duration_s", "fault"),
    [
        ("今日は晴れです。", 1.0, None),
        ("今日は晴れです。", 30.0, None),
        ("今日は晴れです。", 0.99, "shorter than 1 s"),
        ("今日は晴れです。", 30.01, "longer than 30 s"),
        ("１０", 1.5, None),
        ("ＯＫ", 1.5, None),
        ("", 5.0, "empty text"),
        ("\u3000 ", 5.0, "empty text"),
        ("♪♪", 5.0, "symbols only"),
        ("……！？", 5.0, "symbols only"),
        ("あ" * 23, 1.0, None),  # 100 frames of 10 ms leave ((100 - 7) // 2 + 1) // 2 = 23
        ("あ" * 24, 1.0, "more letters than frames"),
        ("あ" * 23 + "。、！", 1.0, None),
    ],
)
def test_the_filters(text: str, duration_s: float, fault: str | None) -> None:
    assert reazonspeech.fault_of(text, duration_s) == fault


def test_dev_is_a_small_share_of_ids_and_never_trained_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = sum(reazonspeech.is_held_out(f"000-{count:013x}") for count in range(50_000)) / 50_000
    assert share == pytest.approx(1 / 500, rel=0.3)
    whole, capped = tmp_path / "whole", tmp_path / "capped"
    _prepare(corpus, whole)
    monkeypatch.setattr(reazonspeech, "MAX_DEV", 5)
    _prepare(corpus, capped)
    dev = {out: set(kaldi.load(out / "reazonspeech_small_dev").utterances) for out in (whole, capped)}
    train = {out: set(kaldi.load(out / "reazonspeech_small_train").utterances) for out in (whole, capped)}
    assert len(dev[capped]) == 5
    assert dev[capped] < dev[whole]
    assert train[capped] == train[whole]
    left_out = kaldi.read_table(capped / "reazonspeech_small_dev/dropped.tsv")
    assert {key for key in left_out if key != "utt_id"} == dev[whole] - dev[capped]


def test_a_smaller_size_is_the_beginning_of_a_larger_one(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    _prepare(corpus, out, "tiny")
    stored = _times(out / "wav/reazonspeech/000")
    _prepare(corpus, out, "small")
    assert _times(out / "wav/reazonspeech/000") == stored
    for name in ("train", "dev"):
        tiny, small = (kaldi.load(out / f"reazonspeech_{size}_{name}").texts() for size in ("tiny", "small"))
        assert tiny.items() < small.items()


def test_a_second_run_does_nothing(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    _prepare(corpus, out)
    before = _times(out)
    capsys.readouterr()
    _prepare(corpus, out)
    assert _times(out) == before
    assert capsys.readouterr().out == ""


def test_a_tar_that_is_cut_short_stops_the_run_which_then_goes_on(copy: Path, corpus: Path, tmp_path: Path) -> None:
    out, tar = tmp_path / "data", copy / "data/005.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError) as caught:
        _prepare(copy, out)
    assert str(caught.value).startswith(
        f"{tar}: is no whole tar file (unexpected end of data); delete it and run again"
    )
    assert not list(out.glob("reazonspeech_*"))
    stored = _times(out)
    assert sorted(path.name for path in (out / "wav/reazonspeech").glob("00*")) == [f"{n:03x}" for n in range(5)]

    tar.write_bytes(content)
    for number in range(5):
        (copy / "data" / f"{number:03x}.tar").unlink()  # what is finished is not wanted again
    _prepare(copy, out)
    assert {path: time for path, time in _times(out).items() if path in stored} == stored
    _prepare(corpus, tmp_path / "twin/data")
    assert [_tables(out)[name] for name in _tables(out) if "wav.scp" not in name] == [
        content for name, content in _tables(tmp_path / "twin/data").items() if "wav.scp" not in name
    ]


def test_a_kill_within_a_tar_does_that_tar_again(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    folder = out / "wav/reazonspeech/000"
    folder.mkdir(parents=True)
    name = next(_names(0, held_out=False))[4:]
    (folder / name).write_bytes(b"half a sou")
    (folder / ".x.tmp").write_bytes(b"")
    _prepare(corpus, out, "tiny")
    assert kaldi.validate(out / "reazonspeech_tiny_train", with_audio=True).faults == []


def test_the_profile_is_applied_and_another_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    _prepare(corpus, out, "tiny", "default")
    assert set(kaldi.load(out / "reazonspeech_tiny_train").texts().values()) == {
        text.rstrip("。") for text in TEXTS[:2]
    }
    with pytest.raises(DataError) as caught:
        _prepare(corpus, out, "tiny")
    assert str(caught.value) == (
        f"{out}/reazonspeech_tiny_train: holds output made with profile = default_v1, now it is train_v1; "
        "remove the folder or choose another"
    )
    with pytest.raises(UserError, match="profile 'rwa': no such text profile"):
        _prepare(corpus, out, "tiny", "rwa")


def _start(copy: Path, out: Path) -> subprocess.Popen[str]:
    """Start stage 1 of the size small with two worker processes."""
    command = [sys.executable, str(LOCAL / "data.py"), "--corpus", "reazonspeech-small", "--out", str(out), "--nj", "2"]
    out.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "REAZONSPEECH": str(copy)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=out.parent, env=environment, stdout=pipe, stderr=pipe, text=True)


def _living(folder: Path) -> list[str]:
    """Return the processes that work in `folder`, those of them that are not over."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if (process / "cwd").readlink() == folder and state != "Z":
                found.append(process.name)
    return found


def test_two_processes_that_are_killed_go_on_to_what_one_writes(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "cli/data"
    for _ in range(TRIES):  # this test may be so late that all is done
        with _start(corpus, out) as killed:
            deadline = time.monotonic() + TIME_LIMIT_S
            while not list(out.glob("wav/reazonspeech/*/entries.jsonl")) and time.monotonic() < deadline:
                time.sleep(0.01)
            killed.kill()
        while _living(out.parent) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _living(out.parent) == []  # no worker is left to write into the next run's folders
        stored = {path: path.stat().st_mtime_ns for path in out.glob("wav/reazonspeech/*/entries.jsonl")}
        if 0 < len(stored) < NUM_TARS:
            break
        shutil.rmtree(out)
    assert killed.returncode == -signal.SIGKILL
    assert 0 < len(stored) < NUM_TARS

    with _start(corpus, out) as again:
        stdout, stderr = again.communicate(timeout=TIME_LIMIT_S)
    assert again.returncode == 0, stderr
    assert stdout.startswith("reazonspeech_small_train: 24 utterances")
    for path, time_ns in stored.items():
        assert path.stat().st_mtime_ns == time_ns
    _prepare(corpus, tmp_path / "one/data")
    two, one = _tables(out), _tables(tmp_path / "one/data")
    assert two.keys() == one.keys()
    for name in two:
        assert two[name].replace(b"/cli/", b"/one/") == one[name], name


def test_a_fault_in_a_process_is_one_line(copy: Path, tmp_path: Path) -> None:
    for tar in (copy / "data").iterdir():
        tar.write_bytes(b"")
    with _start(copy, tmp_path / "cli/data") as refused:
        _, stderr = refused.communicate(timeout=TIME_LIMIT_S)
    assert refused.returncode == 2
    (error,) = (line for line in stderr.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: {copy}/data/00")
    assert error.endswith(f".tar: is no whole tar file (empty file); {download.FETCH_AGAIN}")
    assert "Traceback" not in stderr


@pytest.fixture
def site(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Serve the corpus in place of its own address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    files = {f"/{path.relative_to(corpus)}": path.read_bytes() for path in corpus.glob("*/*")}
    with serve(files) as served:
        monkeypatch.setattr(reazonspeech, "URL", served.address)
        yield served


def test_without_a_copy_the_corpus_is_fetched_tar_by_tar(
    site: Site, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, source = tmp_path / "data", reazonspeech.Source(tmp_path / "downloads")
    site.cut_after = [10_000, 40_000]
    reazonspeech.prepare("tiny", out, 1, "raw", source)
    assert "article\n30-4 of the Japanese Copyright Act" in capsys.readouterr().out
    assert site.asked == [("/tsv/tiny.tsv", ""), ("/data/000.tar", ""), ("/data/000.tar", "bytes=40000-")]
    assert [path.name for path in (tmp_path / "downloads").rglob("*.tar")] == []
    site.asked.clear()
    reazonspeech.prepare("tiny", out, 1, "raw", source)
    assert site.asked == []
    assert capsys.readouterr().out == ""
    reazonspeech.prepare("small", out, 1, "raw", source)
    assert "/data/000.tar" not in [path for path, _ in site.asked]
    assert len(site.asked) == 1 + NUM_TARS - 1
    _prepare(corpus, tmp_path / "twin/data")
    train = "reazonspeech_small_train/text"
    assert (out / train).read_bytes() == (tmp_path / "twin/data" / train).read_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../000/evil.flac", "holds '../000/evil.flac', which is no sound of the corpus; take it out"),
        ("000/evil.tar.gz", "holds '000/evil.tar.gz', which is no sound of the corpus"),
        ("000/link.flac", "holds '000/link.flac', which is no sound of the corpus"),
        ("000/twice.flac", "holds '000/twice.flac', which is no sound of the corpus"),
        ("000/empty.flac", "holds '000/empty.flac' of 0 bytes after 1 others; take it out"),
    ],
)
def test_a_hostile_tar_is_refused(copy: Path, tmp_path: Path, name: str, message: str) -> None:
    with tarfile.open(copy / "data/000.tar", "w") as archive:
        for member_name in ("000/twice.flac", name):
            member = tarfile.TarInfo(member_name)
            if member_name == name == "000/link.flac":
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            elif member_name != "000/empty.flac":
                member.size = 4
            archive.addfile(member, io.BytesIO(b"fLaC"))
    with pytest.raises(DataError) as caught:
        _prepare(copy, tmp_path / "data", "tiny")
    assert str(caught.value).startswith(f"{copy}/data/000.tar: {message}")
    assert not list((tmp_path / "data").rglob("*.flac"))


def test_a_tar_without_its_end_is_refused(copy: Path, tmp_path: Path) -> None:
    """Cut between two members, tarfile takes what is there for the whole."""
    tar = copy / "data/000.tar"
    with tarfile.open(tar) as archive:
        second = archive.getmembers()[1].offset
    tar.write_bytes(tar.read_bytes()[:second])
    with pytest.raises(DataError, match=r"000\.tar: is no whole tar file \(its end is missing\)"):
        _prepare(copy, tmp_path / "data", "tiny")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"../evil.flac\ttext\n", "does not begin with NNN/ID.flac and a tab; fetch the table again"),
        (b"000/a b.flac\ttext\n", "does not begin with NNN/ID.flac and a tab"),
        (b"000/a.flac\t\xff\n", "is not UTF-8 (byte 12)"),
        (b"000/a.flac\t\x00\n", "holds a NUL character"),
        (b"000/a.flac\t" + b"x" * 70_000 + b"\n", "is longer than 65536 bytes"),
    ],
)
def test_a_faulty_line_of_the_table_is_named(copy: Path, tmp_path: Path, line: bytes, message: str) -> None:
    table = copy / "tsv/tiny.tsv"
    table.write_bytes(b"000/first.flac\ttext\n" + line)
    with pytest.raises(DataError) as caught:
        _prepare(copy, tmp_path / "data", "tiny")
    assert str(caught.value).startswith(f"{table}:2: {message}")


def test_a_table_of_another_size_or_version_is_refused(copy: Path, tmp_path: Path) -> None:
    shutil.copy(copy / "tsv/small.tsv", copy / "tsv/tiny.tsv")
    with pytest.raises(DataError, match=r"tiny\.tsv: names sounds of 001\.tar, which is no part of reazonspeech-tiny"):
        _prepare(copy, tmp_path / "data", "tiny")
    _write_table(copy / "tsv/small.tsv", {next(_names(0, held_out=False)): "文"})
    with pytest.raises(DataError, match=r"small\.tsv: has no line for 001\.tar; take the table of this size"):
        _prepare(copy, tmp_path / "data")
    _write_table(copy / "tsv/tiny.tsv", {"000/other.flac": "文"})
    with pytest.raises(DataError, match=r"000\.tar: none of its 3 sounds is in the table; take table and tar of one"):
        _prepare(copy, tmp_path / "data", "tiny")


def test_a_line_that_changed_has_its_tar_read_again(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    _prepare(copy, out, "tiny")
    table = copy / "tsv/tiny.tsv"
    table.write_text(table.read_text(encoding="utf-8").replace(TEXTS[0], "別の字幕です。"), encoding="utf-8")
    with pytest.raises(DataError, match="holds output made with table = "):
        _prepare(copy, out, "tiny")
    for path in out.glob("reazonspeech_*"):
        shutil.rmtree(path)
    _prepare(copy, out, "tiny")
    assert "別の字幕です。" in kaldi.load(out / "reazonspeech_tiny_train").texts().values()


def test_what_is_missing_is_named(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="reazonspeech-huge: no such size; choose one of tiny, small, medium, large"):
        _prepare(copy, tmp_path / "data", "huge")
    with pytest.raises(DataError, match="nowhere: no such folder; mend REAZONSPEECH, or unset it to fetch the corpus"):
        _prepare(tmp_path / "nowhere", tmp_path / "data")
    with pytest.raises(DataError, match=r"copy/tsv/medium\.tsv: no such file; complete the copy of the corpus"):
        _prepare(copy, tmp_path / "data", "medium")
    (copy / "data/000.tar").unlink()
    with pytest.raises(DataError, match=r"copy/data/000\.tar: no such file; complete the copy of the corpus"):
        _prepare(copy, tmp_path / "data", "tiny")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"datasets: is not installed; pip install -e \.\[corpora\]"):
        _prepare(copy, tmp_path / "data", "tiny")

"""Stage 1 of JSUT: fetched or given, its folder becomes four data directories, or one line says why not."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from local_scripts import LOCAL, load
from local_server import Site, serve

from speechllm.data import audio, kaldi
from speechllm.errors import ConfigError, DataError
from speechllm.runtime import sha256

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NUM_BASIC = 503  # 250 of them are eval1, 250 dev
SUBSETS = {
    "basic5000": [f"BASIC5000_{number:04d}" for number in range(1, NUM_BASIC + 1)],
    "countersuffix26": ["COUNTERSUFFIX26_01"],
    "loanword128": ["LOANWORD128_001"],
    "onomatopee300": ["ONOMATOPEE300_001"],
    "precedent130": ["PRECEDENT130_001"],
    "repeat500": ["REPEAT500_set1_001", "REPEAT500_set2_001"],
    "travel1000": ["TRAVEL1000_0001"],
    "utparaphrase512": ["UT-PARAPHRASE-sent001-phrase1"],
    "voiceactress100": ["VOICEACTRESS100_001"],
}


download, jsut, _, _, _, overlap, _, reazonspeech, data = [
    load(name)
    for name in ("download", "jsut", "sentences", "synth", "mini", "overlap", "shards", "reazonspeech", "data")
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of JSUT's layout, every sound the same 0.1 s."""
    folder = tmp_path_factory.mktemp("jsut") / "jsut_ver1.1"
    tone = folder.parent / "tone.wav"
    audio.write_wav(tone, (0.1 * np.sin(np.arange(4_800) / 17)).astype(np.float32), 48_000)
    for subset, ids in SUBSETS.items():
        (folder / subset / "wav").mkdir(parents=True)
        for utt_id in ids:
            os.link(tone, folder / subset / "wav" / f"{utt_id}.wav")
        lines = [f"{utt_id}:{utt_id[-4:]}番の札を持って窓口へどうぞ。\n" for utt_id in ids]
        (folder / subset / "transcript_utf8.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """Return a copy whose transcripts may be changed and whose sounds may be taken away."""
    copy = tmp_path / "jsut_ver1.1"
    shutil.copytree(whole, copy, copy_function=os.link)
    for transcript in copy.glob("*/transcript_utf8.txt"):
        content = transcript.read_bytes()
        transcript.unlink()
        transcript.write_bytes(content)
    return copy


def _fault(folder: Path) -> str:
    """Return what is said of a folder that is at fault; nothing may have been written for it."""
    out = folder.parent / "data"
    with pytest.raises(DataError) as caught:
        jsut.prepare(folder, out)
    assert not out.exists()
    return str(caught.value).replace(f"{folder}/", "")


def _change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_the_nine_subsets_become_four_sound_directories(whole: Path, tmp_path: Path) -> None:
    jsut.prepare(whole, tmp_path)
    sets = {name: kaldi.load(tmp_path / f"jsut_{name}") for name in ("train", "dev", "eval1", "basic5000")}
    sizes = {"train": 12, "dev": 250, "eval1": 250, "basic5000": NUM_BASIC}
    assert {name: len(data) for name, data in sets.items()} == sizes
    for name, data in sets.items():
        report = kaldi.validate(data.path)
        assert report.faults == []
        assert report.num_speakers == 1
        assert report.duration_s == pytest.approx(0.1 * len(data)), name
    assert sorted(sets["basic5000"].utterances) == SUBSETS["basic5000"]
    spoken = [utt_id for name in ("train", "dev", "eval1") for utt_id in sets[name].utterances]
    assert sorted(spoken) == sorted(utt_id for ids in SUBSETS.values() for utt_id in ids)
    first = sets["eval1"].utterances["BASIC5000_0001"]
    assert first.wav == whole / "basic5000" / "wav" / "BASIC5000_0001.wav"
    assert first.text == "0001番の札を持って窓口へどうぞ。"


def test_the_groups_are_the_subsets(whole: Path, tmp_path: Path) -> None:
    jsut.prepare(whole, tmp_path)
    groups = kaldi.read_table(tmp_path / "jsut_train" / "utt2group")
    assert groups["REPEAT500_set2_001"] == "repeat500"
    assert set(groups.values()) == set(jsut.SUBSETS) == set(SUBSETS)
    for name in ("eval1", "basic5000"):
        assert set(kaldi.read_table(tmp_path / f"jsut_{name}" / "utt2group").values()) == {"basic5000"}


def test_the_committed_split_is_espnets() -> None:
    """Eval1 and dev are the first and second 250 of all ids in order (egs2/jsut/asr1/local/data.sh)."""
    for first, name in ((1, "eval1"), (251, "dev")):
        ids = (LOCAL / "split" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        assert ids == [f"BASIC5000_{number:04d}" for number in range(first, first + 250)]


def test_a_second_run_writes_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    jsut.prepare(whole, tmp_path)
    first = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    jsut.prepare(whole, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == first


def test_a_text_keeps_its_colons(folder: Path, tmp_path: Path) -> None:
    transcript = folder / "travel1000" / "transcript_utf8.txt"
    transcript.write_text("TRAVEL1000_0001: 集合は9:30、場所：南口。 \r\n\n", encoding="utf-8")
    jsut.prepare(folder, tmp_path / "data")
    assert kaldi.load(tmp_path / "data" / "jsut_train").texts()["TRAVEL1000_0001"] == "集合は9:30、場所：南口。"


def test_a_missing_sound_is_named(folder: Path) -> None:
    (folder / "basic5000" / "wav" / "BASIC5000_0007.wav").unlink()
    assert _fault(folder) == (
        "basic5000/transcript_utf8.txt: BASIC5000_0007 has a transcript but no wav/BASIC5000_0007.wav; "
        "unpack the corpus again"
    )


def test_a_missing_transcript_is_named(folder: Path) -> None:
    transcript = folder / "voiceactress100" / "transcript_utf8.txt"
    transcript.write_text("", encoding="utf-8")
    assert _fault(folder) == "voiceactress100/wav/VOICEACTRESS100_001.wav: has no transcript; unpack the corpus again"
    transcript.unlink()
    assert _fault(folder).startswith("voiceactress100/transcript_utf8.txt: no such file; ")


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("BASIC5000_0002 二番", "is not `ID:text`; unpack the corpus again"),
        ("BASIC5000_0002: \n", "is not `ID:text`"),
        ("BASIC5000_0001:二番", "BASIC5000_0001 stands here twice; unpack the corpus again"),
        ("../BASIC5000_0002:二番", "the id '../BASIC5000_0002' cannot be part of a file name"),
        (":二番", "the line begins with a blank, so it has no id"),
    ],
)
def test_a_faulty_line_is_named(folder: Path, new: str, message: str) -> None:
    _change(folder / "basic5000" / "transcript_utf8.txt", "BASIC5000_0002:0002番の札を持って窓口へどうぞ。", new)
    assert _fault(folder).startswith(f"basic5000/transcript_utf8.txt:2: {message}")


@pytest.mark.parametrize(("utt_id", "name"), [("BASIC5000_0100", "eval1"), ("BASIC5000_0300", "dev")])
def test_a_corpus_without_a_held_out_utterance_is_refused(folder: Path, utt_id: str, name: str) -> None:
    (folder / "basic5000" / "wav" / f"{utt_id}.wav").unlink()
    _change(folder / "basic5000" / "transcript_utf8.txt", f"{utt_id}:", "")
    _change(folder / "basic5000" / "transcript_utf8.txt", f"{utt_id[-4:]}番の札を持って窓口へどうぞ。\n", "")
    assert _fault(folder) == f"{folder}: lacks 1 of {name}, first {utt_id}; unpack the whole corpus"


def test_an_id_in_two_subsets_is_refused(folder: Path) -> None:
    (folder / "loanword128" / "wav" / "LOANWORD128_001.wav").rename(folder / "loanword128/wav/BASIC5000_0001.wav")
    _change(folder / "loanword128" / "transcript_utf8.txt", "LOANWORD128_001", "BASIC5000_0001")
    assert _fault(folder) == "loanword128: BASIC5000_0001 is in basic5000 too; unpack the corpus again"


def test_a_missing_subset_or_folder_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "repeat500")
    assert _fault(folder).startswith("repeat500/transcript_utf8.txt: no such file; ")
    assert _fault(folder / "none").endswith("none: no such folder; unpack JSUT there, or set JSUT to where it is")


def test_a_sound_that_is_no_audio_is_named(folder: Path) -> None:
    sound = folder / "travel1000" / "wav" / "TRAVEL1000_0001.wav"
    sound.unlink()
    sound.write_bytes(b"RIFF")
    with pytest.raises(DataError) as caught:
        jsut.prepare(folder, folder.parent / "data")
    assert str(caught.value).startswith(f"{sound}: is not audio that libsndfile reads")
    assert not (folder.parent / "data" / "jsut_train" / "wav.scp").exists()


@pytest.fixture(scope="module")
def packed() -> bytes:
    """Return a zip file of the real layout and number of utterances, every sound the same 0.01 s."""
    tone = io.BytesIO()
    soundfile.write(tone, np.zeros(480, dtype=np.float32), 48_000, subtype="PCM_16", format="WAV")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for subset, count in jsut.SUBSETS.items():
            ids = [f"{subset.upper()}_{number:04d}" for number in range(1, count + 1)]
            lines = [f"{utt_id}:{utt_id[-4:]}番の札を持って窓口へどうぞ。\n" for utt_id in ids]
            archive.writestr(f"jsut_ver1.1/{subset}/transcript_utf8.txt", "".join(lines))
            for utt_id in ids:
                archive.writestr(f"jsut_ver1.1/{subset}/wav/{utt_id}.wav", tone.getvalue())
    return buffer.getvalue()


@pytest.fixture
def site(packed: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Serve the zip file in place of the corpus's own address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("JSUT", raising=False)
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    with serve({"/jsut_ver1.1.zip": packed}) as served:
        monkeypatch.setattr(jsut, "URL", f"{served.address}/jsut_ver1.1.zip")
        yield served


def test_without_a_folder_the_corpus_is_fetched(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    site.cut_after = [1_000_000]
    data.prepare("jsut", tmp_path / "data", 1)
    out = capsys.readouterr().out
    assert "for commercial use ask the authors" in out
    assert "travel1000 CC-BY-SA 3.0" in out
    assert [asked for _, asked in site.asked] == ["", "bytes=1000000-"]
    assert len(kaldi.load(tmp_path / "data/jsut_basic5000")) == 5000
    assert len(kaldi.load(tmp_path / "data/jsut_train")) == 7696 - 500
    assert "overlap of jsut_train with jsut_eval1: 250 of 250 sentences whole" in out  # as `packed` made them
    recorded = (tmp_path / "downloads/jsut_ver1.1.zip.sha256").read_text(encoding="utf-8")
    assert recorded.split() == [sha256(tmp_path / "downloads/jsut_ver1.1.zip"), "jsut_ver1.1.zip"]
    site.asked.clear()
    assert jsut.obtain(tmp_path / "downloads") == tmp_path / "downloads/jsut_ver1.1"
    assert site.asked == []
    assert "commercial" not in capsys.readouterr().out

    # another zip file in the place of the first is not taken
    shutil.rmtree(tmp_path / "downloads/jsut_ver1.1")
    with zipfile.ZipFile(tmp_path / "downloads/jsut_ver1.1.zip", "a") as archive:
        archive.writestr("jsut_ver1.1/new.txt", "new")
    with pytest.raises(DataError, match=r"jsut_ver1\.1\.zip: has the SHA-256 .*, jsut_ver1\.1\.zip\.sha256 says "):
        jsut.obtain(tmp_path / "downloads")
    assert not (tmp_path / "downloads/jsut_ver1.1").exists()


def test_a_corpus_that_is_not_whole_is_refused(site: Site, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("jsut_ver1.1/basic5000/wav/BASIC5000_0001.wav", b"")
    site.files["/jsut_ver1.1.zip"] = buffer.getvalue()
    with pytest.raises(DataError, match=r"zip: holds 1 sounds of basic5000, not 5000; delete it and run again"):
        jsut.obtain(tmp_path)
    assert not (tmp_path / "jsut_ver1.1").exists()
    assert not (tmp_path / "jsut_ver1.1.zip.sha256").exists()  # the next download may be another


def test_a_zip_file_that_reaches_out_of_its_folder_is_refused(site: Site, tmp_path: Path, packed: bytes) -> None:
    buffer = io.BytesIO(packed)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("jsut_ver1.1/../../evil.txt", "evil")
    site.files["/jsut_ver1.1.zip"] = buffer.getvalue()
    with pytest.raises(DataError, match=r"holds 'jsut_ver1\.1/\.\./\.\./evil\.txt', which would leave its folder"):
        jsut.obtain(tmp_path / "downloads")
    assert not list(tmp_path.rglob("evil.txt"))
    assert not (tmp_path / "downloads/jsut_ver1.1").exists()


def test_a_given_folder_is_taken_and_nothing_fetched(
    site: Site, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSUT", str(whole))
    data.prepare("jsut", tmp_path, 1)
    assert len(kaldi.load(tmp_path / "jsut_basic5000")) == NUM_BASIC
    assert (tmp_path / "jsut_train" / overlap.REPORT).is_file()
    assert site.asked == []


def test_a_corpus_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        data.prepare("jsvt", tmp_path, 1)
    sizes = ", ".join(f"reazonspeech-{size}" for size in reazonspeech.NUM_TARS)
    assert str(caught.value) == f"jsvt: no such corpus; choose one of jsut, {sizes}, mini, mini_open, debug"
    with pytest.raises(ConfigError, match="--profile: jsut has none; leave it out, or take reazonspeech-SIZE"):
        data.prepare("jsut", tmp_path, 1, "raw")

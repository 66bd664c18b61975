"""Kaldi data directories: every odd line has one outcome, and files that disagree are told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.data import audio, kaldi
from speechllm.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

ONE_SECOND = np.full(16_000, 0.25, dtype=np.float32)


def _wav(path: Path, seconds: float = 1.0) -> Path:
    audio.write_wav(path, ONE_SECOND[: round(seconds * 16_000)], 16_000)
    return path


def _data(tmp_path: Path, **tables: str | bytes) -> Path:
    """Return a sound directory of two utterances, with some of its tables changed."""
    wav = _wav(tmp_path / "one.wav")
    folder = tmp_path / "data"
    folder.mkdir()
    whole: dict[str, str | bytes] = {
        "wav.scp": f"u1 {wav}\nu2 {wav}\n",
        "text": "u1 朝は冷えます。\nu2 駅で待つ。\n",
        "utt2spk": "u1 s1\nu2 s2\n",
        **{name.replace("wav_scp", "wav.scp"): content for name, content in tables.items()},
    }
    for name, content in whole.items():
        text = content if isinstance(content, bytes) else content.replace("WAV", str(wav)).encode()
        (folder / name).write_bytes(text)
    return folder


def _fault(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        kaldi.load(folder)
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("u1 朝 です\n", "朝 です"),
        ("u1\t朝\tです\n", "朝\tです"),
        ("u1   朝 \n", "朝"),
        ("u1 朝\u3000です\n", "朝\u3000です"),
        ("u1 \u3000朝\n", "\u3000朝"),
        ("u1 朝\u2028です\n", "朝\u2028です"),
        ("u1 朝\u0085です\n", "朝\u0085です"),
        ("u1 朝\x0bです\x0cよ\n", "朝\x0bです\x0cよ"),
        ("u1 朝\r\n", "朝"),
        ("u1 朝\rです\n", "朝\rです"),
        ("u1 か\u3099\n", "か\u3099"),
        ("u1 朝", "朝"),
        ("u1\n", ""),
        ("\n \t\nu1 朝\n\n", "朝"),
    ],
)
def test_a_line_ends_at_a_line_feed_and_its_key_at_a_space_or_tab(tmp_path: Path, line: str, text: str) -> None:
    (tmp_path / "text").write_bytes(line.encode())
    assert kaldi.read_table(tmp_path / "text") == {"u1": text}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbfu1 a\n", "text:1: begins with a byte order mark; save it as UTF-8 without byte order mark"),
        ("u1 朝\nu2 駅\n".encode("shift_jis"), "text:1: is not UTF-8 (byte 4); save it as"),
        (b"u1 a\nu2 \xe6\x9c\n", "text:2: is not UTF-8 (byte 4); save it as"),
        ("u1 朝\n".encode("utf-16-le"), "text:1: "),
        (b"u1 a\nu2 a\x00b\n", "text:2: holds a NUL character; delete it"),
        (b"u1 a\nu2 b\nu1 a\n", "text:3: u1 stands here twice; delete one of its lines"),
        (b" u1 a\n", "text:1: the line begins with a blank, so it has no id; rename"),
        (b"../../u1 a\n", "text:1: the id '../../u1' cannot be part of a file name; rename the utterance"),
        (b".. a\n", "text:1: the id '..' cannot be part of a file name"),
        (b"a/b a\n", "text:1: the id 'a/b' cannot be part of a file name"),
        (b"a\\b a\n", "text:1: the id 'a\\\\b' cannot be part of a file name"),
        (b"u\x1b[2J a\n", "text:1: the id 'u\\x1b[2J' cannot be part of a file name"),
        ("u1\u3000朝\n".encode(), "text:1: the id 'u1\\u3000朝' cannot be part of a file name"),
        (b"u" * 201 + b" a\n", "text:1: the id is longer than 200 characters"),
        (b"u1 " + b"a" * (1 << 20) + b"\n", "text:1: is longer than 1048576 characters; split it"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(DataError) as caught:
        kaldi.read_table(tmp_path / "text")
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = _data(tmp_path)
    (folder / "text").unlink()
    assert _fault(folder) == "text: no such file; make the data directory again, or mend its path"
    with pytest.raises(DataError, match="none: no such data directory; run stage 1, or mend the path"):
        kaldi.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"text": "u1 朝\n"}, "text: u2 has audio but no transcript; add its line or take it out of wav.scp"),
        (
            {"text": "u1 朝\nu2 駅\nu3 夜\n"},
            "text: u3 has a transcript but no audio in wav.scp; rerun stage 1 or delete the line",
        ),
        ({"utt2spk": "u1 s\n"}, "utt2spk: u2 has audio but no speaker"),
        ({"utt2spk": "u1 s\nu2 s\nu9 s\n"}, "utt2spk: u9 has a speaker but no audio in wav.scp"),
        ({"wav_scp": ""}, "wav.scp: holds no utterance; run stage 1 again"),
        ({"wav_scp": "u1 WAV\nu2\n"}, "wav.scp: u2: names no audio file; add its path"),
        ({"segments": "u1 u1 0 1\nu2 u7 0 1\n"}, "segments: u2: u7 is not in wav.scp; add it or delete the line"),
        ({"segments": "u1 u1 0\n"}, "segments: u1: is not `recording start end`; write seconds as numbers"),
        ({"segments": "u1 u1 0 eins\n"}, "segments: u1: is not `recording start end`"),
        ({"segments": "u1 u1 -0.5 1\n"}, "segments: u1: goes from -0.5 to 1.0 s; mend its times"),
        ({"segments": "u1 u1 0.5 0.5\n"}, "segments: u1: goes from 0.5 to 0.5 s"),
        ({"segments": "u1 u1 0 -1\n"}, "segments: u1: goes from 0.0 to -1.0 s"),
        ({"segments": "u1 u1 0 nan\n"}, "segments: u1: goes from 0.0 to nan s"),
        ({"segments": "u1 u1 0 inf\n"}, "segments: u1: goes from 0.0 to inf s"),
        ({"segments": "u1 u1 0 1e308\n"}, "segments: u1: goes from 0.0 to 1e+308 s"),
    ],
)
def test_files_that_disagree_name_the_utterance(tmp_path: Path, tables: dict[str, str], message: str) -> None:
    assert _fault(_data(tmp_path, **tables)).startswith(message)


def test_a_pipe_is_refused_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    folder = _data(tmp_path, wav_scp=f"u1 touch {mark}; cat WAV |\nu2 WAV\n")
    assert _fault(folder) == (
        "wav.scp: u1: is a command, which is not run; write its output to a file and name that, or see --allow-pipes"
    )
    kaldi.validate(folder, with_audio=True)
    assert not mark.exists()


def test_files_are_joined_by_id_and_ordered_by_bytes(tmp_path: Path) -> None:
    wav = _wav(tmp_path / "a b.wav")
    ids = ["あ", "a", "B", "a-2", "a_1", "𠮷", "\uff5e"]
    folder = _data(
        tmp_path,
        wav_scp="".join(f"{key} {wav}\n" for key in ids),
        text="".join(f"{key} 文{key}\n" for key in reversed(ids)),
        utt2spk="".join(f"{key} s\n" for key in ids),
    )
    data = kaldi.load(folder)
    assert list(data.utterances) == ["B", "a", "a-2", "a_1", "あ", "\uff5e", "𠮷"]  # UTF-16 would swap the last two
    assert data.texts() == {key: f"文{key}" for key in ids}
    assert data.utterances["a"].wav == wav


def test_texts_are_only_needed_where_they_are_asked_for(tmp_path: Path) -> None:
    folder = _data(tmp_path)
    (folder / "text").unlink()
    data = kaldi.load(folder, need_text=False)
    assert len(data) == 2
    with pytest.raises(DataError, match="text: u1 has no transcript; add its line"):
        data.texts()


def test_segments_cut_a_recording(tmp_path: Path) -> None:
    folder = _data(tmp_path, segments="u1 u1 0 0.25\nu2 u1 0.25 1.0\n")
    data = kaldi.load(folder)
    assert [len(utt.read()) for utt in data.utterances.values()] == [4_000, 12_000]
    assert [utt.duration_s() for utt in data.utterances.values()] == [0.25, 0.75]
    (folder / "segments").unlink()
    assert [utt.duration_s() for utt in kaldi.load(folder).utterances.values()] == [1.0, 1.0]


def test_a_segment_past_the_end_names_utterance_and_file(tmp_path: Path) -> None:
    folder = _data(tmp_path, segments="u1 u1 0 1\nu2 u1 0.5 1.5\n")
    report = kaldi.validate(folder, with_audio=True)
    assert report.faults == [
        f"{tmp_path}/one.wav (utterance u2): has no 0.500 to 1.500 s: it lasts 1.000 s; mend segments"
    ]


def test_validate_counts_a_sound_directory(tmp_path: Path) -> None:
    folder = _data(tmp_path, utt2dur="u1 1800\nu2 1800\n", spk2utt="s1 u1\ns2 u2\n")
    report = kaldi.validate(folder)
    assert report.faults == []
    assert report.as_text() == "2 utterances, 2 speakers, 1.000 h, 0 faults"


def test_validate_takes_the_hours_from_the_audio_where_it_reads_it(tmp_path: Path) -> None:
    folder = _data(tmp_path, utt2dur="u1 1800\nu2 1800\n")
    assert kaldi.validate(folder, with_audio=True).duration_s == 2.0


def test_validate_counts_no_speaker_where_none_is_named(tmp_path: Path) -> None:
    folder = _data(tmp_path)
    (folder / "utt2spk").unlink()
    assert kaldi.validate(folder).as_text() == "2 utterances, 0 speakers, 0 faults"


def test_validate_tells_every_fault(tmp_path: Path) -> None:
    folder = _data(
        tmp_path,
        wav_scp="u1 WAV\nu2 WAV\nu3 WAV\nu3 WAV\nu4 ls |\n",
        text=b"u2 \xe3\x80\x80\nu1 a\nu5 \xff\nu3 a\n",
        utt2spk="u1 s1\nu2 s2\nu3 s2\nu6 s2\n",
        spk2utt="s1 u1 u3\ns2 u2\n",
        utt2dur="u1 1\nu2 nan\n",
    )
    assert [fault.removeprefix(f"{folder}/") for fault in kaldi.validate(folder).faults] == [
        "wav.scp:4: u3 stands here twice; delete one of its lines",
        "wav.scp: u4: is a command, which is not run; write its output to a file and name that, or see --allow-pipes",
        "text:3: is not UTF-8 (byte 4); save it as UTF-8 without byte order mark",
        "utt2spk: u6 has a speaker but no audio in wav.scp; rerun stage 1 or delete the line",
        "text: u2 has an empty transcript; write it or delete the utterance",
        "text: is not sorted by bytes; sort it with LC_ALL=C sort",
        "spk2utt: disagrees with utt2spk about u3; make it again from utt2spk",
        "utt2dur: u3 has audio but no duration; add its line or take it out of wav.scp",
        "utt2dur: u2 has no number of seconds; rerun stage 1",
    ]


def test_validate_reads_every_sound(tmp_path: Path) -> None:
    short = _wav(tmp_path / "short.wav", 0.05)
    (tmp_path / "no.wav").write_text("これは音ではない", encoding="utf-8")
    folder = _data(tmp_path, wav_scp=f"u1 {short}\nu2 {tmp_path}/no.wav\n")
    assert kaldi.validate(folder).faults == []
    faults = kaldi.validate(folder, with_audio=True).faults
    assert faults[0] == f"{short}: u1 lasts 0.050 s; take it out"
    assert faults[1].startswith(f"{tmp_path}/no.wav (utterance u2): is not audio that libsndfile reads")
    assert len(faults) == 2


def test_what_is_written_is_sound_and_sorted(tmp_path: Path) -> None:
    wav = _wav(tmp_path / "one.wav")
    utterances = [kaldi.Utterance(key, wav, text=f"文{key}", speaker="s") for key in ("u2", "u10", "あ")]
    out = tmp_path / "out"
    kaldi.write_dir(out, utterances, {"utt2group": {"u2": "heard", "u10": "heard", "あ": "unheard"}})
    assert kaldi.validate(out, with_audio=True).faults == []
    assert (out / "spk2utt").read_text(encoding="utf-8") == "s u10 u2 あ\n"
    assert (out / "utt2dur").read_text(encoding="utf-8") == "u10 1.0000\nu2 1.0000\nあ 1.0000\n"
    assert (out / "utt2group").read_text(encoding="utf-8").startswith("u10 heard\n")
    assert kaldi.load(out).texts() == {"u10": "文u10", "u2": "文u2", "あ": "文あ"}


def test_wav_scp_comes_last_so_that_a_directory_with_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    utterances = [kaldi.Utterance("u1", tmp_path / "none.wav", text="朝")]
    with pytest.raises(DataError, match="no such audio file"):
        kaldi.write_dir(out, utterances)
    assert not (out / "wav.scp").exists()
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\x00"), max_size=8)
KEY = st.text("abz09あ漢_-", min_size=1, max_size=4)


@given(st.dictionaries(KEY, LINE, max_size=5))
@settings(max_examples=40, deadline=None)
def test_a_table_comes_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, table: dict[str, str]) -> None:
    path = tmp_path_factory.getbasetemp() / "table"
    kaldi.write_table(path, table)
    assert kaldi.read_table(path) == {key: value.strip(" \t") for key, value in table.items()}
    assert list(kaldi.read_table(path)) == kaldi.byte_order(table)


def test_the_hash_follows_sounds_and_times_but_neither_texts_nor_the_folder(tmp_path: Path) -> None:
    data = kaldi.load(_data(tmp_path))
    (tmp_path / "new").mkdir()
    moved = {}
    for utt in data.utterances.values():
        copy = tmp_path / "new" / utt.wav.name
        copy.write_bytes(utt.wav.read_bytes())
        moved[utt.utt_id] = kaldi.Utterance(utt.utt_id, copy, text="夜")
    assert kaldi.audio_hash(kaldi.DataDir(tmp_path, moved)) == kaldi.audio_hash(data)
    first = next(iter(moved.values()))
    cut = {**moved, first.utt_id: kaldi.Utterance(first.utt_id, first.wav, end_s=0.05)}
    assert kaldi.audio_hash(kaldi.DataDir(tmp_path, cut)) != kaldi.audio_hash(data)
    first.wav.write_bytes(first.wav.read_bytes()[:-1] + b"\x01")
    assert kaldi.audio_hash(kaldi.DataDir(tmp_path, moved)) != kaldi.audio_hash(data)

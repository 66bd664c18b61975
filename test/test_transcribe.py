"""``speechllm transcribe``: what it takes, what it writes, and what it says of what it cannot read."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parent / "decode"))
import spoken

from speechllm import cli, transcribe
from speechllm.data import streaming
from speechllm.data.audio import write_wav
from speechllm.decode.result import Recognized
from speechllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from speechllm.decode.hotwords import Hotwords


class Ear:
    """Writes how many tenths of a second it hears, and the hotwords and beam it was given."""

    longest_s = joined_s = 30.0

    def recognize(
        self,
        waves_s: Sequence[NDArray[np.float32]],
        *,
        hotwords: Hotwords | None = None,
        beam: int | None = None,
        words: bool = True,
    ) -> list[Recognized]:
        del words
        more = "" if hotwords is None else f" {hotwords.words[0].surface} {beam}"
        return [Recognized(f"{len(wave) // 1600}{more}", 0.5) for wave in waves_s]


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcribe, "load", lambda _model, _device: Ear())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name, pauses in (("b", [0.5]), ("a", [1.0, 2.0])):
        write_wav(tmp_path / "in" / f"{name}.wav", spoken.recording(pauses)[0], 16_000)
    (tmp_path / "in" / "notes.txt").write_text("no sound")
    return tmp_path / "in"


def run(*arguments: object) -> int:
    return cli.run(["transcribe", *map(str, arguments)])


def test_a_file_is_printed_a_line_a_segment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder / "a.wav") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(10 < int(line) < 40 for line in lines)


def test_a_folder_is_printed_sorted_a_line_a_recording(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]


@pytest.mark.parametrize("form", ["txt", "json", "srt", "vtt"])
def test_out_gets_a_file_for_each(folder: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--out", tmp_path / "out", "--format", form) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"a.{form}", f"b.{form}"]
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/out/a.{form}", f"{tmp_path}/out/b.{form}"]
    alone = (tmp_path / "out" / f"a.{form}").read_text()
    assert run(folder / "a.wav", "--format", form) == 0
    assert capsys.readouterr().out == alone


def test_json_of_several_is_a_line_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--format", "json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["name"] for one in found] == ["a", "b"]
    assert len(found[0]["segments"]) == 2
    assert found[0]["duration_s"] == pytest.approx(soundfile.info(str(folder / "a.wav")).duration, abs=1e-3)


def test_a_kaldi_directory_gives_lines_of_a_kaldi_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "wav.scp").write_text(f"rec {folder}/a.wav\n")
    assert run(data) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["rec"]
    (data / "segments").write_text("utt1 rec 0.5 3.0\nutt2 rec 3.5 6.0\n")
    assert run(data) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["utt1", "utt2"]
    assert all(int(line.split()[1]) <= 25 for line in lines)


def test_the_standard_input_is_a_recording(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder / "a.wav") == 0
    expected = capsys.readouterr().out

    class Piped:
        buffer = io.BytesIO((folder / "a.wav").read_bytes())

    monkeypatch.setattr(sys, "stdin", Piped)
    assert run("-") == 0
    assert capsys.readouterr().out == expected
    assert run("-") == 2
    assert capsys.readouterr().err == "error: stdin: is empty; pipe a recording into it\n"


def test_one_bad_file_is_named_at_the_end_and_the_others_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streaming, "_ffmpeg", lambda: None)
    (folder / "aa.mp3").write_bytes(b"junk")
    assert run(folder, folder / "gone.wav", "--out", tmp_path / "out") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.txt", "b.txt"]
    assert capsys.readouterr().err == (
        f"error: {folder}/aa.mp3: is not audio that libsndfile reads, and there is no ffmpeg; "
        "convert it to WAV, or install ffmpeg or the extra media\n"
        f"error: {folder}/gone.wav: no such audio file; mend its path\n"
    )


def test_hotwords_and_beam_reach_the_recogniser(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "words").write_text("難波\tナンバ\n")
    assert run(folder / "b.wav", "--hotwords", folder / "words", "--beam", 3) == 0
    assert capsys.readouterr().out.split()[1:] == ["難波", "3"]


def test_what_cannot_be_done_is_said_before_anything_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(*arguments: object) -> str:
        assert run(*arguments) == 2
        return capsys.readouterr().err.strip().replace(str(tmp_path), "")

    assert fault(folder, "--format", "srt") == "error: --format: srt of 2 recordings cannot be printed; give --out DIR"
    assert fault(folder, "--format", "doc") == "error: --format: doc is not known; take one of txt, json, srt, vtt"
    assert fault(folder, folder / "a.wav") == (
        "error: /in/a.wav: has the name a, as /in/a.wav has; rename one of them, or transcribe them one by one"
    )
    (tmp_path / "empty").mkdir()
    assert fault(tmp_path / "empty") == "error: /empty: holds no audio file and no wav.scp; name the files"
    assert fault(folder, "--hotwords", tmp_path / "none").startswith("error: /none: no such file")
    assert fault() == "error: speechllm transcribe: Missing argument 'files'; see --help"


@pytest.mark.parametrize(
    "name", ["new\nline", "sp ace", "全角\u3000空白", "tab\t", "esc\x1b[31m", os.fsdecode(b"\xff")]
)
def test_a_name_that_would_break_a_line_of_text_is_refused_before_anything_is_recognised(
    folder: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = (folder / "b.wav").rename(folder / f"{name}.wav")
    shown = name.encode("utf-8", "backslashreplace").decode("utf-8")
    assert run(folder, "--format", "json") == 0
    assert {json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()} == {"a", shown}
    assert run(path) == 0  # alone, so its name is not printed
    out = tmp_path / f"out {name}"
    assert run(folder, "--out", out) == 0
    assert (out / f"{name}.txt").is_file()
    assert f"/out {shown}/{shown}.txt\n" in capsys.readouterr().out
    monkeypatch.setattr(transcribe, "load", pytest.fail)
    with pytest.raises(DataError) as caught, transcribe.found([folder]) as recordings:
        transcribe.Output().check(recordings)
    assert caught.value.what == f"its name {name!r} holds a blank, a line break or another sign that breaks a line"
    assert caught.value.fix == "rename it, or give --out or --format json"


@pytest.mark.parametrize("place", ["file", "file/below", "long" * 99])
def test_an_out_that_can_be_no_folder_is_told_before_anything_is_recognised(
    folder: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transcribe, "load", pytest.fail)
    (tmp_path / "file").write_text("kept")
    assert run(folder, "--out", tmp_path / place) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --out: {tmp_path}/{place} ")
    if place == "file":
        assert said == f"error: --out: {tmp_path}/file is a file; name a folder\n"
    else:
        assert said.endswith("); name another folder\n")
    assert (tmp_path / "file").read_text() == "kept"


def test_the_model_is_the_one_given_or_set_or_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPEECHLLM_MODEL", raising=False)
    monkeypatch.setattr(transcribe, "SHIPPED_MODEL", tmp_path)
    assert transcribe.model_folder(Path("given")) == Path("given")
    assert transcribe.model_folder(None) == tmp_path
    monkeypatch.setenv("SPEECHLLM_MODEL", "set")
    assert transcribe.model_folder(None) == Path("set")
    monkeypatch.delenv("SPEECHLLM_MODEL")
    monkeypatch.setattr(transcribe, "SHIPPED_MODEL", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"--model: was not given; give a trained folder"):
        transcribe.model_folder(None)


def test_names_of_another_place_stay_in_the_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "wav.scp").write_text(f"../up {folder}/a.wav\n")
    assert run(data, "--out", tmp_path / "out") == 2
    assert "the id '../up' cannot be part of a file name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

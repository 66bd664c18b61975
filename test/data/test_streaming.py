"""Recordings in blocks: the samples are those of the whole, whatever rate and format; what is wrong is said."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from speechllm.data import audio, streaming
from speechllm.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def noise(path: Path, rate_hz: int, seconds: float = 9.0, channels: int = 1) -> Path:
    rng = np.random.default_rng(rate_hz)
    wave = 0.1 * rng.standard_normal((round(rate_hz * seconds) + 7, channels))
    soundfile.write(str(path), wave.astype(np.float32), rate_hz, subtype="FLOAT")
    return path


def joined(path: Path, start_s: float = 0.0, end_s: float | None = None) -> NDArray[np.float32]:
    return np.concatenate(list(streaming.blocks(path, start_s, end_s)))


def fault(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        joined(path)
    return str(caught.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_056, 44_100, 48_000, 96_000])
def test_the_joints_of_blocks_are_those_of_the_whole(tmp_path: Path, rate_hz: int) -> None:
    path = noise(tmp_path / "a.wav", rate_hz, channels=2)
    whole, blocks = audio.read(path), list(streaming.blocks(path))
    assert len(blocks) > 2
    assert max(map(len, blocks)) <= 5 * 16_000
    assert sum(map(len, blocks)) == len(whole)
    assert np.abs(np.concatenate(blocks) - whole).max() < 1e-6
    assert streaming.duration_s(path) == pytest.approx(len(whole) / 16_000, abs=1e-3)


def test_a_stretch_is_what_audio_reads_of_it(tmp_path: Path) -> None:
    path = noise(tmp_path / "a.wav", 44_100)
    assert np.abs(joined(path, 1.25, 7.5) - audio.read(path, 1.25, 7.5)).max() < 1e-6
    assert streaming.duration_s(path, 1.25, 7.5) == 6.25
    with pytest.raises(DataError, match=r"has no 8\.000 to 99\.000 s: it lasts 9\.000 s; mend segments"):
        joined(path, 8.0, 99.0)


@pytest.mark.parametrize("form", ["FLAC", "OGG", "MP3"])
def test_compressed_files_are_whole(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form.lower()}"
    soundfile.write(str(path), 0.1 * np.sin(np.arange(44_100 * 6) / 10), 44_100, format=form)
    whole = audio.read(path)
    assert np.abs(joined(path) - whole).max() < 1e-6
    assert np.abs(joined(path, 2.0, 5.0) - whole[32_000:80_000])[200:-200].max() < 1e-3  # the filter rings at the ends


def test_faults_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault(tmp_path / "none.wav") == "none.wav: no such audio file; mend its path"
    path = noise(tmp_path / "nan.wav", 16_000)
    soundfile.write(str(path), np.array([0.0, np.nan] * 100, np.float32), 16_000, subtype="FLOAT")
    assert fault(path) == "nan.wav: holds samples that are NaN or infinite; convert it to WAV, or leave it out"
    whole = noise(tmp_path / "cut.wav", 16_000).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    assert "cut.wav: is cut short" in fault(tmp_path / "cut.wav")
    monkeypatch.setattr(streaming, "_ffmpeg", lambda: None)
    (tmp_path / "text.wav").write_text("no sound")
    assert fault(tmp_path / "text.wav") == (
        "text.wav: is not audio that libsndfile reads, and there is no ffmpeg; "
        "convert it to WAV, or install ffmpeg or the extra media"
    )


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """Put a program in the place of ffmpeg; return a file that only it reads."""
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!{sys.executable}\nimport sys, time\nargs = sys.argv[1:]\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setattr(streaming, "_ffmpeg", lambda: str(program))
    path = tmp_path / "-film.m4a"
    path.write_bytes(b"nothing that libsndfile knows")
    return path


def test_ffmpegs_samples_come_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "import array\nsys.stdout.buffer.write(array.array('f', [0.25] * 100_000).tobytes())"
    path = stand_in(tmp_path, monkeypatch, body)
    blocks = list(streaming.blocks(path))
    assert [len(block) for block in blocks] == [64_000, 36_000]
    assert np.array_equal(np.concatenate(blocks), np.full(100_000, 0.25, np.float32))
    assert streaming.duration_s(path) is None


def test_ffmpeg_gets_a_path_that_is_no_option_and_may_open_no_playlist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stand_in(tmp_path, monkeypatch, "sys.stderr.write(' '.join(args)); sys.exit(1)")
    monkeypatch.setattr(streaming, "MAX_REASON_BYTES", 10_000)
    said = fault(path)
    assert "-i -film.m4a" not in said  # its absolute path with its protocol, which `_reason` takes out
    assert "-protocol_whitelist file" in said
    assert "hls" not in said
    assert "concat" not in said


def test_ffmpegs_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stand_in(tmp_path, monkeypatch, "sys.stderr.write('first\\nInvalid data found\\n'); sys.exit(1)")
    assert fault(path) == (
        "-film.m4a: is not audio that libsndfile or ffmpeg reads (Invalid data found); "
        "convert it to WAV, or leave it out"
    )


def test_an_ffmpeg_that_stalls_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STALL_S", 0.3)
    path = stand_in(tmp_path, monkeypatch, "time.sleep(60)")
    assert "took ffmpeg more than 0 s for 4 s of sound" in fault(path)


def test_an_ffmpeg_that_never_ends_is_stopped_at_the_longest_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "MAX_DURATION_S", 10.0)
    path = stand_in(tmp_path, monkeypatch, "while True: sys.stdout.buffer.write(bytes(1 << 16))")
    assert fault(path) == "-film.m4a: lasts more than 10 s; cut it into recordings of four hours at most"


def test_the_real_ffmpeg_reads_what_libsndfile_does_not(tmp_path: Path) -> None:
    program = streaming._ffmpeg()
    if program is None:
        pytest.skip("needs ffmpeg or imageio-ffmpeg")
    source, film = noise(tmp_path / "a.wav", 44_100), tmp_path / "a.m4a"
    subprocess.run([program, "-v", "error", "-i", str(source), str(film)], check=True)
    assert len(joined(film)) == pytest.approx(9 * 16_000, abs=2_000)
    assert len(joined(film, 2.0, 5.0)) == pytest.approx(3 * 16_000, abs=2_000)  # whole frames of the codec
    (tmp_path / "list.m4a").write_text(f"#EXTM3U\n#EXTINF:9,\nfile://{source}\n")
    assert "is not audio that libsndfile or ffmpeg reads" in fault(tmp_path / "list.m4a")

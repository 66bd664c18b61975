"""Recordings in blocks: the samples are those of the whole, whatever rate and format; what is wrong is said."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Never

import numpy as np
import pytest
import soundfile
import tiny

from speechllm.data import audio, streaming
from speechllm.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


CONVERT = "convert it to WAV, or leave it out"
# form -> what ffmpeg needs to write one, and what it says of the first half of it
WRITTEN = {
    "m4a": (["-movflags", "+faststart"], "partial file"),
    "mp4": (["-movflags", "frag_keyframe+empty_moov"], "partial file"),
    "mov": ([], "moov atom not found"),
    "3gp": (["-ar", "8000", "-ac", "1", "-c:a", "aac", "-movflags", "+faststart"], "partial file"),
    "webm": ([], "File ended prematurely"),
    "mkv": ([], "File ended prematurely"),
    "mka": (["-c:a", "flac"], "File ended prematurely"),
    "aac": ([], "Input buffer exhausted before END element found"),
    "wma": ([], "Input packet size too small"),
    "ac3": ([], "incomplete frame"),
    "amr": (["-ar", "8000", "-ac", "1"], "Corrupt bitstream"),
    "wv": ([], "Error during demuxing"),
    "tta": ([], "Error submitting packet to decoder"),
    "oga": (["-c:a", "flac"], "its last page is not the end of a stream"),
    "ogg": (["-c:a", "libvorbis"], "its last page is not the end of a stream"),
    "opus": ([], "its last page is not the end of a stream"),
}


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


def test_a_name_that_is_no_utf_8_is_a_name_like_others(tmp_path: Path) -> None:
    source = noise(tmp_path / "a.wav", 44_100)
    path = source.rename(tmp_path / os.fsdecode(b"\xff\xe9.wav"))
    assert np.abs(joined(path) - audio.read(path)).max() < 1e-6
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "is cut short" in fault(path)
    path.write_bytes(b"no sound")
    assert "reads (" in fault(path)


def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    def refuse(path: Path, *_: object) -> Never:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    assert program
    (tmp_path / "a.m4a").write_bytes(b"nothing that libsndfile knows")
    monkeypatch.setattr(Path, "open", refuse)  # root may read whatever its mode is
    assert fault(tmp_path / "a.m4a") == f"a.m4a: cannot be read (Permission denied); {CONVERT}"


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_is_to_be_given_as_the_standard_input(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/null")
    if kind == "pipe":
        path = tmp_path / "pipe"
        os.mkfifo(path)
    assert fault(path).endswith(": is no regular file; pipe it to -")


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
    path = stand_in(
        tmp_path, monkeypatch, "sys.stderr.write('moov atom not found\\nInvalid data found\\n'); sys.exit(1)"
    )
    assert fault(path) == (
        "-film.m4a: is not audio that libsndfile or ffmpeg reads (moov atom not found); "
        "convert it to WAV, or leave it out"
    )


SOUND = "import array\nsys.stdout.buffer.write(array.array('f', [0.25] * 64_000).tobytes())\n"


def test_what_ffmpeg_writes_of_a_fault_is_raised_after_the_last_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = "[mov @ 0x55dac1f8] stream 0, offset 0x2f: partial file\\n[aac @ 0x1a] Input buffer exhausted\\n"
    path = stand_in(tmp_path, monkeypatch, f"{SOUND}sys.stderr.write('{log}')")
    blocks = streaming.blocks(path)
    assert len(next(blocks)) == 64_000
    with pytest.raises(DataError, match=r"is cut short or damaged \(stream 0, offset 0x2f: partial file\); convert it"):
        next(blocks)
    # behind a seek a fault is one only where samples are missing
    assert len(joined(path, 2.0, 6.0)) == 64_000
    with pytest.raises(DataError, match="is cut short or damaged"):
        joined(path, 2.0, 7.0)


def test_faults_of_pictures_are_none_of_the_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = "[h264 @ 0x55da] no frame!\\n    Last message repeated 4 times\\n"
    assert len(joined(stand_in(tmp_path, monkeypatch, f"{SOUND}sys.stderr.write('{log}')"))) == 64_000


def test_an_ffmpeg_that_fails_behind_some_samples_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stand_in(tmp_path, monkeypatch, f"{SOUND}sys.exit(7)")
    assert fault(path) == f"-film.m4a: is cut short or damaged (ffmpeg ended with 7); {CONVERT}"


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


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the path of a real ffmpeg, the same everywhere: another one says other words."""
    found = str(pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe())
    monkeypatch.setattr(streaming, "_ffmpeg", lambda: found)
    return found


def test_the_real_ffmpeg_reads_what_libsndfile_does_not(tmp_path: Path, program: str) -> None:
    source, film = noise(tmp_path / "a.wav", 44_100), tmp_path / "a.m4a"
    subprocess.run([program, "-v", "error", "-i", str(source), str(film)], check=True)
    assert len(joined(film)) == pytest.approx(9 * 16_000, abs=2_000)
    assert len(joined(film, 2.0, 5.0)) == pytest.approx(3 * 16_000, abs=2_000)  # whole frames of the codec
    (tmp_path / "list.m4a").write_text(f"#EXTM3U\n#EXTINF:9,\nfile://{source}\n")
    assert "is not audio that libsndfile or ffmpeg reads" in fault(tmp_path / "list.m4a")


@pytest.mark.parametrize("form", WRITTEN)
def test_a_whole_file_is_read_in_silence_and_half_of_it_is_told(tmp_path: Path, program: str, form: str) -> None:
    source, path = noise(tmp_path / "a.wav", 44_100), tmp_path / f"a.{form}"
    options, said = WRITTEN[form]
    subprocess.run([program, "-v", "error", "-i", str(source), *options, str(path)], check=True)
    assert len(joined(path)) == pytest.approx(9 * 16_000, abs=4_000)  # whole frames of the codec
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 55 // 100])
    message = fault(path)
    assert said in message
    assert message.endswith(f"; {CONVERT}")


def test_a_film_without_a_sound_track_is_told(tmp_path: Path, program: str) -> None:
    pictures = ["-f", "lavfi", "-i", "testsrc=size=64x64:rate=5:duration=1"]
    subprocess.run([program, "-v", "error", *pictures, str(tmp_path / "film.mkv")], check=True)
    assert fault(tmp_path / "film.mkv") == "film.mkv: has no sound track; name a file with sound"


def test_an_mp3_that_does_not_say_how_long_it_is_is_read_by_all(tmp_path: Path, program: str) -> None:
    """libsndfile guesses more samples than there are."""
    audio.write_wav(tmp_path / "a.wav", tiny.wave(16_000 * 25), 16_000)
    path = tmp_path / "a.mp3"
    command = [program, "-v", "error", "-i", str(tmp_path / "a.wav"), "-write_xing", "0", str(path)]
    subprocess.run(command, check=True)
    info = audio.inspect(path)
    whole = np.concatenate(list(streaming.blocks(path)))
    assert info.is_estimate
    assert len(whole) < info.num_samples
    assert len(audio.read(path)) == len(whole)
    tag = b"ID3\x04\x00\x00\x00\x00\x00\x05" + b"Xing."  # of the title, say, and not of the frames
    path.write_bytes(tag + path.read_bytes())
    assert audio.inspect(path).is_estimate
    soundfile.write(path, tiny.wave(16_000 * 25), 16_000, format="MP3")
    assert not audio.inspect(path).is_estimate

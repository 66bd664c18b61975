"""Audio in and out: what a file must be, and what is said of one that is not."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from speechllm.data import audio
from speechllm.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def _tone(num_samples: int = 4_000, rate_hz: int = 16_000, tone_hz: float = 440.0) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * tone_hz * np.arange(num_samples) / rate_hz)).astype(np.float32)


def _write(path: Path, wave: NDArray[np.float32], rate_hz: int = 16_000, subtype: str | None = None) -> Path:
    soundfile.write(str(path), wave, rate_hz, subtype=subtype)
    return path


def _fault(path: Path, start_s: float = 0.0, end_s: float | None = None) -> str:
    with pytest.raises(DataError) as caught:
        audio.read(path, start_s, end_s)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_what_is_written_comes_back_to_16_bits(tmp_path: Path) -> None:
    audio.write_wav(tmp_path / "a.wav", _tone(), 16_000)
    assert audio.inspect(tmp_path / "a.wav") == audio.AudioInfo(16_000, 4_000, 1)
    back = audio.read(tmp_path / "a.wav")
    assert back.dtype == np.float32
    assert np.abs(back - _tone()).max() <= 1 / 32_768


def test_a_stretch_is_the_same_samples_as_of_the_whole(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.wav", _tone())
    whole = audio.read(path)
    assert np.array_equal(audio.read(path, 0.1, 0.15), whole[1_600:2_400])
    assert np.array_equal(audio.read(path, 0.2), whole[3_200:])


def test_channels_are_averaged(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.wav", np.stack([_tone(), np.zeros(4_000, np.float32)], axis=1), subtype="FLOAT")
    assert np.allclose(audio.read(path), _tone() / 2)


@pytest.mark.parametrize("rate_hz", [8_000, 44_100, 48_000])
def test_other_rates_are_resampled_to_16_khz(tmp_path: Path, rate_hz: int) -> None:
    path = _write(tmp_path / "a.wav", _tone(rate_hz // 2, rate_hz), rate_hz, "FLOAT")
    wave = audio.read(path)
    assert len(wave) == 8_000
    middle = slice(1_000, 7_000)  # the filter rings at both ends
    assert np.abs(wave - _tone(8_000))[middle].max() < 0.01


@pytest.mark.parametrize(("rate_hz", "is_read"), [(3_999, False), (4_000, True), (192_000, True), (192_001, False)])
def test_the_sample_rate_has_bounds(tmp_path: Path, rate_hz: int, *, is_read: bool) -> None:
    path = _write(tmp_path / "a.wav", _tone(), rate_hz)
    if is_read:
        assert audio.inspect(path).sample_rate_hz == rate_hz
    else:
        assert _fault(path).startswith(f"a.wav: has a sample rate of {rate_hz} Hz; replace the file")


@pytest.mark.parametrize("rate_hz", [11_025, 12_000, 22_050, 24_000, 32_000, 37_800, 96_000])
def test_every_usual_rate_is_taken(tmp_path: Path, rate_hz: int) -> None:
    assert audio.inspect(_write(tmp_path / "a.wav", _tone(), rate_hz)).duration_s == 4_000 / rate_hz


def test_a_rate_whose_resampling_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    assert _fault(_write(tmp_path / "a.wav", _tone(), 44_101)) == (
        "a.wav: has a sample rate of 44101 Hz, in no small ratio to 16000 Hz; resample it with another program"
    )


def test_too_many_channels_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.wav", np.zeros((100, 17), np.float32))
    assert _fault(path).startswith("a.wav: has 17 channels; replace")


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    assert _fault(_write(tmp_path / "a.wav", _tone(0))).startswith("a.wav: holds no samples; replace")


def test_a_recording_of_more_than_four_hours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with soundfile.SoundFile(str(path), "w", 4_000, 1, "PCM_U8") as stream:
        stream.write(np.zeros(4_000, np.float32))
        stream.seek(4 * 3_600 * 4_000)
        stream.write(np.zeros(4_000, np.float32))
    assert _fault(path).startswith("a.wav: lasts 14401 s; cut it into recordings of four hours at most")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.wav", b""), ("a.wav", b"RIFF"), ("a.wav", "水を一杯ください".encode()), ("a.raw", b"\x00" * 64)],
)
def test_a_file_that_is_no_audio_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert _fault(tmp_path / name).startswith(f"{name}: is not audio that libsndfile reads (")


def test_a_missing_file_and_a_folder_are_no_audio(tmp_path: Path) -> None:
    assert _fault(tmp_path / "none.wav") == "none.wav: no such audio file; mend its path in wav.scp"
    (tmp_path / "folder.wav").mkdir()
    assert "no such audio file" in _fault(tmp_path / "folder.wav")


@pytest.mark.parametrize("suffix", ["wav", "aiff", "au", "w64"])
@pytest.mark.parametrize("lost", [0.5, 0.01])
def test_a_truncated_file_is_refused_though_libsndfile_reads_its_beginning(
    tmp_path: Path, suffix: str, lost: float
) -> None:
    path = _write(tmp_path / f"a.{suffix}", _tone(), subtype="PCM_16")
    content = path.read_bytes()
    path.write_bytes(content[: round((1 - lost) * len(content))])
    assert 0 < soundfile.info(str(path)).frames < 4_000
    assert _fault(path).startswith(f"a.{suffix}: is cut short: ")


def test_a_truncated_flac_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.flac", _tone(16_000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert soundfile.info(str(path)).frames == 16_000
    assert _fault(path).startswith("a.flac: c")  # cannot be decoded, or is cut short: either way no shorter wave


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_a_truncated_ogg_is_refused_though_libsndfile_reads_its_beginning(tmp_path: Path, subtype: str) -> None:
    path = tmp_path / "a.ogg"
    soundfile.write(str(path), np.random.default_rng(1).uniform(-0.5, 0.5, 160_000), 16_000, subtype, format="OGG")
    content = path.read_bytes()
    assert audio.inspect(path).num_samples == 160_000
    path.write_bytes(content + b"tag" * 99)  # what others put behind it is none of its own
    assert audio.inspect(path).num_samples == 160_000
    path.write_bytes(content[: len(content) // 2])
    assert 0 < soundfile.info(str(path)).frames < 160_000
    again = "replace the file or take it out of wav.scp"
    assert _fault(path) == f"a.ogg: is cut short: its last page is not the end of a stream; {again}"
    path.write_bytes(content[:-1])
    assert _fault(path) == f"a.ogg: is cut short: its last page is not whole; {again}"
    path.write_bytes(content[: content.rindex(b"OggS") + 5])
    assert _fault(path).startswith("a.ogg: is cut short: its last page is not the end")


def test_a_name_that_is_no_utf_8_is_a_name_like_others(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.wav")
    audio.write_wav(path, _tone(), 16_000)
    assert len(audio.read(path)) == 4_000
    path.write_bytes(b"no sound")
    assert "is not audio that libsndfile reads (" in _fault(path)


def test_a_pipe_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    assert _fault(tmp_path / "a.wav") == "a.wav: is no regular file; mend its path in wav.scp"


def test_a_file_that_gives_less_than_its_header_says_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "a.wav", _tone())
    monkeypatch.setattr(soundfile, "read", lambda *_, **__: (np.zeros((1_500, 1), np.float32), 16_000))
    assert _fault(path, 0.1) == (
        "a.wav: is cut short: 3100 of 4000 samples are there; replace the file or take it out of wav.scp"
    )


def test_a_wav_that_was_written_into_a_pipe_is_read(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.wav", _tone(), subtype="PCM_16")
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"  # the sizes of RIFF and data are not known yet
    path.write_bytes(content)
    assert len(audio.read(path)) == 4_000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    wave = _tone()
    wave[1_234] = value
    path = _write(tmp_path / "a.wav", wave, subtype="FLOAT")
    assert _fault(path).startswith("a.wav: holds samples that are NaN or infinite; replace")
    assert len(audio.read(path, 0.1, 0.2)) == 1_600


@pytest.mark.parametrize(("start_s", "end_s"), [(0.0, 0.3), (0.25, None), (-0.1, 0.1), (0.2, 0.1), (0.1, 0.10001)])
def test_a_stretch_that_is_not_there_is_refused(tmp_path: Path, start_s: float, end_s: float | None) -> None:
    path = _write(tmp_path / "a.wav", _tone())
    message = _fault(path, start_s, end_s)
    assert message.startswith(f"a.wav: has no {start_s:.3f} to ")
    assert message.endswith("it lasts 0.250 s; mend segments")

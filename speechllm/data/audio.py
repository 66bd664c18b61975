"""Audio in and out: the only module that touches soundfile and torchaudio."""

from __future__ import annotations

import logging
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from speechllm.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

log = logging.getLogger(__name__)

SAMPLE_RATE_HZ = 16_000
MIN_SAMPLE_RATE_HZ = 4_000
MAX_SAMPLE_RATE_HZ = 192_000
MAX_CHANNELS = 16
MAX_DURATION_S = 4 * 3600.0
MAX_RESAMPLE_TAPS = 1 << 24
READ_AGAIN = "replace the file or take it out of wav.scp"
# libsndfile reads a file that was cut short as a shorter one, and says so only in its log
CUT_SHORT = re.compile(r"^ *(?:data|Data Size|SSND|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
SILENT_MIX = 0.01  # of the loudest channel: what is left when channels cancel each other
ID3_HEADER_BYTES = 10
MP3_FRAME_BYTES = 1500  # the longest has 1,441
ESTIMATE_PART = 0.9
"""Part of the samples that must be there where their number is a guess."""
OGG_PAGE = b"OggS"  # what each page of an Ogg file begins with
OGG_HEADER_BYTES = 27
OGG_LAST = 0x04  # the bit of a page's type that says: the stream ends here
OGG_TAIL_BYTES = 1 << 16  # the largest page has 65,307
MAX_STREAMED_BYTES = 0x7FFF0000  # programs that write into a pipe put this or more where the size is not known yet


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says."""

    sample_rate_hz: int
    num_samples: int
    num_channels: int
    is_estimate: bool = False
    """Whether the number of samples is a guess, as that of an MP3 that does not say."""

    @property
    def least_samples(self) -> int:
        """Return how many samples must be there, or the file is cut short."""
        return int(ESTIMATE_PART * self.num_samples) if self.is_estimate else self.num_samples

    @property
    def duration_s(self) -> float:
        """Return the length in seconds."""
        return self.num_samples / self.sample_rate_hz


def inspect(path: Path) -> AudioInfo:
    """Return what the header says, within the bounds that we read.

    Raises:
        DataError: no such file, not audio, cut short, or a rate, channel count or length out of bounds.
    """
    require_file(path, "mend its path in wav.scp", "mend its path in wav.scp")
    try:
        header = soundfile.info(os.fsencode(path))  # its name may be no UTF-8
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:  # TypeError: headerless, by its name
        raise DataError(path, f"is not audio that libsndfile reads ({_reason(error)})", READ_AGAIN) from error
    for claimed, there in CUT_SHORT.findall(header.extra_info):
        if int(there) < int(claimed) < MAX_STREAMED_BYTES:
            raise DataError(path, f"is cut short: {there} of {claimed} bytes are there", READ_AGAIN)
    if header.format == "OGG":
        require_last_page(path, READ_AGAIN)
    is_estimate = header.format == "MP3" and not _counts_frames(path)
    info = AudioInfo(header.samplerate, header.frames, header.channels, is_estimate=is_estimate)
    if not MIN_SAMPLE_RATE_HZ <= info.sample_rate_hz <= MAX_SAMPLE_RATE_HZ:
        raise DataError(path, f"has a sample rate of {info.sample_rate_hz} Hz", READ_AGAIN)
    common_hz = math.gcd(info.sample_rate_hz, SAMPLE_RATE_HZ)
    if info.sample_rate_hz * SAMPLE_RATE_HZ > MAX_RESAMPLE_TAPS * common_hz**2:
        what = f"has a sample rate of {info.sample_rate_hz} Hz, in no small ratio to {SAMPLE_RATE_HZ} Hz"
        raise DataError(path, what, "resample it with another program")
    if not 1 <= info.num_channels <= MAX_CHANNELS:
        raise DataError(path, f"has {info.num_channels} channels", READ_AGAIN)
    if info.num_samples < 1:
        raise DataError(path, "holds no samples", READ_AGAIN)
    if info.duration_s > MAX_DURATION_S:
        raise DataError(path, f"lasts {info.duration_s:.0f} s", "cut it into recordings of four hours at most")
    return info


def _counts_frames(path: Path) -> bool:
    """Return whether an MP3 says in its first frame how many there are; else libsndfile guesses by the file's size."""
    with path.open("rb") as file:
        head = file.read(ID3_HEADER_BYTES)
        if head[:3] == b"ID3":  # its size has seven bits a byte
            file.seek(sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True)), os.SEEK_CUR)
        else:
            file.seek(0)
        frame = file.read(MP3_FRAME_BYTES)
    return any(tag in frame for tag in (b"Xing", b"Info", b"VBRI"))


def require_file(path: Path, fix: str, fix_special: str) -> None:
    """Return where `path` is a regular file, which can be read more than once.

    Raises:
        DataError: it is not there or is a folder, with `fix`; it is a pipe or a device, with `fix_special`.
    """
    try:
        is_file, is_there = path.is_file(), path.exists() and not path.is_dir()
    except OSError as error:  # a folder that may not be looked into, a name too long to be one
        raise DataError(path, f"cannot be read ({error.strerror})", fix) from error
    if is_there and not is_file:
        raise DataError(path, "is no regular file", fix_special)
    if not is_file:
        raise DataError(path, "no such audio file", fix)


def require_last_page(path: Path, fix: str) -> None:
    """Return where `path` is no Ogg file, or one whose last page is whole and says that it is the last.

    Raises:
        DataError: it is cut short, which libsndfile and ffmpeg pass over in silence; or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(OGG_PAGE)) != OGG_PAGE:
                return
            file.seek(max(0, file.seek(0, os.SEEK_END) - OGG_TAIL_BYTES))
            tail = file.read()
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", fix) from error
    page = tail[max(0, tail.rfind(OGG_PAGE)) :]
    if len(page) < OGG_HEADER_BYTES or not page[5] & OGG_LAST:
        raise DataError(path, "is cut short: its last page is not the end of a stream", fix)
    sizes = page[OGG_HEADER_BYTES : OGG_HEADER_BYTES + page[26]]
    if len(page) < OGG_HEADER_BYTES + page[26] + sum(sizes):
        raise DataError(path, "is cut short: its last page is not whole", fix)


def _reason(error: Exception) -> str:
    return str(error).rsplit(": ", maxsplit=1)[-1].rstrip(".")


def read(path: Path, start_s: float = 0.0, end_s: float | None = None) -> NDArray[np.float32]:
    """Return samples [s] of `path` at 16 kHz, channels averaged, from `start_s` to `end_s` seconds.

    Raises:
        DataError: as `inspect`; or the file ends before its header says, or before `end_s`; or it
            holds values that are not finite.
    """
    info = inspect(path)
    first = round(start_s * info.sample_rate_hz)
    last = info.num_samples if end_s is None else round(end_s * info.sample_rate_hz)
    if not 0 <= first < last <= info.num_samples:
        where = f"{start_s:.3f} to {last / info.sample_rate_hz:.3f} s"
        raise DataError(path, f"has no {where}: it lasts {info.duration_s:.3f} s", "mend segments")
    try:
        wave, _ = soundfile.read(os.fsencode(path), start=first, stop=last, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise DataError(path, f"cannot be decoded ({_reason(error)})", READ_AGAIN) from error
    if first + len(wave) < (info.least_samples if end_s is None else last):
        what = f"is cut short: {first + len(wave)} of {info.num_samples} samples are there"
        raise DataError(path, what, READ_AGAIN)
    if not np.isfinite(wave).all():
        raise DataError(path, "holds samples that are NaN or infinite", READ_AGAIN)
    mixed = wave.mean(axis=1)
    if info.num_channels > 1 and _loudness(mixed) < SILENT_MIX * max(map(_loudness, wave.T)):
        log.warning("channels cancel each other in %s: their mean is silent; keep one of them", path)
    return resample(mixed, info.sample_rate_hz, SAMPLE_RATE_HZ)


def _loudness(wave: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))


def resample(wave: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """Return `wave` [s] at `to_hz`, by torchaudio's windowed-sinc filter."""
    if from_hz == to_hz:
        return wave
    import torch
    from torchaudio.functional import resample as sinc

    resampled: NDArray[np.float32] = sinc(torch.from_numpy(wave), from_hz, to_hz).numpy()
    return resampled


def write_wav(path: Path, wave: NDArray[np.float32], sample_rate_hz: int) -> None:
    """Write `wave` [s] in -1..1 as 16-bit PCM."""
    soundfile.write(os.fsencode(path), wave, sample_rate_hz, subtype="PCM_16", format="WAV")

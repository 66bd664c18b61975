"""Recordings of any length, rate and format, read block by block in bounded memory.

libsndfile reads what it knows; ffmpeg, where it is there, decodes the rest in a process of its own. Shape: s samples.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import shutil
import subprocess
import tempfile
import threading
from typing import IO, TYPE_CHECKING

import numpy as np
import soundfile

from speechllm.data import audio
from speechllm.data.audio import MAX_DURATION_S, SAMPLE_RATE_HZ, resample
from speechllm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

BLOCK_S = 4.0
LEAD_IN_S = 0.5  # read and dropped before a stretch: MP3 needs some frames after a seek
FILTER_WIDTH = 6  # zero crossings of torchaudio's filter on each side, its default
ROLLOFF = 0.99  # where it cuts off, its default
STALL_S = 60.0  # the longest that ffmpeg may take for one block
MAX_REASON_BYTES = 500
NO_SOUND = "matches no streams"  # what ffmpeg says where it was asked for a sound track
SHORT_S = 0.25  # more than the frames of a codec that a stretch may lack at its ends
FIX = "convert it to WAV, or leave it out"
FIX_MISSING = "convert it to WAV, or install ffmpeg or the extra media"
LOGGED_BY = re.compile(r"\[[^\[\]]* @ 0x[0-9a-f]+\] *")
# ffmpeg looks into the pictures too before it starts, and misses their beginning where a broadcast was recorded
OF_PICTURES = re.compile(
    r"\[(mpeg[124]video|mpeg4|h26[1-4]|hevc|vvc|vp\d|av1|vc1|theora|wmv\d|mjpeg|png) @|    Last message"
)
# sound and film containers; no playlists, which could make ffmpeg read other files
FFMPEG_FORMATS = "aac,ac3,aiff,amr,ape,asf,avi,caf,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg,tta,wav,wv"


def duration_s(path: Path, start_s: float = 0.0, end_s: float | None = None) -> float | None:
    """Return how long the stretch is, or None where the whole must be decoded to know.

    Raises:
        DataError: as `blocks`, as far as the header tells.
    """
    info = _inspect(path)
    if info is None:
        return None if end_s is None else end_s - start_s
    return (info.duration_s if end_s is None else end_s) - start_s


def blocks(path: Path, start_s: float = 0.0, end_s: float | None = None) -> Iterator[NDArray[np.float32]]:
    """Yield the samples [s] at 16 kHz, channels averaged, in blocks of about four seconds.

    Joined they are what `audio.read` returns of the same stretch.

    Raises:
        DataError: no such file; not audio; its rate, channels or length are out of bounds; it ends before its header
            or `end_s` says; it holds values that are not finite; ffmpeg is needed and is missing, fails or stalls, or
            finds damage, which is raised after the last block.
    """
    info = _inspect(path)
    if info is None:
        yield from _decoded(path, start_s, end_s)
        return
    first = round(start_s * info.sample_rate_hz)
    last = info.num_samples if end_s is None else round(end_s * info.sample_rate_hz)
    if not 0 <= first < last <= info.num_samples:
        where = f"{start_s:.3f} to {last / info.sample_rate_hz:.3f} s"
        raise DataError(path, f"has no {where}: it lasts {info.duration_s:.3f} s", "mend segments")
    least = info.least_samples if end_s is None else last
    yield from resampled(_read(path, first, last, least), info.sample_rate_hz)


def _inspect(path: Path) -> audio.AudioInfo | None:
    """Return what the header says; None where ffmpeg has to read the file."""
    audio.require_file(path, "mend its path", "pipe it to -")
    try:
        soundfile.info(os.fsencode(path))  # its name may be no UTF-8
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        if _ffmpeg() is None:
            raise DataError(path, "is not audio that libsndfile reads, and there is no ffmpeg", FIX_MISSING) from error
        audio.require_last_page(path, FIX)
        return None
    try:
        return audio.inspect(path)
    except DataError as error:  # its advice is for data directories
        fix = FIX if error.fix == audio.READ_AGAIN else error.fix
        raise DataError(error.where, error.what, fix) from error


def _read(path: Path, first: int, last: int, least: int) -> Iterator[NDArray[np.float32]]:
    """Yield the samples from `first` to `last`, or the end behind `least`, at the file's rate, channels averaged."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(Forward(os.fsencode(path)))
            size = round(BLOCK_S * file.samplerate)
            lead_in = min(first, round(LEAD_IN_S * file.samplerate))
            file.seek(first - lead_in)
            file.read(lead_in)
            while first < last:
                block = file.read(min(size, last - first), dtype="float32", always_2d=True)
                if not len(block) and first >= least:
                    return
                if not len(block):
                    raise DataError(path, f"is cut short: {first} of {file.frames} samples are there", FIX)
                first += len(block)
                yield _finite(path, block.mean(axis=1))
        except (soundfile.SoundFileError, RuntimeError) as error:
            reason = str(error).rsplit(": ", maxsplit=1)[-1].rstrip(".")
            raise DataError(path, f"cannot be decoded ({reason})", FIX) from error


class Forward(soundfile.SoundFile):  # type: ignore[misc]
    """A sound file that is read onwards only.

    soundfile seeks after every read to where it is already, and MP3 decodes wrongly for some frames after a seek.
    """

    def seekable(self) -> bool:
        """Return False, so that no read seeks."""
        return False


def _finite(path: Path, block: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(block).all():
        raise DataError(path, "holds samples that are NaN or infinite", FIX)
    return block


def resampled(source: Iterator[NDArray[np.float32]], from_hz: int) -> Iterator[NDArray[np.float32]]:
    """Yield the blocks at 16 kHz; their joints are those of the whole resampled at once.

    The filter looks at `margin` samples on both sides, so each stretch is resampled together with those around it.
    Stretches begin at a multiple of `step`, where both rates have a sample.
    """
    if from_hz == SAMPLE_RATE_HZ:
        yield from source
        return
    common_hz = math.gcd(from_hz, SAMPLE_RATE_HZ)
    step, made = from_hz // common_hz, SAMPLE_RATE_HZ // common_hz
    margin = step * (2 + math.ceil(FILTER_WIDTH / (min(step, made) * ROLLOFF)))
    held = np.zeros(margin, np.float32)  # the filter takes what is before the first sample as zeros too
    for block in source:
        held = np.concatenate([held, block])
        count = (len(held) - 2 * margin) // step
        if count > 0:
            yield _middle(resample(held, from_hz, SAMPLE_RATE_HZ), margin // step * made, count * made)
            held = held[count * step :]
    rest = len(held) - margin
    if rest > 0:
        yield _middle(resample(held, from_hz, SAMPLE_RATE_HZ), margin // step * made, math.ceil(rest * made / step))


def _middle(wave: NDArray[np.float32], first: int, count: int) -> NDArray[np.float32]:
    return wave[first : first + count]


def _ffmpeg() -> str | None:
    """Return the path of ffmpeg: the one on PATH, or that of the package imageio-ffmpeg; None where there is none."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        packaged = importlib.import_module("imageio_ffmpeg")
        return str(packaged.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


def _decoded(path: Path, start_s: float, end_s: float | None) -> Iterator[NDArray[np.float32]]:
    """Yield the samples of the first sound track as ffmpeg decodes them."""
    with tempfile.TemporaryFile() as log, _started(path, start_s, end_s, log) as process:
        try:
            assert process.stdout is not None
            count, most = 0, round(MAX_DURATION_S * SAMPLE_RATE_HZ)
            while raw := _read_in_time(path, process, process.stdout):
                block = np.frombuffer(raw[: len(raw) // 4 * 4], "<f4").astype(np.float32)
                count += len(block)
                if count > most:
                    what = f"lasts more than {MAX_DURATION_S:.0f} s"
                    raise DataError(path, what, "cut it into recordings of four hours at most")
                yield _finite(path, block)
            status = process.wait()
            is_short = end_s is not None and count < (end_s - start_s - SHORT_S) * SAMPLE_RATE_HZ
            # behind a seek the first packet may begin in the middle of a frame, which is no damage
            _check(path, status, count, _said(log, path), is_strict=start_s == 0 or is_short)
        finally:
            process.kill()


def _started(path: Path, start_s: float, end_s: float | None, log: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [_ffmpeg() or "ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-format_whitelist", FFMPEG_FORMATS]
    command += ["-protocol_whitelist", "file", "-ss", f"{start_s:.6f}"]
    command += ["-t", f"{MAX_DURATION_S + 1 if end_s is None else end_s - start_s:.6f}"]
    command += ["-i", f"file:{path.resolve()}", "-map", "0:a:0", "-ac", "1", "-ar", str(SAMPLE_RATE_HZ)]
    command += ["-f", "f32le", "pipe:1"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)


def _read_in_time(path: Path, process: subprocess.Popen[bytes], stream: IO[bytes]) -> bytes:
    """Return the next block's bytes; the process is ended where they do not come."""
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        process.kill()

    timer = threading.Timer(STALL_S, end)
    timer.start()
    try:
        raw = stream.read(4 * round(BLOCK_S * SAMPLE_RATE_HZ))
    finally:
        timer.cancel()
    if is_late.is_set():
        raise DataError(path, f"took ffmpeg more than {STALL_S:.0f} s for {BLOCK_S:.0f} s of sound", FIX)
    return raw


def _check(path: Path, status: int, count: int, said: str, *, is_strict: bool) -> None:
    """Tell what ffmpeg met: it decodes what is left of a damaged file, and ends with the status 0.

    Raises:
        DataError: it failed, gave no samples, or, where `is_strict`, `said` something of a fault.
    """
    if NO_SOUND in said:
        raise DataError(path, "has no sound track", "name a file with sound")
    if not count:
        raise DataError(path, f"is not audio that libsndfile or ffmpeg reads ({said or 'no samples'})", FIX)
    if status != 0 or (said and is_strict):
        raise DataError(path, f"is cut short or damaged ({said or f'ffmpeg ended with {status}'})", FIX)


def _said(log: IO[bytes], path: Path) -> str:
    """Return the first line that ffmpeg wrote of the sound, without writer and path, or NO_SOUND, or nothing."""
    name, first = os.fsencode(f"file:{path.resolve()}"), ""
    log.seek(0)
    for raw in log:
        line = raw[:MAX_REASON_BYTES].replace(name, b"").decode("utf-8", "replace").rstrip()
        if NO_SOUND in line:
            return NO_SOUND
        if not OF_PICTURES.match(line):
            first = first or LOGGED_BY.sub("", line).strip(" :.")
    return first

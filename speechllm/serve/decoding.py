"""Has files from outside unpacked by a process that is bounded and can be killed (`speechllm.serve.unpacker`).

That process writes one channel of plain samples; all else of the server reads only that. Nothing else is taken from
it but a short JSON record, so that a decoder that was taken over reaches no further than its own limits.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import speechllm
from speechllm.serve.limits import ApiError, busy
from speechllm.serve.unpacker import READY, Job

if TYPE_CHECKING:
    from speechllm.serve.limits import Limits

MAX_RECORD_BYTES = 4096
STOP_S = 5.0
BEGINNINGS = (b"RIFF", b"RIFX", b"RF64", b"riff", b"FORM", b"fLaC", b"OggS", b"caff", b".snd", b"ID3")
"""WAV, Wave64, AIFF, FLAC, Ogg (Vorbis, Opus), CAF, AU, MP3 with a tag."""
READABLE = "WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF, CAF or AU"


def is_audio(path: Path) -> bool:
    """Return whether a file begins as one of the formats does that libsndfile reads; its name says nothing."""
    with path.open("rb") as stream:
        begin = stream.read(4)
    is_mpeg_frame = len(begin) > 1 and begin[0] == 0xFF and begin[1] & 0xE0 == 0xE0 and begin[1] & 0x06 != 0  # noqa: PLR2004
    return is_mpeg_frame or begin.startswith(BEGINNINGS)


class Unpacker:
    """The process that unpacks; it is started again if something ended it."""

    def __init__(self, limits: Limits) -> None:
        """Begin without the process; the first file, or `start`, starts it."""
        self._limits = limits
        self._at_once = asyncio.Semaphore(limits.decoders)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    async def unpack(self, source: Path, target: Path) -> float:
        """Return the seconds of the sound in `source`; `target` becomes a WAV of one channel at the same rate.

        Raises:
            ApiError: 415, not a sound; 413, too long; 422, broken, or its decoder hung, crashed or took too much; 503,
                the disk is full.
        """
        if not is_audio(source):
            message = f"The file is not a sound that can be read: send {READABLE}."
            raise ApiError(415, message, param="file", code="unsupported_format")
        async with self._at_once:
            found = await self._run(self._job(source, target))
        if found.get("kind") == "long":
            raise ApiError(413, f"The recording {found.get('what')}.", param="file", code="recording_too_long")
        if found.get("kind") == "no_room":
            raise busy(503, "The server cannot store what the file unpacks to now.", "no_room")
        duration_s = found.get("duration_s")
        if found.get("kind") != "ok" or not isinstance(duration_s, float):
            raise ApiError(422, f"The file {found.get('what')}.", param="file", code="broken_file")
        return duration_s

    def start(self) -> None:
        """Start the process, and wait until it is ready."""
        self._started()

    def close(self) -> None:
        """End the process, and with it all that it unpacks."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._control = self._process = None

    def _job(self, source: Path, target: Path) -> Job:
        limits = self._limits
        memory, time_s = limits.decode_memory_bytes, limits.decode_s
        return Job(str(source), str(target), limits.max_seconds, limits.max_decoded_bytes, memory, time_s)

    async def _run(self, job: Job) -> dict[str, object]:
        """Return the record of a job, or what became of it; leaving this, for whatever reason, kills the job."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._send(json.dumps(asdict(job)).encode(), theirs)
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(job.time_s):
                return _record(await reader.read(MAX_RECORD_BYTES))
        except TimeoutError:
            return {"kind": "broken", "what": f"took longer than {job.time_s:g} s to decode"}
        finally:
            writer.close()

    def _send(self, job: bytes, answers: socket.socket) -> None:
        try:
            socket.send_fds(self._started(), [job], [answers.fileno()])
        except OSError:  # it was killed, by the system for lack of memory for example
            self.close()
            try:
                socket.send_fds(self._started(), [job], [answers.fileno()])
            except OSError as error:
                raise busy(503, "Files cannot be unpacked now.", "no_decoder") from error

    def _started(self) -> socket.socket:
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                number = theirs.fileno()
                command = [sys.executable, "-P", "-m", "speechllm.serve.unpacker", str(number)]
                package = str(Path(speechllm.__file__).parents[1])
                # threads would not survive the forks
                variables = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[number], env=variables, start_new_session=True
                )
            if self._control.recv(len(READY)) != READY:
                raise OSError("the process that unpacks files did not start")
        return self._control


def _record(data: bytes) -> dict[str, object]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    failed: dict[str, object] = {"kind": "broken", "what": "made its decoder fail"}
    return found if isinstance(found, dict) else failed

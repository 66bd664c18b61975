"""The process boundary: a worker in an environment of its own turns sounds into texts.

Packages that cannot live beside ours are called as a program. An object of JSON a line; requests go to its stdin,
answers come from its stdout, in any order:

    worker  {"ready": true, "versions": {"espnet": "202511", ...}, "device": "cpu"}
    ours    {"utt_id": "u1", "sound": "/.../0.npy"}
    worker  {"utt_id": "u1", "text": "はい"}   or   {"utt_id": "u1", "error": "what failed"}

A sound is a NumPy file of float32 [s] at 16 kHz, written by us, so what a worker reads has passed our own reader. The
worker ends when its stdin does. Its stderr, with whatever its libraries print, is kept in ``worker.log``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from speechllm.data import audio
from speechllm.errors import DataError, ModelError
from speechllm.folders import differences
from speechllm.runtime import read_whole_lines, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from speechllm.data.kaldi import DataDir, Utterance

log = logging.getLogger(__name__)

PARTIAL = ".partial.jsonl"
SOUNDS = ".sounds"
LOG = "worker.log"
MAX_AHEAD = 4  # sounds on disk at a time; and so many requests fit any pipe: writing one never blocks
MAX_LINE_BYTES = 1 << 20
READ_BYTES = 1 << 16
SHOWN_CHARS = 300
GRACE_S = 60.0  # to end once asked to; libraries of GPUs take their time


@dataclass(frozen=True)
class Patience:
    """How long a worker may say nothing."""

    base_s: float = 1800.0
    """To load its model, or to make a text."""
    per_second: float = 30.0
    """More for each second of sound that it has in hand."""


@dataclass(frozen=True)
class Program:
    """How a worker is started."""

    name: str
    command: tuple[str, ...]
    folder: Path
    """Where it runs."""
    patience: Patience


@dataclass(frozen=True)
class Transcript:
    """What a worker made of a data directory, in this run and in those before that were cut short."""

    texts: Mapping[str, str]
    ready: Mapping[str, Any]
    """What the worker said of itself: versions and device."""
    decoded: int
    """Utterances of this run."""
    rtf: Mapping[str, float | bool | None]


def transcribe(program: Program, data: DataDir, out: Path, ahead: int) -> Transcript:
    """Return the texts of `data`; each goes to a partial file in `out` as it comes, and a later run goes on from there.

    `ahead` sounds, four at most, are read while the worker is busy. The partial file is the caller's to remove, once
    the texts are written.

    Raises:
        DataError: a sound is at fault, or the partial file was made with other versions.
        ModelError: the worker died, hung, or broke the protocol.
    """
    ready, texts = _read_partial(out / PARTIAL, data)
    waiting = {utt_id: utt for utt_id, utt in data.utterances.items() if utt_id not in texts}
    audio_s = wall_s = 0.0
    if waiting:
        with _sounds(out / SOUNDS) as sounds, _started(program, out / LOG) as worker:
            _begin_partial(out, ready, worker.ready)
            began = time.perf_counter()
            made, audio_s = _transcribe_waiting(worker, waiting, sounds, out / PARTIAL, min(ahead, MAX_AHEAD))
            wall_s = time.perf_counter() - began
        ready = worker.ready
        texts |= made
    factor = wall_s / audio_s if audio_s else None
    rtf = {"audio_s": audio_s, "wall_s": wall_s, "rtf": factor, "encoder_included": True}
    return Transcript(texts, ready, len(waiting), rtf)


def _transcribe_waiting(
    worker: Worker, waiting: Mapping[str, Utterance], sounds: Path, partial: Path, ahead: int
) -> tuple[dict[str, str], float]:
    """Return the texts of `waiting`, and how many seconds of sound they are."""
    texts: dict[str, str] = {}
    audio_s = 0.0
    numbered = enumerate(waiting.items())
    with (
        partial.open("a", encoding="utf-8") as stream,
        tqdm(total=len(waiting), desc=worker.name, unit="utt", disable=None) as bar,
    ):
        while len(texts) < len(waiting):
            for number, (utt_id, utt) in itertools.islice(numbered, ahead - len(worker.in_hand)):
                audio_s += worker.ask(utt_id, utt, sounds / f"{number}.npy")
            utt_id, text = worker.answer()
            stream.write(_line({"utt_id": utt_id, "text": text}))
            stream.flush()
            texts[utt_id] = text
            bar.update()
    return texts, audio_s


def _line(entry: Mapping[str, object]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _sounds(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, which is removed afterwards; a killed run's is emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_partial(path: Path, data: DataDir) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the worker of a run that was cut short said of itself, and its texts; a torn last line goes."""
    entries = read_whole_lines(path)
    if path.is_file():
        write_text(path, "".join(map(_line, entries)))
    texts = {entry["utt_id"]: entry["text"] for entry in entries[1:] if entry["utt_id"] in data.utterances}
    return (entries[0] if entries else {}), texts


def _begin_partial(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Note at the top of the partial file what worker writes it.

    Raises:
        DataError: it was begun with other versions.
    """
    if not before:
        write_text(out / PARTIAL, _line(now))
    for name, was, new in differences(before.get("versions", now["versions"]), now["versions"]):
        what = f"holds texts made with {name} {was}, now it is {new}"
        raise DataError(out, what, "remove the folder or choose another")


@contextlib.contextmanager
def _started(program: Program, log_file: Path) -> Iterator[Worker]:
    """Yield a worker that is ready; it is asked to end afterwards, or killed after an error."""
    log_file.unlink(missing_ok=True)  # the worker of a run that was killed may still write to the old one
    with log_file.open("wb") as errors:
        try:
            process = subprocess.Popen(
                program.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=program.folder,
                env=_environment(),
            )
        except OSError as error:
            raise ModelError(program.command[0], f"cannot be run ({error})", "install its environment again") from error
    with process:
        try:
            worker = Worker(program, process, log_file)
            yield worker
            worker.end()
        except BaseException:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr] # we asked for the pipe
            raise


def _environment() -> dict[str, str]:
    """Return our environment without what would lead its Python to our packages or the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "PYTHONNOUSERSITE": "1", "PYTHONUTF8": "1"}


class Worker:
    """A running worker and the sounds that it has in hand."""

    def __init__(self, program: Program, process: subprocess.Popen[bytes], log_file: Path) -> None:
        """Wait until it is ready.

        Raises:
            ModelError: it died, hung, or said something else.
        """
        assert process.stdin is not None
        assert process.stdout is not None
        self.name = program.name
        self.in_hand: dict[str, tuple[Path, float]] = {}
        self._process, self._log, self._patience = process, log_file, program.patience
        self._requests, self._answers = process.stdin, process.stdout.fileno()
        self._unread = b""
        self.ready = self._object()
        if self.ready.pop("ready", None) is not True or not isinstance(self.ready.get("versions"), dict):
            raise self._fault("its worker did not begin with its versions")

    def ask(self, utt_id: str, utt: Utterance, sound: Path) -> float:
        """Hand over an utterance by way of the file `sound`; return its seconds.

        Raises:
            DataError: the sound cannot be read.
        """
        wave_s = utt.read()
        duration_s = len(wave_s) / audio.SAMPLE_RATE_HZ
        np.save(sound, wave_s, allow_pickle=False)
        self.in_hand[utt_id] = sound, duration_s
        with contextlib.suppress(BrokenPipeError):  # dead: known once the answers that it gave are read
            self._requests.write(_line({"utt_id": utt_id, "sound": str(sound.resolve())}).encode())
            self._requests.flush()
        return duration_s

    def answer(self) -> tuple[str, str]:
        """Return the next (id, text); line breaks and runs of blanks become a blank.

        Raises:
            ModelError: the worker died, hung, failed on an utterance, or answered what was not asked.
        """
        entry = self._object()
        utt_id = entry.get("utt_id")
        if not isinstance(utt_id, str) or utt_id not in self.in_hand:
            raise self._fault(f"its worker answered for {utt_id!r}, which it was not asked for")
        if "error" in entry:
            raise self._fault(f"failed on utterance {utt_id}: {_shown(str(entry['error']))}")
        text = entry.get("text")
        if not isinstance(text, str) or not _is_plain(text):
            raise self._fault(f"its worker answered utterance {utt_id} with no text")
        self.in_hand.pop(utt_id)[0].unlink(missing_ok=True)
        return utt_id, " ".join(text.split())

    def end(self) -> None:
        """Let it end by itself. All its texts are here, so a failure now is told, not raised."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        try:
            status = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self.ready = {**self.ready, "exit_status": status}
        if status:
            log.warning("worker ended badly after its last text name=%s status=%d log=%s", self.name, status, self._log)

    def _object(self) -> dict[str, Any]:
        line = self._read_line()
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise self._fault(f"its worker wrote a line that is no JSON object: {_shown(_text_of(line))}")
        return entry

    def _read_line(self) -> bytes:
        """Return its next line, waited for as long as patience lasts."""
        limit_s = self._patience.base_s + self._patience.per_second * sum(length for _, length in self.in_hand.values())
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._unread:
            if len(self._unread) > MAX_LINE_BYTES:
                raise self._fault(f"its worker wrote a line of more than {MAX_LINE_BYTES} bytes")
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._answers], [], [], left_s)[0]:
                raise self._fault(f"its worker said nothing for {limit_s:.0f} s")
            read = os.read(self._answers, READ_BYTES)
            if not read:
                raise self._death()
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _death(self) -> ModelError:
        try:
            status = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return self._fault("its worker closed its output")
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return self._fault(f"its worker {how}")

    def _fault(self, what: str) -> ModelError:
        last = _last_line(self._log)
        said = f" (it last said: {last})" if last else ""
        return ModelError(self.name, f"{what}{said}", f"see {self._log} and run again, finished texts are kept")


def _is_plain(text: str) -> bool:
    """Return whether a Kaldi table can hold `text`: no NUL, no half of a surrogate pair."""
    return not any(char == "\x00" or "\ud800" <= char <= "\udfff" for char in text)


def _text_of(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def _shown(text: str) -> str:
    """Return `text` as one line of an error can show it."""
    return "".join(char if char.isprintable() else " " for char in text).strip()[:SHOWN_CHARS]


def _last_line(path: Path) -> str:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - READ_BYTES))
        lines = [_shown(line) for line in _text_of(stream.read()).splitlines()]
    return next((line for line in reversed(lines) if line), "")

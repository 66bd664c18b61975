"""Kaldi data directories: read, checked, written.

Format: https://kaldi-asr.org/doc/data_prep.html. Every file is UTF-8; a line ends at a line feed only; its
key ends at the first space or tab only; keys are unique, sorted by bytes, and the files agree on them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from speechllm.data import audio, pipes, segments
from speechllm.errors import DataError
from speechllm.runtime import hash_texts, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    OnFault = Callable[[DataError], None]
    """What is done with a fault: raised by default, gathered by `validate`."""

MAX_FILE_BYTES = 1 << 30
MAX_LINE_CHARS = 1 << 20
MAX_ID_CHARS = 200
MIN_DURATION_S = 0.1
HASHED_EDGE_BYTES = 1 << 16  # of each audio file, at both ends
BOM = "\ufeff"
FIX_ENCODING = "save it as UTF-8 without byte order mark"


@dataclass(frozen=True)
class Utterance:
    """One utterance: its sound, and what is known of it."""

    utt_id: str
    wav: Path
    start_s: float = 0.0
    end_s: float | None = None
    text: str | None = None
    speaker: str | None = None

    def duration_s(self) -> float:
        """Return its length in seconds, from its segment or from the header of its audio."""
        end_s = audio.inspect(self.wav).duration_s if self.end_s is None else self.end_s
        return end_s - self.start_s

    def read(self) -> NDArray[np.float32]:
        """Return its samples [s] at 16 kHz.

        Raises:
            DataError: the sound cannot be read; the utterance is named.
        """
        try:
            return audio.read(self.wav, self.start_s, self.end_s)
        except DataError as error:
            raise DataError(f"{error.where} (utterance {self.utt_id})", error.what, error.fix) from error


@dataclass(frozen=True)
class DataDir:
    """A data directory in memory: utterances by id, in byte order."""

    path: Path
    utterances: Mapping[str, Utterance]

    def __len__(self) -> int:
        """Return the number of utterances."""
        return len(self.utterances)

    def texts(self) -> dict[str, str]:
        """Return id -> transcript.

        Raises:
            DataError: an utterance has no transcript.
        """
        found = {utt_id: utt.text for utt_id, utt in self.utterances.items()}
        for utt_id, text in found.items():
            if text is None:
                raise DataError(self.path / "text", f"{utt_id} has no transcript", "add its line")
        return {utt_id: text for utt_id, text in found.items() if text is not None}


def byte_order(keys: Iterable[str]) -> list[str]:
    """Return `keys` in the order of ``LC_ALL=C sort``."""
    return sorted(keys, key=lambda key: key.encode("utf-8"))


def _raise(fault: DataError) -> None:
    raise fault


def lines_of(path: Path, on_fault: OnFault = _raise) -> Iterator[tuple[int, str]]:
    r"""Yield (line number, line) of a UTF-8 file; only ``\n`` ends a line, one ``\r`` before it is dropped.

    Raises:
        DataError: the file is missing, too large, not UTF-8, or holds a NUL or a byte order mark.
    """
    if not path.is_file():
        if path.exists():
            raise DataError(path, "is no ordinary file", "give a file; a pipe cannot be read twice")
        raise DataError(path, "no such file", "make the data directory again, or mend its path")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(path, f"is larger than {MAX_FILE_BYTES >> 20} MiB", "split it")
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line = _decode(f"{path}:{number}", raw)
        except DataError as fault:
            on_fault(fault)
            continue
        if line.strip(" \t"):
            yield number, line


def _decode(where: str, raw: bytes) -> str:
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(where, f"is not UTF-8 (byte {error.start + 1})", FIX_ENCODING) from error
    if line.startswith(BOM):
        raise DataError(where, "begins with a byte order mark", FIX_ENCODING)
    if "\x00" in line:
        raise DataError(where, "holds a NUL character", "delete it")
    if len(line) > MAX_LINE_CHARS:
        raise DataError(where, f"is longer than {MAX_LINE_CHARS} characters", "split it")
    return line.removesuffix("\r")


def split_key(line: str) -> tuple[str, str]:
    """Return the key and the rest, split at the first space or tab only; blanks around the rest go."""
    for position, char in enumerate(line):
        if char in " \t":
            return line[:position], line[position:].strip(" \t")
    return line, ""


def read_table(path: Path, on_fault: OnFault = _raise) -> dict[str, str]:
    """Return key -> rest of a Kaldi table (``text``, ``wav.scp``, ``utt2spk``, ...), in file order.

    A line that holds a key and nothing else has the value ``""``.

    Raises:
        DataError: as `lines_of`; or a key is repeated, empty, too long, or could leave its folder.
    """
    table: dict[str, str] = {}
    for number, line in lines_of(path, on_fault):
        key, value = split_key(line)
        if fault := key_fault(key):
            on_fault(DataError(f"{path}:{number}", fault, "rename the utterance"))
        elif key in table:
            on_fault(DataError(f"{path}:{number}", f"{key} stands here twice", "delete one of its lines"))
        else:
            table[key] = value
    return table


def key_fault(key: str) -> str | None:
    """Return what is wrong with an utterance or recording id, or None."""
    if not key:
        return "the line begins with a blank, so it has no id"
    if len(key) > MAX_ID_CHARS:
        return f"the id is longer than {MAX_ID_CHARS} characters"
    if "/" in key or "\\" in key or key in {".", ".."} or not key.isprintable():
        return f"the id {key!r} cannot be part of a file name"
    return None


def wav_path(where: str, value: str) -> Path:
    """Return the audio path of a ``wav.scp`` value.

    Raises:
        DataError: it is a pipe (never run here) or empty.
    """
    if value.endswith("|"):
        raise DataError(where, "is a command, which is not run", f"{pipes.WRITE_A_FILE}, or see --allow-pipes")
    if not value:
        raise DataError(where, "names no audio file", "add its path")
    return Path(value)


def load(path: Path, *, need_text: bool = True, on_fault: OnFault = _raise, piped: Path | None = None) -> DataDir:
    """Return the data directory at `path`, its files joined by id.

    Where `on_fault` returns, what is at fault is left out. Commands in ``wav.scp`` are run where `piped` names a folder
    for what they write.

    Raises:
        DataError: a file is missing or malformed, or the files disagree about the utterances.
    """
    if not path.is_dir():
        raise DataError(path, "no such data directory", "run stage 1, or mend the path")
    wavs = _read_wavs(path, on_fault, piped)
    spans = _read_segments(path, wavs, on_fault)
    texts = read_table(path / "text", on_fault) if need_text or os.path.lexists(path / "text") else {}
    speakers = read_table(path / "utt2spk", on_fault) if os.path.lexists(path / "utt2spk") else {}
    if not spans:
        raise DataError(path / "wav.scp", "holds no utterance", "run stage 1 again")
    if need_text or texts:
        _require_same(path / "text", "transcript", texts, spans, on_fault)
    if speakers:
        _require_same(path / "utt2spk", "speaker", speakers, spans, on_fault)
    return DataDir(
        path,
        {
            utt_id: Utterance(utt_id, *spans[utt_id], texts.get(utt_id), speakers.get(utt_id))
            for utt_id in byte_order(spans)
        },
    )


def _read_wavs(path: Path, on_fault: OnFault, piped: Path | None) -> dict[str, Path]:
    wavs = {}
    commands = {}
    for key, value in read_table(path / "wav.scp", on_fault).items():
        where = f"{path}/wav.scp: {key}"
        try:
            if piped is not None and value.endswith("|"):
                commands[key] = (where, value)
            else:
                wavs[key] = wav_path(where, value)
        except DataError as fault:
            on_fault(fault)
    if piped is not None and commands:
        wavs |= pipes.run_all(commands, piped, on_fault)
    return wavs


def _read_segments(
    path: Path, wavs: Mapping[str, Path], on_fault: OnFault
) -> dict[str, tuple[Path, float, float | None]]:
    """Return utterance -> (audio, start, end); without ``segments`` each recording is one utterance."""
    if not os.path.lexists(path / "segments"):
        return {key: (wav, 0.0, None) for key, wav in wavs.items()}
    spans: dict[str, tuple[Path, float, float | None]] = {}
    for utt_id, value in read_table(path / "segments", on_fault).items():
        try:
            spans[utt_id] = segments.span(f"{path}/segments: {utt_id}", value, wavs)
        except DataError as fault:
            on_fault(fault)
    return spans


def _require_same(
    file: Path, what: str, found: Mapping[str, object], wanted: Mapping[str, object], on_fault: OnFault
) -> None:
    for utt_id in byte_order(wanted.keys() - found.keys()):
        on_fault(DataError(file, f"{utt_id} has audio but no {what}", "add its line or take it out of wav.scp"))
    for utt_id in byte_order(found.keys() - wanted.keys()):
        on_fault(DataError(file, f"{utt_id} has a {what} but no audio in wav.scp", "rerun stage 1 or delete the line"))


@dataclass
class Report:
    """What `validate` found."""

    faults: list[str] = field(default_factory=list)
    num_utts: int = 0
    num_speakers: int = 0
    duration_s: float = 0.0

    def add(self, fault: DataError) -> None:
        """Keep a fault."""
        self.faults.append(str(fault))

    def as_text(self) -> str:
        """Return one line of counts and hours."""
        hours = f", {self.duration_s / 3600:.3f} h" if self.duration_s else ""
        return f"{self.num_utts} utterances, {self.num_speakers} speakers{hours}, {len(self.faults)} faults"


def validate(path: Path, *, with_audio: bool = False, piped: Path | None = None) -> Report:
    """Return every fault of a data directory, its counts, and its hours.

    Hours come from ``utt2dur``, or from the audio itself where `with_audio` is set. `piped` is as for `load`.
    """
    report = Report()
    try:
        data = load(path, on_fault=report.add, piped=piped)
    except DataError as fault:
        report.add(fault)
        return report
    report.num_utts = len(data)
    report.num_speakers = len({utt.speaker for utt in data.utterances.values()} - {None})
    for utt in data.utterances.values():
        if utt.text is not None and not utt.text.strip():
            what = f"{utt.utt_id} has an empty transcript"
            report.add(DataError(path / "text", what, "write it or delete the utterance"))
    _check_order(path, report.add)
    segments.check_overlaps(data.utterances.values(), path / "segments", report.add)
    _check_spk2utt(data, report.add)
    durations = _given_durations(data, report.add)
    for utt in data.utterances.values():
        report.duration_s += _duration_s(utt, durations, report.add, with_audio=with_audio)
    return report


def _check_order(path: Path, on_fault: OnFault) -> None:
    for name in ("wav.scp", "text", "utt2spk", "segments"):
        if os.path.lexists(path / name):
            keys = list(read_table(path / name, lambda _: None))  # `load` has told them
            if keys != byte_order(keys):
                on_fault(DataError(path / name, "is not sorted by bytes", "sort it with LC_ALL=C sort"))


def _check_spk2utt(data: DataDir, on_fault: OnFault) -> None:
    file = data.path / "spk2utt"
    given = {utt_id: utt.speaker for utt_id, utt in data.utterances.items() if utt.speaker is not None}
    if not (given and os.path.lexists(file)):
        return
    listed = {utt_id: key for key, utt_ids in read_table(file, on_fault).items() for utt_id in utt_ids.split()}
    for utt_id in byte_order(given.keys() | listed.keys()):
        if listed.get(utt_id) != given.get(utt_id):
            on_fault(DataError(file, f"disagrees with utt2spk about {utt_id}", "make it again from utt2spk"))


def _given_durations(data: DataDir, on_fault: OnFault) -> dict[str, float]:
    file = data.path / "utt2dur"
    if not os.path.lexists(file):
        return {}
    durations = {}
    given = read_table(file, on_fault)
    _require_same(file, "duration", given, data.utterances, on_fault)
    for utt_id, value in given.items():
        try:
            duration_s = float(value)
        except ValueError:
            duration_s = math.nan
        if 0 < duration_s < math.inf:
            durations[utt_id] = duration_s
        else:
            on_fault(DataError(file, f"{utt_id} has no number of seconds", "rerun stage 1"))
    return durations


def _duration_s(utt: Utterance, given: Mapping[str, float], on_fault: OnFault, *, with_audio: bool) -> float:
    duration_s = given.get(utt.utt_id, 0.0)
    if with_audio:
        try:
            duration_s = len(utt.read()) / audio.SAMPLE_RATE_HZ
        except DataError as fault:
            on_fault(fault)
            return 0.0
        if duration_s < MIN_DURATION_S:
            on_fault(DataError(utt.wav, f"{utt.utt_id} lasts {duration_s:.3f} s", "take it out"))
    return duration_s


def write_dir(
    path: Path,
    utterances: Iterable[Utterance],
    extra: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Write a data directory: wav.scp, text, utt2spk, spk2utt, utt2dur and the tables of `extra`.

    Each file is written aside and renamed; ``wav.scp`` comes last, so a directory that has it is whole.
    """
    by_id = {utt.utt_id: utt for utt in utterances}
    speakers: dict[str, list[str]] = {}
    for utt_id in byte_order(by_id):
        speakers.setdefault(by_id[utt_id].speaker or utt_id, []).append(utt_id)
    write_table(path / "text", {key: utt.text or "" for key, utt in by_id.items()})
    write_table(path / "utt2spk", {key: utt.speaker or key for key, utt in by_id.items()})
    write_table(path / "spk2utt", {key: " ".join(utts) for key, utts in speakers.items()})
    durations = {key: f"{utt.duration_s():.4f}" for key, utt in by_id.items()}
    write_table(path / "utt2dur", durations)
    for name, table in (extra or {}).items():
        write_table(path / name, table)
    write_table(path / "wav.scp", {key: str(utt.wav) for key, utt in by_id.items()})


def write_table(path: Path, table: Mapping[str, str]) -> None:
    """Write key -> value, sorted by bytes."""
    write_text(path, "".join(f"{key} {table[key]}".rstrip(" ") + "\n" for key in byte_order(table)))


def audio_hash(data: DataDir) -> str:
    """Return 16 hexadecimal digits over ids, times, and the size and both ends of every audio file."""
    files = {utt.wav: "" for utt in data.utterances.values()}
    for wav in files:
        with wav.open("rb") as stream:
            edges = stream.read(HASHED_EDGE_BYTES)
            stream.seek(max(0, wav.stat().st_size - HASHED_EDGE_BYTES))
            edges += stream.read(HASHED_EDGE_BYTES)
        files[wav] = f"{wav.stat().st_size} {hashlib.sha256(edges).hexdigest()}"
    return hash_texts(
        json.dumps([utt.utt_id, files[utt.wav], utt.start_s, utt.end_s]) for utt in data.utterances.values()
    )

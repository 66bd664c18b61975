"""What ``speechllm transcribe`` does: finds the recordings, recognises each, writes or prints its text."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Never

from tqdm import tqdm

from speechllm.data import kaldi, streaming
from speechllm.decode import formats
from speechllm.errors import ConfigError, DataError, UserError
from speechllm.runtime import write_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from speechllm.decode.longform import LongOptions, Recognizer
    from speechllm.decode.result import Transcript

STDIN = "-"
MAX_STDIN_BYTES = 4 << 30
COPY_BYTES = 1 << 20
BREAKING = ("Cc", "Cs", "Zl", "Zp", "Zs")  # controls, bytes that are no UTF-8, ends of lines, blanks
# what a folder is searched for; a file that is named is tried whatever it is called
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".au", ".caf", ".w64")
CONTAINERS = (".m4a", ".mp4", ".webm", ".mkv", ".mov", ".aac", ".wma", ".amr", ".3gp")  # for ffmpeg
SUBTITLES = ("srt", "vtt")
MODEL_VARIABLE = "SPEECHLLM_MODEL"
SHIPPED_MODEL = Path(__file__).resolve().parents[1] / "examples" / "mini"


@dataclass(frozen=True)
class Recording:
    """A sound to transcribe, and the name that its output gets."""

    name: str
    path: Path
    start_s: float = 0.0
    end_s: float | None = None
    is_listed: bool = False
    """Comes from a folder or a data directory, so its line carries its name."""


def model_folder(given: Path | None) -> Path:
    """Return the model to use: the one given, or ``$SPEECHLLM_MODEL``, or the one that comes with the repository.

    Raises:
        ConfigError: none was given and none is there.
    """
    if given is not None:
        return given
    if named := os.environ.get(MODEL_VARIABLE):
        return Path(named)
    if SHIPPED_MODEL.is_dir():
        return SHIPPED_MODEL
    raise ConfigError(
        "--model", "was not given", f"give a trained folder, such as exp/NAME/model, or set {MODEL_VARIABLE}"
    )


def load(given: Path | None, device: str | None) -> Recognizer:
    """Return the recogniser of a model folder, see `model_folder`.

    Raises:
        ModelError: the folder is not whole.
    """
    from speechllm.recognizer import SpeechLLM

    return SpeechLLM.from_pretrained(model_folder(given), device)


def read_options(hotwords: Path | None, beam: int | None) -> LongOptions:
    """Return how recordings are recognised, the hotwords read from their file."""
    from speechllm.decode.hotwords import read_hotwords
    from speechllm.decode.longform import LongOptions

    return LongOptions(hotwords=None if hotwords is None else read_hotwords(hotwords), beam=beam)


@contextlib.contextmanager
def found(paths: Sequence[Path]) -> Iterator[list[Recording]]:
    """Yield the recordings that files, folders, Kaldi directories and ``-`` stand for, in their order.

    What comes from the standard input lies in a temporary file while the block runs.

    Raises:
        DataError: a path is not there, a folder holds no audio file, or two recordings have one name.
    """
    with tempfile.TemporaryDirectory(prefix="speechllm-") as folder:
        recordings: list[Recording] = []
        for path in paths:
            recordings += [_from_stdin(Path(folder))] if str(path) == STDIN else _from_path(path)
        names: dict[str, Path] = {}
        for recording in recordings:
            if recording.name in names:
                what = f"has the name {recording.name}, as {names[recording.name]} has"
                raise DataError(recording.path, what, "rename one of them, or transcribe them one by one")
            names[recording.name] = recording.path
        yield recordings


def _from_path(path: Path) -> list[Recording]:
    if not path.is_dir():
        return [Recording(path.stem, path)]
    if (path / "wav.scp").is_file():
        utterances = kaldi.load(path, need_text=False).utterances
        return [
            Recording(utt_id, utt.wav, utt.start_s, utt.end_s, is_listed=True) for utt_id, utt in utterances.items()
        ]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SOUNDS + CONTAINERS and file.is_file())
    if not files:
        raise DataError(path, "holds no audio file and no wav.scp", "name the files")
    return [Recording(file.stem, file, is_listed=True) for file in files]


def _from_stdin(folder: Path) -> Recording:
    path = folder / "stdin"
    with path.open("wb") as out:
        _copy(sys.stdin.buffer, out)
    return Recording("stdin", path)


def _copy(source: IO[bytes], out: IO[bytes]) -> None:
    count = 0
    while block := source.read(COPY_BYTES):
        count += len(block)
        if count > MAX_STDIN_BYTES:
            raise DataError("stdin", f"is longer than {MAX_STDIN_BYTES >> 30} GiB", "give a file")
        out.write(block)
    if not count:
        raise DataError("stdin", "is empty", "pipe a recording into it")


@dataclass(frozen=True)
class Output:
    """In which form texts go where."""

    format: str = "txt"
    folder: Path | None = None

    def check(self, recordings: Sequence[Recording]) -> None:
        """Refuse what would fail only after the recognition; make the folder.

        Raises:
            ConfigError: a form that is not known, or in which `recordings` cannot stand one after another; a folder
                that cannot be made or written.
            DataError: a recording has a name that cannot stand in a line of text.
        """
        if self.format not in formats.FORMATS:
            raise ConfigError("--format", f"{self.format} is not known", f"take one of {', '.join(formats.FORMATS)}")
        if self.folder is not None:
            _make(self.folder)
        elif len(recordings) > 1 and self.format in SUBTITLES:
            what = f"{self.format} of {len(recordings)} recordings cannot be printed"
            raise ConfigError("--format", what, "give --out DIR")
        elif self.format == "txt" and not _is_alone(recordings):
            for recording in recordings:
                if any(unicodedata.category(char) in BREAKING for char in recording.name):
                    what = f"its name {recording.name!r} holds a blank, a line break or another sign that breaks a line"
                    raise DataError(recording.path, what, "rename it, or give --out or --format json")

    def emit(self, name: str, transcript: Transcript, *, is_alone: bool) -> None:
        """Write ``NAME.FORMAT``, or print; a recording that is not alone is one line, with its name.

        Lines of text are those of a Kaldi ``text``, so they can be scored.
        """
        if self.folder is not None:
            path = self.folder / f"{name}.{self.format}"
            write_text(path, formats.FORMATS[self.format](transcript))
            shown = f"{_printable(str(path))}\n"
        elif is_alone or self.format in SUBTITLES:
            shown = formats.FORMATS[self.format](transcript)
        elif self.format == "json":
            shown = json.dumps({"name": _printable(name), **formats.as_record(transcript)}, ensure_ascii=False) + "\n"
        else:
            shown = f"{name} {' '.join(transcript.text.split())}".rstrip() + "\n"
        sys.stdout.write(shown)
        sys.stdout.flush()


def _printable(name: str) -> str:
    """Return `name` as UTF-8 can say it: bytes that are none become escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_alone(recordings: Sequence[Recording]) -> bool:
    return len(recordings) == 1 and not recordings[0].is_listed


def _make(folder: Path) -> None:
    """Make the folder, and see that a file can be made in it."""
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError("--out", f"{folder} is a file", "name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError("--out", f"{folder} cannot be written ({error.strerror})", "name another folder") from error


def transcribe(
    recognizer: Recognizer, recordings: Sequence[Recording], output: Output, options: LongOptions
) -> list[UserError]:
    """Write or print the text of each recording; return the faults of those that could not be read."""
    from speechllm.decode.longform import transcribe_blocks

    faults: list[UserError] = []
    with _bar(recordings) as bar:

        def advance(read_s: float) -> None:
            bar.update(read_s)

        for recording in recordings:
            blocks = streaming.blocks(recording.path, recording.start_s, recording.end_s)
            try:
                transcript = transcribe_blocks(recognizer, blocks, options, advance)
            except DataError as fault:
                faults.append(fault)
                continue
            output.emit(recording.name, transcript, is_alone=_is_alone(recordings))
    return faults


def _bar(recordings: Sequence[Recording]) -> tqdm[Never]:
    """Return a bar of seconds of sound, silent where there is no terminal; without a total where one is not known."""
    total: float | None = 0.0
    for recording in recordings:
        length_s = None
        with contextlib.suppress(DataError):  # told when its turn comes
            length_s = streaming.duration_s(recording.path, recording.start_s, recording.end_s)
        total = None if total is None or length_s is None else total + length_s
    form = "{desc}: {percentage:3.0f}% {n:.0f}/{total:.0f} s of sound [{elapsed}<{remaining}]" if total else None
    return tqdm(total=total, desc="transcribe", unit="s", bar_format=form, disable=None)

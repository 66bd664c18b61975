"""The tar files of ReazonSpeech, one by one: checked, read through `datasets`, stored as folders of FLAC files.

How the corpus lies on the web, and where that is known from:

* ``tsv/SIZE.tsv`` holds lines ``NNN/ID.flac<TAB>transcript`` without a header, NNN three hexadecimal digits;
  ``data/NNN.tar`` (000 to fff) holds the sounds under the same names, FLAC at 16 kHz. So say the dataset card
  (https://huggingface.co/datasets/reazon-research/reazonspeech), its mirrors (litagin/reazon-speech-v2-clone is a
  plain copy in this very layout, which `datasets` recognises as webdataset), and several public programs that fetch
  both parts by hand.
* ``load_dataset("reazon-research/reazonspeech", SIZE)`` runs a loading script. `datasets` 4 and later refuse those
  ("Dataset scripts are no longer supported", https://github.com/reazon-research/ReazonSpeech/issues/64, open), so a tar
  is read by the generic builder ``webdataset`` instead, streamed, and the transcripts are joined to it by name.
* The sound is asked for as plain bytes. ``Audio(decode=False)`` would give the same, but its encoder wants torchcodec
  even for bytes that nobody decodes, and takes a file of the same name in the working directory for the sound.

A tar is scanned before `datasets` opens it: whole, nothing but FLAC files under expected names, sizes bounded.
"""

from __future__ import annotations

import glob
import importlib.util
import itertools
import json
import os
import re
import shutil
import tarfile
import tempfile
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import download

from speechllm.data import audio
from speechllm.errors import ConfigError, DataError
from speechllm.runtime import hash_texts, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = re.compile(r"([0-9a-f]{3})/([0-9A-Za-z_-]{1,64})\.flac")
MAX_LINE_BYTES = 1 << 16
MAX_SOUND_BYTES = 64 << 20
MAX_TAR_FILES = 100_000
CHECKED_S = 60.0
"""Sounds up to this length are decoded once, so that a broken one is found now and not in training."""
ENTRIES = "entries.jsonl"
VERSION = 1
TAR_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Shard:
    """One tar file to be: the lines of the table that belong to it, and the folder that its sounds go to."""

    lines: Path
    folder: Path


@dataclass(frozen=True)
class Entry:
    """One utterance as the corpus has it: its sound in the folder, or why there is none."""

    utt_id: str
    text: str
    wav: str = ""
    """File name in the folder of its shard; empty where there is no sound."""
    duration_s: float = 0.0
    fault: str = ""


def require_library() -> None:
    """Check that the package `datasets` is there, before anything is fetched for it.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("datasets", "is not installed", "pip install -e .[corpora]")


def split_table(table: Path, folder: Path) -> None:
    """Write the lines of `table` to ``folder/NNN.tsv``, by the tar that they belong to. What is there is kept.

    Memory holds one line, whatever the size of the table.

    Raises:
        DataError: a line is too long, not UTF-8, holds a NUL, or does not begin with a name of the corpus.
    """
    if folder.is_dir():
        return
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for number, lines in itertools.groupby(_lines(table), key=lambda line: line[:3]):
        with (aside / f"{number}.tsv").open("a", encoding="utf-8", newline="\n") as stream:
            stream.writelines(lines)
    aside.rename(folder)


def _lines(table: Path) -> Iterator[str]:
    """Yield the lines of a table, each checked, its line feed with it."""
    with table.open("rb") as stream:
        for number in itertools.count(1):
            raw = stream.readline(MAX_LINE_BYTES)
            if not raw:
                return
            where, fix = f"{table}:{number}", "fetch the table again"
            if len(raw) == MAX_LINE_BYTES:
                raise DataError(where, f"is longer than {MAX_LINE_BYTES} bytes", fix)
            try:
                line = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(where, f"is not UTF-8 (byte {error.start + 1})", fix) from error
            if "\x00" in line:
                raise DataError(where, "holds a NUL character", fix)
            if not NAME.fullmatch(line.partition("\t")[0]):
                raise DataError(where, "does not begin with NNN/ID.flac and a tab", fix)
            yield f"{line}\n"


def is_stored(shard: Shard) -> bool:
    """Return whether the sounds of `shard` are all in its folder, by the lines that it has now."""
    record = shard.folder / ENTRIES
    if not record.is_file():
        return False
    with record.open(encoding="utf-8") as stream:
        return stream.readline() == _head(shard)


def _head(shard: Shard) -> str:
    """Return the first line of the record: what the folder was made from."""
    return json.dumps({"lines": hash_texts(sorted(_lines(shard.lines))), "version": VERSION}) + "\n"


def store(shard: Shard, tar: Path) -> int:
    """Write the sounds of `tar` to the folder of its shard, the record of them last; return the number of entries.

    Raises:
        DataError: the tar is cut short, holds something else than sounds, or belongs to another table.
    """
    names = names_in(tar)
    texts = dict(line.rstrip("\n").partition("\t")[::2] for line in _lines(shard.lines))
    if not names & texts.keys():
        what = f"none of its {len(names)} sounds is in the table"
        raise DataError(tar, what, "take table and tar of one version")
    shard.folder.mkdir(parents=True, exist_ok=True)
    entries = [
        _store_sound(shard.folder, name, content, texts[name])
        if name in texts
        else Entry(_utt_id(name), "", fault="no transcript")
        for name, content in read(tar)
    ]
    entries += [Entry(_utt_id(name), texts[name], fault="no sound") for name in texts.keys() - names]
    lines = [json.dumps(astuple(entry), ensure_ascii=False) + "\n" for entry in sorted(entries, key=astuple)]
    write_text(shard.folder / ENTRIES, _head(shard) + "".join(lines))
    return len(entries)


def entries(folder: Path) -> Iterator[Entry]:
    """Yield the entries of a stored shard, sorted by id."""
    with (folder / ENTRIES).open(encoding="utf-8") as stream:
        next(stream)
        for line in stream:
            yield Entry(*json.loads(line))


def _utt_id(name: str) -> str:
    """Return ``NNN-ID`` for ``NNN/ID.flac``."""
    return name.removesuffix(".flac").replace("/", "-")


def names_in(tar: Path) -> set[str]:
    """Return the names of the sounds in a tar file, by its headers alone.

    Raises:
        DataError: it is cut short, or holds anything else than FLAC files of bounded size under different names.
    """
    names: set[str] = set()
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isdir():
                    continue
                if not (member.isreg() and NAME.fullmatch(name)) or name in names:
                    raise DataError(tar, f"holds {member.name!r}, which is no sound of the corpus", "take it out")
                if not 0 < member.size <= MAX_SOUND_BYTES or len(names) == MAX_TAR_FILES:
                    what = f"holds {member.name!r} of {member.size} bytes after {len(names)} others"
                    raise DataError(tar, what, "take it out")
                names.add(name)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(tar, f"is no whole tar file ({error})", download.FETCH_AGAIN) from error
    except FileNotFoundError as error:
        raise DataError(tar, "no such file", "complete the copy of the corpus") from error
    _require_end(tar)
    return names


def _require_end(tar: Path) -> None:
    """Refuse a tar that was cut between two members, which tarfile reads as a shorter one."""
    with tar.open("rb") as stream:
        stream.seek(-TAR_BLOCK_BYTES, 2)
        if any(stream.read()):
            raise DataError(tar, "is no whole tar file (its end is missing)", download.FETCH_AGAIN)


def read(tar: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each sound in a tar file, through the builder `webdataset` of `datasets`."""
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # else each tar is announced over the network
    datasets: Any = importlib.import_module("datasets")  # takes seconds, and only those who read a tar need it
    columns = {name: datasets.Value("string") for name in ("__key__", "__url__")}
    with tempfile.TemporaryDirectory() as cache:  # even a stream leaves a lock file in its cache
        stream = datasets.load_dataset(
            "webdataset",
            data_files={"train": [glob.escape(str(tar.resolve()))]},
            split="train",
            streaming=True,
            features=datasets.Features({**columns, "flac": datasets.Value("binary")}),
            cache_dir=cache,
        )
        for example in stream:
            yield f"{example['__key__'].removeprefix('./')}.flac", example["flac"]


def _store_sound(folder: Path, name: str, content: bytes, text: str) -> Entry:
    """Return the entry of a sound that was written to `folder`: FLAC at 16 kHz as it came, anything else as WAV."""
    stem = name.partition("/")[2].removesuffix(".flac")
    aside = folder / f".{stem}.tmp"
    aside.write_bytes(content)
    try:
        info = audio.inspect(aside)
        as_it_is = content.startswith(b"fLaC") and (info.sample_rate_hz, info.num_channels) == (audio.SAMPLE_RATE_HZ, 1)
        wave = audio.read(aside) if info.duration_s <= CHECKED_S or not as_it_is else None
        wav = f"{stem}.flac" if as_it_is else f"{stem}.wav"
        if as_it_is or wave is None:
            aside.replace(folder / wav)
        else:
            audio.write_wav(folder / wav, wave, audio.SAMPLE_RATE_HZ)
    except DataError as error:
        return Entry(_utt_id(name), text, fault=f"unreadable sound ({error.what})")
    finally:
        aside.unlink(missing_ok=True)
    return Entry(_utt_id(name), text, wav, info.duration_s)

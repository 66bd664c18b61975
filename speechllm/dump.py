"""Stage 2: frozen-encoder features of a data directory, in shards that a killed run need not make again.

Each shard is an archive (`data.archive`) and a mark beside it, written last, which says that it is whole: the SHA-256
of the archive, its size and time, and the frames and checksum of every utterance, or why its sound could not be read.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from tqdm import tqdm

from speechllm import dump_tables as tables
from speechllm.data import archive, kaldi
from speechllm.dump_mark import Mark, read_mark
from speechllm.errors import DataError
from speechllm.folders import begin, finish, is_made, only_writer
from speechllm.model import hub
from speechllm.model.identity import identity
from speechllm.runtime import (
    hash_texts,
    pick_device,
    provenance,
    sha256,
    worker_pool,
    write_json,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from speechllm.config.schema import EncoderConfig
    from speechllm.model.encoder import SpeechEncoder

log = logging.getLogger(__name__)

UTTS_PER_SHARD = 256
MAX_WORKERS = 256
THREADS = 1  # of torch in each process: sums depend on their number in the last bits, features may not on what is left
SHARDS_TOGETHER = 8  # that a process with a GPU makes in one go, so that the GPU has its next batch at any time
MARK = "dump.json"
PARTS = ".parts"
PIPED = ".piped"
BEGIN_WAIT_S = 30.0  # for other parts to note what the folder is made from

Part = tuple[int, int]
"""Which part of the shards, counted from 0, and of how many."""


@dataclass(frozen=True)
class Leeway:
    """What a dump may do that it does not by itself."""

    max_dropped: float = 0.0
    """Part of the utterances that may be left out because their sounds cannot be read."""
    allow_pipes: bool = False
    """Whether commands in ``wav.scp`` are run."""


STRICT = Leeway()


@dataclass(frozen=True)
class Shard:
    """A part of the utterances and where its features go."""

    number: int
    utterances: tuple[kaldi.Utterance, ...]
    out: Path
    fingerprint: str
    encoder: EncoderConfig
    device: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Utterances that are left out, each with the reason."""

    @property
    def ark(self) -> Path:
        """Return the archive's path."""
        return self.out / f"feats.{self.number:04d}.ark"

    @property
    def keys(self) -> set[str]:
        """Return the ids of the utterances."""
        return {utt.utt_id for utt in self.utterances}

    @property
    def mark(self) -> Path:
        """Return the file that says that the archive is whole."""
        return self.out / f"feats.{self.number:04d}.json"

    def left_out(self) -> dict[str, str]:
        """Return the utterances that were left out when it was made, each with the reason."""
        return read_mark(self.mark).dropped


def dump(  # noqa: PLR0913 - the last by keyword
    encoder: EncoderConfig,
    device: str,
    data_dir: Path,
    out: Path,
    workers: int,
    part: Part | None = None,
    *,
    leeway: Leeway = STRICT,
) -> int:
    """Write the features of `data_dir` to `out` and return the number of utterances.

    Shards that are whole are kept: those of an interrupted run, and those of a run that was complete. An archive counts
    as whole while its size and time are those of its mark; where they are others, while its SHA-256 is. One in which a
    reader found a fault is made again.

    Of a `part` only every n-th shard is made. Several processes may make theirs in one folder at a time; the run
    without `part` that comes after them makes what is missing and writes the tables.

    An utterance whose sound cannot be read is left out and listed in ``dropped.tsv``; the rest is made.

    Raises:
        DataError: the data are at fault, more is left out than `leeway` says, or `out` was made from other data or with
            another encoder.
    """
    data = kaldi.load(data_dir, piped=out / PIPED if leeway.allow_pipes else None)
    record = _record(encoder, data)
    with _only_writer(out, part):
        if part is None:
            _sweep(out)
        complete = is_made(out / MARK, record)
        shards = _shards(encoder, device, data, out, record)
        mine = shards if part is None else shards[part[0] :: part[1]]
        waiting = _not_whole(mine, workers)
        if waiting or (part is None and not complete):
            _begin(out, record, part)
            complete = False
        log.info("dump utts=%d shards=%d done=%d", len(data), len(mine), len(mine) - len(waiting))
        _write_all(waiting, workers)
        if part is None:
            dropped = tables.tell_dropped(out, shards, len(data), leeway.max_dropped)
            tables.merge(data, out, shards, dropped, new=not complete)
        if part is None and not complete:
            found = hub.resolve(encoder.name, encoder.revision)
            write_json(out / "provenance.json", provenance({"encoder": found.record()}))
            finish(out / MARK)
    return sum(len(shard.keys - shard.left_out().keys()) for shard in mine)


def _record(encoder: EncoderConfig, data: kaldi.DataDir) -> dict[str, object]:
    """Return what decides the features: a dump is reused only where all of it is the same. Transcripts are not part."""
    found = hub.resolve(encoder.name, encoder.revision)
    missing = [utt.wav for utt in data.utterances.values() if not utt.wav.is_file()]
    if missing:
        raise DataError(missing[0], "no such audio file", f"mend {data.path}/wav.scp or rerun stage 1")
    return {
        **identity(encoder, found.fingerprint),
        "encoder": found.name,
        "data": kaldi.audio_hash(data),
        "utts_per_shard": UTTS_PER_SHARD,
    }


@contextlib.contextmanager
def _only_writer(out: Path, part: Part | None) -> Iterator[None]:
    """Hold the lock of a part of the shards, or those of the folder and of every part.

    Raises:
        DataError: another process holds one of them.
    """
    with contextlib.ExitStack() as stack:
        if part is None:
            stack.enter_context(only_writer(out))
            for folder in sorted((out / PARTS).glob("*")):
                stack.enter_context(only_writer(folder))
        else:
            stack.enter_context(only_writer(out / PARTS / f"{part[0] + 1}-of-{part[1]}"))
        yield


def _sweep(out: Path) -> None:
    """Remove what killed runs had begun under temporary names; no other process writes here."""
    for left_over in out.glob(".*.tmp"):
        left_over.unlink()


def _begin(out: Path, record: Mapping[str, object], part: Part | None) -> None:
    """Note what the folder is being made from.

    Raises:
        DataError: parts are to be made, and the folder or another division of it is being written already.
    """
    if part is None:
        begin(out / MARK, record)
        return
    try:
        with FileLock(out / ".lock", timeout=BEGIN_WAIT_S):  # the folder's own, which other parts hold but briefly
            for folder in (out / PARTS).glob("*"):
                if not folder.name.endswith(f"-of-{part[1]}"):
                    with only_writer(folder):
                        pass
            begin(out / MARK, record)
    except Timeout as error:
        raise DataError(out, "another process is writing here", "wait for it to end") from error


def _shards(
    encoder: EncoderConfig, device: str, data: kaldi.DataDir, out: Path, record: Mapping[str, object]
) -> list[Shard]:
    utterances = list(data.utterances.values())
    count = max(1, math.ceil(len(utterances) / UTTS_PER_SHARD))
    fingerprint = hash_texts([json.dumps(record, sort_keys=True)])
    return [Shard(n, tuple(utterances[n::count]), out, fingerprint, encoder, device) for n in range(count)]


def _not_whole(shards: Sequence[Shard], workers: int) -> list[Shard]:
    """Return the shards that are to be made; a bar shows where their archives must be read for that."""
    with ThreadPoolExecutor(workers) as pool:
        checked = pool.map(_is_whole, shards)
        whole = list(tqdm(checked, "checking", len(shards), unit="shard", delay=5, leave=False, disable=None))
    return [shard for shard, is_whole in zip(shards, whole, strict=True) if not is_whole]


def _is_whole(shard: Shard) -> bool:
    """Return whether the archive is the one that was written; its mark is brought up to date where it is."""
    scp = shard.ark.with_suffix(".scp")
    if archive.suspect(shard.ark).exists() or not (shard.mark.exists() and shard.ark.exists() and scp.exists()):
        return False
    try:
        mark = read_mark(shard.mark)
        made = archive.places(scp).keys()
        if mark.fingerprint != shard.fingerprint or not made == mark.frames.keys() == shard.keys - mark.dropped.keys():
            return False
        if mark.seen == _seen(shard.ark) and mark.crc32.keys() == made:
            return True
        if mark.sha256 != sha256(shard.ark):
            return False
        crcs = archive.checksums(shard.ark)
    except DataError:
        return False
    # a copy, or of before there were CRCs
    mark.model_copy(update={"crc32": crcs, "seen": _seen(shard.ark)}).write(shard.mark)
    return True


def _seen(ark: Path) -> dict[str, int]:
    """Return what of a file changes when it is written to, without reading it."""
    status = ark.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _write_all(shards: Sequence[Shard], workers: int) -> None:
    """Make shards, in as many processes as there are, as were asked for, and as the device takes."""
    if not shards:
        return
    on_gpu = pick_device(shards[0].device).type == "cuda"
    workers = max(1, min(workers, len(shards), _gpus(shards[0].device) if on_gpu else MAX_WORKERS))
    together = min(SHARDS_TOGETHER, math.ceil(len(shards) / workers)) if on_gpu else 1
    jobs = [shards[at : at + together] for at in range(0, len(shards), together)]
    total = sum(len(shard.utterances) for shard in shards)
    with (
        worker_pool(workers) as pool,
        tqdm(total=total, desc=f"features {shards[0].out.name}", unit="utt", disable=None) as progress,
    ):
        for done in as_completed([pool.submit(_write_shards, job) for job in jobs]):
            progress.update(done.result())


def _gpus(device: str) -> int:
    """Return how many GPUs a name such as ``cuda``, ``cuda:1`` or ``auto`` means, where it means any."""
    import torch

    return 1 if ":" in device else torch.cuda.device_count()


def _write_shards(shards: Sequence[Shard]) -> int:
    """Make shards, without the utterances whose sounds cannot be read, and return how many they were to hold."""
    try:
        _encode_shards(shards)
    except DataError:
        waiting = [shard for shard in shards if not _is_whole(shard)]
        readable = [_without_faulty(shard) for shard in waiting]
        if readable == waiting or not all(shard.utterances for shard in readable):  # another fault, or nothing is left
            raise
        _encode_shards(readable)
    return sum(len(shard.utterances) for shard in shards)


def _without_faulty(shard: Shard) -> Shard:
    """Return a shard with those of its utterances whose sounds can be read; only what failed is read twice."""
    from speechllm.model.encoder import read_for

    encoder = _encoder_of(shard)
    faults = {}
    for utt in shard.utterances:
        try:
            read_for(encoder, utt)
        except DataError as error:
            faults[utt.utt_id] = str(error)
    kept = tuple(utt for utt in shard.utterances if utt.utt_id not in faults)
    return replace(shard, utterances=kept, dropped={**shard.dropped, **faults})


def _encode_shards(shards: Sequence[Shard]) -> None:
    """Make shards one after another.

    Each is encoded into a temporary archive. While the next one is, that is checked and renamed, and its mark written.
    """
    import torch

    from speechllm.model.stream import BATCH_SECONDS, PADDED_S, like_lengths, stream

    first = shards[0]
    torch.set_num_threads(THREADS)
    device = _own_device(first.device)
    encoder = _encoder_of(first)
    dtype = torch.float16 if first.encoder.stored == "float16" else torch.float32
    seconds, least_s = BATCH_SECONDS[device.type], PADDED_S if first.encoder.pad_to_30s else 0.0
    batches = (batch for shard in shards for batch in like_lengths(shard.utterances, seconds, least_s))
    with ThreadPoolExecutor(1) as finishing, contextlib.closing(stream(encoder, batches, device, dtype)) as frames:
        jobs = []
        for shard in shards:
            own = itertools.islice(frames, len(shard.utterances))
            partial = _temporary(shard) / shard.ark.name
            jobs.append(
                finishing.submit(_finish, shard, partial, archive.write_archive(partial, own, first.encoder.stored))
            )
    for job in jobs:
        job.result()


def _temporary(shard: Shard) -> Path:
    """Return an empty folder for an archive that is not whole yet; those of killed runs go."""
    for left_over in shard.out.glob(f".tmp.{shard.number:04d}.*"):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = shard.out / f".tmp.{shard.number:04d}.{os.getpid()}"
    temporary.mkdir()
    return temporary


def _finish(shard: Shard, partial: Path, frames: Mapping[str, int]) -> None:
    """Put an archive that is whole in its place, and write its mark last."""
    assert frames.keys() == shard.keys
    sums, crcs = sha256(partial), archive.checksums(partial)
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(shard.ark)
    partial.with_suffix(".scp").replace(shard.ark.with_suffix(".scp"))
    Mark(
        fingerprint=shard.fingerprint,
        seen=_seen(shard.ark),
        sha256=sums,
        crc32=crcs,
        frames=dict(frames),
        dropped=dict(shard.dropped),
    ).write(shard.mark)
    archive.suspect(shard.ark).unlink(missing_ok=True)
    shutil.rmtree(partial.parent)


def _own_device(name: str) -> torch.device:
    """Return the device of this process: the processes of a pool take the GPUs in turn."""
    import torch

    device = pick_device(name)
    if device.type != "cuda" or ":" in name:
        return device
    return torch.device("cuda", _turn(multiprocessing.current_process().name) % torch.cuda.device_count())


def _turn(process_name: str) -> int:
    """Return which process of the pool this is: they are called SpawnProcess-1, SpawnProcess-2 and so on."""
    number = process_name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _encoder_of(shard: Shard) -> SpeechEncoder:
    found = hub.resolve(shard.encoder.name, shard.encoder.revision)
    return _encoder(shard.encoder, found, _own_device(shard.device))


@functools.lru_cache(maxsize=1)
def _encoder(config: EncoderConfig, found: hub.Resolved, device: torch.device) -> SpeechEncoder:
    """Return the encoder, which a process loads once for all its shards."""
    from speechllm.model.encoder import load_encoder

    return load_encoder(config, found, device)

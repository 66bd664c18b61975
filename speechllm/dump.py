"""Stage 2: frozen-encoder features of a data directory, in shards that a killed run need not make again."""

from __future__ import annotations

import filecmp
import json
import logging
import math
import os
import shutil
from concurrent.futures import as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from speechllm.data import archive, kaldi
from speechllm.errors import DataError, ModelError
from speechllm.folders import begin, finish, is_made, only_writer
from speechllm.model import hub
from speechllm.model.identity import identity
from speechllm.runtime import (
    atomic_path,
    hash_texts,
    pick_device,
    provenance,
    read_json,
    sha256,
    worker_pool,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from speechllm.config.schema import EncoderConfig

log = logging.getLogger(__name__)

UTTS_PER_SHARD = 256
MAX_WORKERS = 256
BATCH_SECONDS = {"cpu": 12.0, "cuda": 400.0}
COPIED_TABLES = ("text", "utt2spk", "spk2utt", "utt2group", "wav.scp", "segments")
MARK = "dump.json"


@dataclass(frozen=True)
class Shard:
    """A part of the utterances and where its features go."""

    number: int
    utterances: tuple[kaldi.Utterance, ...]
    out: Path
    fingerprint: str
    encoder: EncoderConfig
    device: str
    threads: int

    @property
    def ark(self) -> Path:
        """Return the archive's path."""
        return self.out / f"feats.{self.number:04d}.ark"

    @property
    def mark(self) -> Path:
        """Return the file that says that the archive is whole."""
        return self.out / f"feats.{self.number:04d}.json"


def dump(encoder: EncoderConfig, device: str, data_dir: Path, out: Path, workers: int) -> int:
    """Write the features of `data_dir` to `out` and return the number of utterances.

    Finished shards of an interrupted run are kept. Nothing is done where all is there already.

    Raises:
        DataError: the data are at fault, or `out` was made from other data or with another encoder.
    """
    data = kaldi.load(data_dir)
    record = _record(encoder, data)
    with only_writer(out):
        if is_made(out / MARK, record):
            _copy_tables(data, out)
        else:
            _dump(encoder, device, data, out, record, workers)
    return len(data)


def _record(encoder: EncoderConfig, data: kaldi.DataDir) -> dict[str, object]:
    """Return what decides the features: a dump is reused only where all of it is the same. Transcripts are not part."""
    found = hub.resolve(encoder.name, encoder.revision)
    missing = [utt.wav for utt in data.utterances.values() if not utt.wav.is_file()]
    if missing:
        raise DataError(missing[0], "no such audio file", f"mend {data.path}/wav.scp or rerun stage 1")
    return {
        **identity(encoder, found.fingerprint),
        "encoder": found.name,
        "stored": "float16",
        "data": kaldi.audio_hash(data),
        "utts_per_shard": UTTS_PER_SHARD,
    }


def _dump(
    encoder: EncoderConfig,
    device: str,
    data: kaldi.DataDir,
    out: Path,
    record: dict[str, object],
    workers: int,
) -> None:
    begin(out / MARK, record)
    utterances = list(data.utterances.values())
    count = max(1, math.ceil(len(utterances) / UTTS_PER_SHARD))
    workers = max(1, min(workers, count, _most_workers(device)))
    threads = max(1, (os.cpu_count() or 1) // workers)
    fingerprint = hash_texts([json.dumps(record, sort_keys=True)])
    shards = [Shard(n, tuple(utterances[n::count]), out, fingerprint, encoder, device, threads) for n in range(count)]
    waiting = [shard for shard in shards if not _shard_done(shard)]
    log.info(
        "dump utts=%d shards=%d done=%d workers=%d",
        len(utterances),
        count,
        count - len(waiting),
        workers,
    )
    total = sum(len(shard.utterances) for shard in waiting)
    with (
        worker_pool(workers) as pool,
        tqdm(total=total, desc=f"features {out.name}", unit="utt", disable=None) as progress,
    ):
        for done in as_completed([pool.submit(_write_shard, shard) for shard in waiting]):
            progress.update(done.result())
    _merge(data, out, shards)
    write_json(out / "provenance.json", provenance({"encoder": hub.resolve(encoder.name, encoder.revision).record()}))
    finish(out / MARK)


def _most_workers(device: str) -> int:
    """Return one process a GPU, where there is one: each holds an encoder and a large batch."""
    import torch

    return torch.cuda.device_count() if pick_device(device).type == "cuda" else MAX_WORKERS


def _shard_done(shard: Shard) -> bool:
    if not (shard.mark.exists() and shard.ark.exists() and shard.ark.with_suffix(".scp").exists()):
        return False
    try:
        mark = read_json(shard.mark)
    except ModelError:
        return False
    return mark.get("fingerprint") == shard.fingerprint and mark.get("sha256") == sha256(shard.ark)


def _write_shard(shard: Shard) -> int:
    """Encode one shard into a temporary archive, rename it, and write its mark last."""
    import torch

    from speechllm.model.encoder import load_encoder, read_for

    torch.set_num_threads(shard.threads)
    device = pick_device(shard.device)
    encoder = load_encoder(shard.encoder, hub.resolve(shard.encoder.name, shard.encoder.revision), device)
    for left_over in shard.out.glob(f".tmp.{shard.number:04d}.*"):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = shard.out / f".tmp.{shard.number:04d}.{os.getpid()}"
    temporary.mkdir()
    partial = temporary / shard.ark.name

    def encoded() -> Iterator[tuple[str, NDArray[np.float16]]]:
        for batch in _batches(shard.utterances, BATCH_SECONDS[device.type]):
            waves = [read_for(encoder, utt) for utt in batch]
            for utt, wave, matrix in zip(batch, waves, encoder.encode(waves), strict=True):
                assert len(matrix) == encoder.num_frames(len(wave)), utt.utt_id
                yield utt.utt_id, _half(matrix.numpy(), utt.utt_id)

    frames = archive.write_archive(partial, encoded())
    places = partial.with_suffix(".scp").read_text(encoding="utf-8").replace(f"{temporary}/", "")
    digest = sha256(partial)
    partial.replace(shard.ark)
    write_text(shard.ark.with_suffix(".scp"), places)
    write_json(shard.mark, {"fingerprint": shard.fingerprint, "sha256": digest, "frames": frames})
    shutil.rmtree(temporary)
    return len(shard.utterances)


def _batches(utterances: Sequence[kaldi.Utterance], seconds: float) -> Iterator[list[kaldi.Utterance]]:
    """Yield utterances of like length together, up to so many seconds of sound."""
    batch: list[kaldi.Utterance] = []
    longest_s = 0.0
    for utt in sorted(utterances, key=lambda utt: (utt.duration_s(), utt.utt_id)):
        longest_s = max(longest_s, utt.duration_s())
        if batch and longest_s * (len(batch) + 1) > seconds:
            yield batch
            batch, longest_s = [], utt.duration_s()
        batch.append(utt)
    if batch:
        yield batch


def _half(matrix_eh: NDArray[np.float32], utt_id: str) -> NDArray[np.float16]:
    """Return the features in float16; a value that does not fit is an error, not an infinity."""
    with np.errstate(over="ignore"):
        half = matrix_eh.astype(np.float16)
    if not np.isfinite(half).all():
        raise DataError(utt_id, "has features that float16 cannot hold", "take the utterance out")
    return half


def _merge(data: kaldi.DataDir, out: Path, shards: Sequence[Shard]) -> None:
    places: dict[str, str] = {}
    frames: dict[str, str] = {}
    for shard in shards:
        places |= kaldi.read_table(shard.ark.with_suffix(".scp"))
        counts = read_json(shard.mark)["frames"]
        assert isinstance(counts, dict)
        frames |= {key: str(value) for key, value in counts.items()}
    assert places.keys() == data.utterances.keys()
    _copy_tables(data, out)
    kaldi.write_table(out / "utt2dur", {key: f"{utt.duration_s():.4f}" for key, utt in data.utterances.items()})
    kaldi.write_table(out / "utt2num_frames", frames)
    kaldi.write_table(out / "feats.scp", places)


def _copy_tables(data: kaldi.DataDir, out: Path) -> None:
    """Copy the tables that features do not depend on; a mended transcript reaches a finished dump this way."""
    for name in COPIED_TABLES:
        source, target = data.path / name, out / name
        if source.exists() and not (target.exists() and filecmp.cmp(source, target, shallow=False)):
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)

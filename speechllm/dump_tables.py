"""The tables of a dump: what `dump` writes beside its archives once all of them are there."""

from __future__ import annotations

import contextlib
import filecmp
import logging
import shutil
from typing import TYPE_CHECKING

from speechllm.data import kaldi
from speechllm.dump_mark import read_mark
from speechllm.errors import DataError
from speechllm.runtime import atomic_path, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from speechllm.dump import Shard

log = logging.getLogger(__name__)

COPIED_TABLES = ("text", "utt2spk", "spk2utt", "utt2group", "wav.scp", "segments")
DROPPED = "dropped.tsv"


def tell_dropped(out: Path, shards: Sequence[Shard], count: int, max_dropped: float) -> dict[str, str]:
    """Return the utterances that are left out, which ``dropped.tsv`` lists.

    Raises:
        DataError: they are more than `max_dropped` of `count`.
    """
    dropped = {utt_id: reason for shard in shards for utt_id, reason in shard.left_out().items()}
    if not dropped:
        (out / DROPPED).unlink(missing_ok=True)
        return dropped
    lines = [f"{utt_id}\t{dropped[utt_id]}\n" for utt_id in kaldi.byte_order(dropped)]
    write_text(out / DROPPED, "utt_id\treason\n" + "".join(lines))
    told = f"{len(dropped)} of {count} sounds cannot be read ({DROPPED} lists them), first {lines[0].split(chr(9))[1]}"
    if len(dropped) > max_dropped * count:
        raise DataError(out, told, "raise --max-dropped, or mend the sounds and remove this folder")
    log.warning("%s: left out: %s", out, told.strip())
    return dropped


def merge(data: kaldi.DataDir, out: Path, shards: Sequence[Shard], dropped: Mapping[str, str], *, new: bool) -> None:
    """Write the tables of the folder, those of a folder that was complete only where they are not as they should be."""
    places: dict[str, str] = {}
    frames: dict[str, str] = {}
    crcs: dict[str, str] = {}
    for shard in shards:
        places |= kaldi.read_table(shard.ark.with_suffix(".scp"))
        mark = read_mark(shard.mark)
        frames |= {key: str(count) for key, count in mark.frames.items()}
        crcs |= mark.crc32
    assert places.keys() == data.utterances.keys() - dropped.keys()
    _copy_tables(data, out, dropped)
    if new or not _names(out / "utt2dur", places):
        durations = {key: f"{data.utterances[key].duration_s():.4f}" for key in places}
        kaldi.write_table(out / "utt2dur", durations)
    _put_table(out / "utt2num_frames", frames)
    _put_table(out / "utt2crc", crcs)
    _put_table(out / "feats.scp", places)


def _names(path: Path, utt_ids: Mapping[str, object]) -> bool:
    """Return whether a table is there, and of these utterances."""
    with contextlib.suppress(DataError):
        return kaldi.read_table(path).keys() == utt_ids.keys()
    return False


def _put_table(path: Path, table: Mapping[str, str]) -> None:
    with contextlib.suppress(DataError):
        if kaldi.read_table(path) == table:
            return
    kaldi.write_table(path, table)


def _copy_tables(data: kaldi.DataDir, out: Path, dropped: Mapping[str, str]) -> None:
    """Copy the tables that features do not depend on; a mended transcript reaches a finished dump this way."""
    for name in COPIED_TABLES:
        source, target = data.path / name, out / name
        if source.exists() and dropped:
            _put_table(target, _without(kaldi.read_table(source), dropped, listed=name == "spk2utt"))
        elif source.exists() and not (target.exists() and filecmp.cmp(source, target, shallow=False)):
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)


def _without(table: Mapping[str, str], dropped: Mapping[str, str], *, listed: bool) -> dict[str, str]:
    """Return a table without some utterances; where they are `listed` they are its values, not its keys."""
    if not listed:
        return {key: value for key, value in table.items() if key not in dropped}
    kept = {key: " ".join(utt_id for utt_id in value.split() if utt_id not in dropped) for key, value in table.items()}
    return {key: value for key, value in kept.items() if value}

"""ReazonSpeech, the public stand-in for the private 1,000 h: tar files become Kaldi directories for training and dev.

Corpus: Yin et al. 2023, captions and sound of Japanese television, version 2. Sizes: tiny (8.5 h, 0.6 GB), small
(100 h, 6 GB), medium (1,000 h, 65 GB), large (5,000 h, 330 GB), all (35,000 h, 2.3 TB), each the beginning of the next.
How it is laid out and read stands in shards.py. A tar is fetched, stored as FLAC files in
``data/wav/reazonspeech/NNN`` and deleted; a finished tar is never done again, whichever size it was fetched for.

**What is left out** (`fault_of`). The dataset card recommends no filter, and the corpus was cleaned by its makers
(captions cut into sentences and aligned by CTC). So the filters are those of the recipes for it:

* sounds under 1 s or over 30 s, and texts with more letters than a recogniser at 25 frames a second could emit:
  icefall, egs/reazonspeech/ASR/zipformer/train.py; makers of the corpus began that recipe;
* empty texts: ESPnet's asr.sh, stage 4, and its ReazonSpeech script for OWSM;
* texts of nothing but symbols (♪, ★, …): egs2/reazonspeech/asr1 of ESPnet deletes these from every text, which empties
  such a one.

None of them has a rule on repeated texts or on scripts other than Japanese, so neither have we. kotoba-whisper also
drops what Whisper large-v3 hears differently (over 10 % WER; of 5,000 h 1,253 h stay): that needs another recogniser
and is not done here.

**dev** is every utterance whose hashed id falls in one five-hundredth; the 1,000 with the smallest hashes are used and
the rest of that share is left out. So what is dev in one size is never trained on in another.

**Text.** The profile of the training texts is a choice (``--profile``), `train` by default: widths and blanks become
uniform, punctuation and digits stay, so every scoring profile can still be applied to what the model writes. `raw`
keeps the captions as they are; `default` and `reazon` drop punctuation and spell out numbers, which no later step can
undo.

**Cost.** Checking and storing 1,000 h takes about 40 minutes of one core (measured on one hour). The utterances of a
size are held in memory while its tables are written: 1.4 GB for a million of them (measured), so about 1 GB for
`medium` and 4.5 GB for `large`. `all` would want 31 GB, and its tables pass the 1 GiB a file that speechllm.data.kaldi
reads: it can be fetched, but nothing can be trained from it yet.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import download
import shards
from tqdm import tqdm

from speechllm.data.kaldi import Utterance, byte_order, write_dir
from speechllm.errors import ConfigError, DataError
from speechllm.folders import begin, finish, is_made, only_writer
from speechllm.runtime import derive_seed, sha256, worker_pool, write_text
from speechllm.text.normalize import get_profile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

PREFIX = "reazonspeech-"
NUM_TARS = {"tiny": 1, "small": 12, "medium": 116, "large": 579, "all": 4096}
URL = "https://corpus.reazon-research.org/reazonspeech-v2"
MAX_TABLE_BYTES = 4 << 30
MAX_TAR_BYTES = 4 << 30
TERMS = """\
ReazonSpeech v2 (Reazon Human Interaction Laboratory): free under CDLA-Sharing-1.0, solely for the purposes of article
30-4 of the Japanese Copyright Act (information analysis). Whoever fetches it agrees to that; see
https://huggingface.co/datasets/reazon-research/reazonspeech"""

RULES_VERSION = 1
"""Grows whenever another utterance is left out, or dev becomes another."""
MIN_DURATION_S, MAX_DURATION_S = 1.0, 30.0
HOP_S = 0.01
EMPTY = "empty text"
HELD_OUT_SHARE = 500
MAX_DEV = 1000
SETS = ("train", "dev")
MARK = "prepared.json"


@dataclass(frozen=True)
class Source:
    """Where the corpus comes from: a copy of it in a folder, else the web by way of a folder of downloads."""

    downloads: Path
    copy: Path | None = None

    @property
    def _folder(self) -> Path:
        return self.downloads / "reazonspeech"

    def table(self, size: str) -> Path:
        """Return the path of the table of transcripts."""
        name = f"{size}.tsv"
        if self.copy:
            return self._in_copy("tsv", name)
        if not (self._folder / name).is_file():
            print(TERMS, flush=True)
        return self._fetched("tsv", name, MAX_TABLE_BYTES)

    def tar(self, number: int) -> Path:
        """Return the path of a tar file."""
        name = f"{number:03x}.tar"
        if self.copy:
            return self._in_copy("data", name)
        return self._fetched("data", name, MAX_TAR_BYTES)

    def give_back(self, tar: Path) -> None:
        """Delete a tar that was fetched, now that its sounds are stored."""
        if not self.copy:
            tar.unlink()

    def _in_copy(self, folder: str, name: str) -> Path:
        """Return the path of a file that may lie at the top of the copy too."""
        assert self.copy
        for path in (self.copy / folder / name, self.copy / name):
            if path.is_file():
                return path
        raise DataError(self.copy / folder / name, "no such file", "complete the copy of the corpus")

    def _fetched(self, folder: str, name: str, max_bytes: int) -> Path:
        path = self._folder / name
        if not path.is_file():
            download.fetch(f"{URL}/{folder}/{name}", path, max_bytes)
        return path


def prepare(size: str, out: Path, workers: int, profile: str, source: Source) -> None:
    """Write ``out/reazonspeech_SIZE_train`` and ``out/reazonspeech_SIZE_dev``; a finished pair is left as it is.

    Raises:
        UserError: no such size or profile, `datasets` is missing, or the corpus is at fault or cannot be fetched.
    """
    if size not in NUM_TARS:
        raise ConfigError(f"{PREFIX}{size}", "no such size", f"choose one of {', '.join(NUM_TARS)}")
    if size == "all":
        print("note: the tables of reazonspeech-all will be larger than the other stages read (1 GiB a file)")
    tag = get_profile(profile).tag
    shards.require_library()
    if source.copy and not source.copy.is_dir():
        raise DataError(source.copy, "no such folder", "mend REAZONSPEECH, or unset it to fetch the corpus")
    wavs, train = out / "wav" / "reazonspeech", out / f"reazonspeech_{size}_train"
    with only_writer(wavs):
        table = source.table(size)
        digest = sha256(table)
        record = {"corpus": f"{PREFIX}{size}", "profile": tag, "rules": RULES_VERSION, "table": digest}
        if is_made(train / MARK, record):
            return
        lines = source.downloads / "reazonspeech" / f"{size}-{digest[:16]}"
        shards.split_table(table, lines)
        _store(_shards_of(size, lines, wavs), source, workers)
        begin(train / MARK, record)
        _write_sets(size, out, wavs, get_profile(profile).apply)
        finish(train / MARK)


def _shards_of(size: str, lines: Path, wavs: Path) -> list[shards.Shard]:
    """Return the shards of a size, their tars not yet there."""
    names = [f"{number:03x}" for number in range(NUM_TARS[size])]
    for path in sorted(lines.glob("*.tsv")):
        if path.stem not in names:
            what = f"names sounds of {path.stem}.tar, which is no part of {PREFIX}{size}"
            raise DataError(f"{size}.tsv", what, "take the table of this size")
    for name in names:
        if not (lines / f"{name}.tsv").is_file():
            raise DataError(f"{size}.tsv", f"has no line for {name}.tar", "take the table of this size")
    return [shards.Shard(lines / f"{name}.tsv", wavs / name) for name in names]


def _store(wanted: Sequence[shards.Shard], source: Source, workers: int) -> None:
    """Store the shards that are not stored yet; the next tar is fetched while others are worked on."""
    waiting = [shard for shard in wanted if not shards.is_stored(shard)]
    fetched = ((shard, source.tar(int(shard.folder.name, 16))) for shard in waiting)
    with tqdm(total=len(wanted), initial=len(wanted) - len(waiting), desc="tars", disable=None) as progress:
        for tar in _stored(fetched, min(workers, len(waiting))):
            source.give_back(tar)
            progress.update()


def _stored(fetched: Iterable[tuple[shards.Shard, Path]], workers: int) -> Iterator[Path]:
    """Yield each tar as it is stored, by `workers` processes, or by this one where one is enough."""
    if workers <= 1:
        for shard, tar in fetched:
            shards.store(shard, tar)
            yield tar
        return
    with worker_pool(workers) as pool:
        pending: dict[Future[int], Path] = {}
        for shard, tar in fetched:
            pending[pool.submit(shards.store, shard, tar)] = tar
            if len(pending) > workers:  # one more waits, so that nobody is idle; no heap of tars grows
                yield from _results(wait(pending, return_when=FIRST_COMPLETED).done, pending)
        yield from _results(as_completed(list(pending)), pending)


def _results(futures: Iterable[Future[int]], pending: dict[Future[int], Path]) -> Iterator[Path]:
    for future in futures:
        future.result()
        yield pending.pop(future)


def _write_sets(size: str, out: Path, wavs: Path, normalize: Callable[[str], str]) -> None:
    """Write both data directories and the lists of what was left out, and print the counts."""
    kept: dict[str, list[Utterance]] = {name: [] for name in SETS}
    dropped: dict[str, dict[str, str]] = {name: {} for name in SETS}
    for number in range(NUM_TARS[size]):
        folder = wavs / f"{number:03x}"
        for entry in shards.entries(folder):
            name, text = "dev" if is_held_out(entry.utt_id) else "train", normalize(entry.text)
            if fault := entry.fault or fault_of(entry.text, entry.duration_s) or ("" if text else EMPTY):
                dropped[name][entry.utt_id] = fault
            else:
                utt = Utterance(entry.utt_id, folder / entry.wav, end_s=entry.duration_s, text=text)
                kept[name].append(utt)
    kept["dev"].sort(key=lambda utt: _place(utt.utt_id))
    dropped["dev"] |= {utt.utt_id: f"held out, not of the first {MAX_DEV}" for utt in kept["dev"][MAX_DEV:]}
    del kept["dev"][MAX_DEV:]
    for name in SETS:
        folder = out / f"reazonspeech_{size}_{name}"
        if not kept[name]:
            raise DataError(folder, f"none of the {len(dropped[name])} utterances is left", "take a larger size")
        _write_set(folder, kept[name], dropped[name])


def _write_set(folder: Path, kept: Sequence[Utterance], dropped: dict[str, str]) -> None:
    lines = [f"{utt_id}\t{dropped[utt_id]}\n" for utt_id in byte_order(dropped)]
    write_text(folder / "dropped.tsv", "utt_id\treason\n" + "".join(lines))
    write_dir(folder, kept)
    hours = sum(utt.duration_s() for utt in kept) / 3600
    counts = Counter(reason.partition(" (")[0] for reason in dropped.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    print(f"{folder.name}: {len(kept)} utterances, {hours:.2f} h; left out: {reasons or 'none'}")


def is_held_out(utt_id: str) -> bool:
    """Return whether an utterance is kept from training; by its id alone, so that it is so in every size."""
    return _place(utt_id) % HELD_OUT_SHARE == 0


def _place(utt_id: str) -> int:
    return derive_seed("reazonspeech", utt_id)


def fault_of(text: str, duration_s: float) -> str | None:
    """Return why an utterance is not trained on, or None; the head of this file names the sources.

    >>> fault_of("今日のニュースをお伝えします。", 2.5)
    >>> fault_of("♪～", 2.5)
    'symbols only'
    """
    if not text.strip():
        return EMPTY
    letters = sum(unicodedata.category(letter)[0] in "LN" for letter in text)
    if not letters:
        return "symbols only"
    if duration_s < MIN_DURATION_S:
        return "shorter than 1 s"
    if duration_s > MAX_DURATION_S:
        return "longer than 30 s"
    if letters > _frames_after_subsampling(duration_s):
        return "more letters than frames"
    return None


def _frames_after_subsampling(duration_s: float) -> int:
    """Return how many frames icefall's zipformer has left of a sound: 10 ms each, then two halvings."""
    num_frames = int(duration_s / HOP_S + 0.5)
    return ((num_frames - 7) // 2 + 1) // 2

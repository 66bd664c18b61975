"""The JSUT corpus: fetched where it is not there, its nine subsets, ESPnet's split, basic5000 as a whole.

Layout (https://sites.google.com/site/shinnosuketakamichi/publication/jsut): ``<subset>/transcript_utf8.txt`` with lines
``ID:text`` and ``<subset>/wav/ID.wav`` at 48 kHz. Split, as in ESPnet's egs2/jsut/asr1: of all utterances sorted by id
the first 250 are eval1, the next 250 dev (``local/split/*.txt`` lists both), the rest train. ``jsut_basic5000`` is all
of that subset, what public evaluations use; it holds eval1 and dev and most of train.

No checksum of ``jsut_ver1.1.zip`` is published: none was found on the corpus's page, nor in the recipes and dataset
collections that fetch it. So the first download is checked by the zip file's own CRC-32 sums and by the number of
sounds of each subset (7,696 in all), and its SHA-256 is kept beside it: another file under the same name is refused.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import download

from speechllm.data.kaldi import Utterance, key_fault, lines_of, write_dir
from speechllm.errors import DataError
from speechllm.folders import only_writer

SUBSETS = {
    "basic5000": 5000,
    "countersuffix26": 26,
    "loanword128": 128,
    "onomatopee300": 300,
    "precedent130": 130,
    "repeat500": 500,
    "travel1000": 1000,
    "utparaphrase512": 512,
    "voiceactress100": 100,
}
"""Each with the number of its utterances."""
SPLIT = Path(__file__).parent / "split"
SPEAKER = "jsut"
HELD_OUT = ("eval1", "dev")
WHOLE_SUBSET = "basic5000"

URL = "http://ss-takashi.sakura.ne.jp/corpus/jsut_ver1.1.zip"
FOLDER = "jsut_ver1.1"
MAX_ARCHIVE_BYTES = 4 << 30
LIMITS = download.Limits(files=20_000, file_bytes=64 << 20, total_bytes=8 << 30)
TERMS = """\
JSUT (Sonobe, Takamichi and Saruwatari 2017, arXiv:1711.00354), terms of its README and LICENCE files:
  sounds  free for research at academic institutions, for non-commercial research anywhere and for personal use;
          for commercial use ask the authors; not to be passed on (about a hundred sentences on a page of yours may)
  texts   basic5000 CC-BY-SA 3.0 (Wikipedia), CC-BY 2.0 (Tanaka corpus), CC-BY-SA 4.0 (the authors' own);
          travel1000 CC-BY-SA 3.0; precedent130 free of copyright; the other six CC-BY-SA 4.0"""


def obtain(downloads: Path) -> Path:
    """Return the folder of the unpacked corpus in `downloads`; fetch and check it where it is not there.

    Raises:
        DataError: it cannot be fetched, is not whole, or is another file than was fetched first.
    """
    folder, archive = downloads / FOLDER, downloads / f"{FOLDER}.zip"
    if folder.is_dir():
        return folder
    print(TERMS, flush=True)
    with only_writer(downloads):
        if not archive.is_file():
            download.fetch(URL, archive, MAX_ARCHIVE_BYTES)
        download.require_recorded(archive)
        aside = downloads / f".{FOLDER}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        download.unpack(archive, aside, LIMITS)
        for subset, wanted in SUBSETS.items():
            found = sum(1 for _ in (aside / FOLDER / subset / "wav").glob("*.wav"))
            if found != wanted:
                what = f"holds {found} sounds of {subset}, not {wanted}"
                raise DataError(archive, what, download.FETCH_AGAIN)
        download.record(archive)
        (aside / FOLDER).rename(folder)
        shutil.rmtree(aside)
    return folder


def prepare(folder: Path, out: Path) -> None:
    """Write ``out/jsut_train``, ``out/jsut_dev``, ``out/jsut_eval1`` and ``out/jsut_basic5000``.

    Raises:
        DataError: a subset, a sound or a transcript is missing, or a held-out utterance is not there.
    """
    if not folder.is_dir():
        raise DataError(folder, "no such folder", "unpack JSUT there, or set JSUT to where it is")
    utterances: dict[str, Utterance] = {}
    for subset in SUBSETS:
        for utt in _read_subset(folder / subset):
            if utt.utt_id in utterances:
                what = f"{utt.utt_id} is in {_subset_of(utterances[utt.utt_id])} too"
                raise DataError(folder / subset, what, "unpack the corpus again")
            utterances[utt.utt_id] = utt
    held_out = {name: _ids(SPLIT / f"{name}.txt") for name in HELD_OUT}
    for name, ids in held_out.items():
        if missing := [utt_id for utt_id in ids if utt_id not in utterances]:
            raise DataError(folder, f"lacks {len(missing)} of {name}, first {missing[0]}", "unpack the whole corpus")
    for name, ids in held_out.items():
        _write(out / f"jsut_{name}", [utterances[utt_id] for utt_id in ids])
    taken = {utt_id for ids in held_out.values() for utt_id in ids}
    _write(out / "jsut_train", [utt for utt_id, utt in utterances.items() if utt_id not in taken])
    _write(out / f"jsut_{WHOLE_SUBSET}", [utt for utt in utterances.values() if _subset_of(utt) == WHOLE_SUBSET])


def _write(path: Path, utterances: list[Utterance]) -> None:
    write_dir(path, utterances, {"utt2group": {utt.utt_id: _subset_of(utt) for utt in utterances}})


def _subset_of(utt: Utterance) -> str:
    return utt.wav.parent.parent.name


def _ids(path: Path) -> list[str]:
    return [line.strip() for _, line in lines_of(path)]


def _read_subset(folder: Path) -> list[Utterance]:
    """Return the utterances of one subset: transcripts and sounds, joined by id."""
    transcript = folder / "transcript_utf8.txt"
    texts: dict[str, str] = {}
    for number, line in lines_of(transcript):
        utt_id, colon, text = line.partition(":")
        where = f"{transcript}:{number}"
        if not colon or not text.strip():
            raise DataError(where, "is not `ID:text`", "unpack the corpus again")
        if fault := key_fault(utt_id):
            raise DataError(where, fault, "unpack the corpus again")
        if utt_id in texts:
            raise DataError(where, f"{utt_id} stands here twice", "unpack the corpus again")
        texts[utt_id] = text.strip()
    sounds = {path.stem: path for path in (folder / "wav").glob("*.wav")}
    for utt_id in sorted(texts.keys() - sounds.keys())[:1]:
        raise DataError(transcript, f"{utt_id} has a transcript but no wav/{utt_id}.wav", "unpack the corpus again")
    for utt_id in sorted(sounds.keys() - texts.keys())[:1]:
        raise DataError(sounds[utt_id], "has no transcript", "unpack the corpus again")
    return [Utterance(utt_id, sounds[utt_id], text=text, speaker=SPEAKER) for utt_id, text in texts.items()]

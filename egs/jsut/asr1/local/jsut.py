"""The JSUT corpus, from its unpacked folder: nine subsets, ESPnet's split.

Layout (https://sites.google.com/site/shinnosuketakamichi/publication/jsut): ``<subset>/transcript_utf8.txt`` with lines
``ID:text`` and ``<subset>/wav/ID.wav`` at 48 kHz. Split, as in ESPnet's egs2/jsut/asr1: of all utterances sorted by id
the first 250 are eval1, the next 250 dev (``local/split/*.txt`` lists both), the rest train.
"""

from __future__ import annotations

from pathlib import Path

from speechllm.data.kaldi import Utterance, key_fault, lines_of, write_dir
from speechllm.errors import DataError

SUBSETS = (
    "basic5000",
    "countersuffix26",
    "loanword128",
    "onomatopee300",
    "precedent130",
    "repeat500",
    "travel1000",
    "utparaphrase512",
    "voiceactress100",
)
SPLIT = Path(__file__).parent / "split"
SPEAKER = "jsut"
HELD_OUT = ("eval1", "dev")


def prepare(folder: Path, out: Path) -> None:
    """Write ``out/jsut_train``, ``out/jsut_dev`` and ``out/jsut_eval1``.

    Raises:
        DataError: a subset, a sound or a transcript is missing, or a held-out utterance is not there.
    """
    if not folder.is_dir():
        raise DataError(folder, "no such folder", "unpack JSUT there, or set JSUT to where it is")
    utterances: dict[str, Utterance] = {}
    for subset in SUBSETS:
        for utt in _read_subset(folder / subset):
            if utt.utt_id in utterances:
                what = f"{utt.utt_id} is in {utterances[utt.utt_id].wav.parent.parent.name} too"
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


def _write(path: Path, utterances: list[Utterance]) -> None:
    groups = {utt.utt_id: utt.wav.parent.parent.name for utt in utterances}
    write_dir(path, utterances, {"utt2group": groups})


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

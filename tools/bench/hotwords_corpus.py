"""Speech with rare names, made from the mini corpus' templates and voices, for measuring hotwords.

``rare_names.tsv`` beside this file lists names that the mini corpus does not hold: the set (dev, eval, or other for
names that are on the list and never spoken), the kind, the surface, and the reading. What is synthesised is the
sentence with the reading in the place of the name, so that the sound is that of the list.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from speechllm.data.kaldi import Utterance, load, write_dir
from speechllm.runtime import derive_seed, hash_texts

if TYPE_CHECKING:
    from speechllm.data.kaldi import DataDir

TOP = Path(__file__).resolve().parents[2]
RECIPE = TOP / "egs/jsut/asr1"
NAMES = Path(__file__).with_name("rare_names.tsv")
SLOTS = {"name": "name", "place": "place", "goods": "goods"}
PER_NAME = 2
SEED = 61

sys.path.append(str(RECIPE / "local"))

import mini  # noqa: E402
import sentences  # noqa: E402
import synth  # noqa: E402


@dataclass(frozen=True)
class Name:
    """A rare name: where it is spoken, what it is, how it is written and read."""

    part: str
    kind: str
    surface: str
    reading: str


def names() -> list[Name]:
    """Return the rare names of the list."""
    lines = NAMES.read_text(encoding="utf-8").splitlines()[1:]
    return [Name(*line.split("\t")) for line in lines]


def sentences_with(part: str) -> list[tuple[Name, str]]:
    """Return for each name of a set its sentences, the name written as {rare}; always the same ones."""
    domain = sentences.load_domain(mini.CORPUS / "domain.yaml")
    drawn = []
    for name in [one for one in names() if one.part == part]:
        slot = f"{{{SLOTS[name.kind]}}}"
        templates = tuple(t.replace(slot, "{rare}") for t in domain.templates if t.count(slot) == 1)
        filled = sentences.Domain(domain.path, {**domain.slots, "rare": ("〓",)}, templates)
        seed = derive_seed(SEED, name.surface)
        drawn += [(name, text) for text in sentences.sample(filled, PER_NAME, seed, (), 0.0)]
    return drawn


def prepare(part: str, out: Path, workers: int) -> DataDir:
    """Return the data directory ``out/names_<part>``, speaking what is not there yet.

    Half of the voices are those of training; the others have never been heard by the model.
    """
    unheard = mini.KOKORO_DEV if part == "dev" else mini.KOKORO_EVAL
    heard = mini.open_jtalk_voices()
    jobs, utterances = [], []
    for number, (name, sentence) in enumerate(sentences_with(part)):
        # the two sentences of a name are said by one voice of each kind
        voice = unheard[number // 2 % len(unheard)] if number % 2 else heard[number * 7 % len(heard)]
        spoken = sentence.replace("〓", name.reading)
        utt_id = f"{voice.speaker}-names_{part}-{number:04d}"
        path = out / "wav" / f"names_{part}" / f"{utt_id}.{hash_texts([spoken, repr(voice)])}.wav"
        jobs.append(synth.Job(spoken, voice, path))
        text = sentence.replace("〓", name.surface)
        utterances.append(Utterance(utt_id, path, text=text, speaker=voice.speaker))
    for _ in tqdm(synth.synthesize(jobs, workers), total=len(jobs), desc="speech", unit="utt", disable=None):
        pass
    folder = out / f"names_{part}"
    write_dir(folder, utterances, {})
    return load(folder)


def spoken_names(part: str) -> dict[str, str]:
    """Return sentence -> the rare name that it holds."""
    return {text.replace("〓", name.surface): name.surface for name, text in sentences_with(part)}

"""The mini corpora: which sentences, which voices, and the Kaldi directories they become."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import TYPE_CHECKING

import sentences
import synth
from tqdm import tqdm

from speechllm.data.kaldi import Utterance, write_dir
from speechllm.folders import only_writer
from speechllm.runtime import derive_seed, hash_texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CORPUS = Path(__file__).parent / "corpus"
SEED = 20
MIN_DISTANCE = 0.2
HEARD, UNHEARD = "heard", "unheard"

KOKORO_TRAIN = (synth.KokoroVoice("jf_alpha"), synth.KokoroVoice("jm_kumo", 1.1))
KOKORO_DEV = (synth.KokoroVoice("jf_tebukuro"),)
KOKORO_EVAL = (synth.KokoroVoice("jf_gongitsune"), synth.KokoroVoice("jf_nezumi"))


def open_jtalk_voices() -> tuple[synth.Voice, ...]:
    """Return 40 variants of mei_normal: a low voice gets a longer vocal tract, a high one a shorter."""
    variants = []
    for half_tone in range(-8, 8, 2):
        for index, speed in enumerate((0.85, 0.95, 1.05, 1.15, 1.3)):
            alpha = round(0.55 - 0.004 * half_tone + 0.01 * (index - 2), 2)
            variants.append(synth.OpenJTalkVoice(half_tone, speed, alpha))
    return tuple(variants)


@dataclasses.dataclass(frozen=True)
class Part:
    """So many utterances of a set, spoken by these voices in turn."""

    count: int
    voices: tuple[synth.Voice, ...]
    group: str = HEARD


@dataclasses.dataclass(frozen=True)
class Planned:
    """One utterance to be: its id, its sentence and voice, its group."""

    utt_id: str
    job: synth.Job
    group: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A mini corpus: the parts of each of its sets."""

    name: str
    parts: Mapping[str, tuple[Part, ...]]


def mini() -> Corpus:
    """Return the bounded domain: about two hours of speech."""
    voices = open_jtalk_voices()
    return Corpus(
        "mini",
        {
            "train": (Part(1640, voices), Part(60, KOKORO_TRAIN)),
            "dev": (Part(70, voices), Part(30, KOKORO_DEV, UNHEARD)),
            "eval": (Part(50, voices), Part(50, KOKORO_EVAL, UNHEARD)),
        },
    )


def mini_open() -> Corpus:
    """Return the open sentences: each of the training ones in four voices."""
    voices = open_jtalk_voices()
    return Corpus(
        "mini_open",
        {
            "train": (Part(4400, voices), Part(120, KOKORO_TRAIN)),
            "dev": (Part(70, voices), Part(50, KOKORO_DEV, UNHEARD)),
            "eval": (Part(60, voices), Part(60, KOKORO_EVAL, UNHEARD)),
        },
    )


def debug() -> Corpus:
    """Return a handful of sentences for the tests."""
    voices = open_jtalk_voices()[:2]
    return Corpus("debug", {"train": (Part(8, voices),)})


def texts_of(corpus: Corpus) -> dict[str, list[str]]:
    """Return the sentences of each set, as many as it has utterances (open ones come round again)."""
    sizes = {name: sum(part.count for part in parts) for name, parts in corpus.parts.items()}
    if corpus.name != "mini_open":
        domain = sentences.load_domain(CORPUS / "domain.yaml")
        return sentences.split_domain(domain, sizes, SEED, MIN_DISTANCE)
    files = {
        "train": ("open_train_a.txt", "open_train_b.txt"),
        "dev": ("open_dev.txt",),
        "eval": ("open_eval.txt",),
    }
    return {
        name: _repeat([line for file in files[name] for line in sentences.read_sentences(CORPUS / file)], size)
        for name, size in sizes.items()
    }


def _repeat(lines: Sequence[str], count: int) -> list[str]:
    """Return `count` lines, in a fixed random order that is another in every round."""
    drawn: list[str] = []
    while len(drawn) < count:
        shuffled = list(lines)
        random.Random(derive_seed(SEED, len(drawn))).shuffle(shuffled)  # noqa: S311 - no secret
        drawn += shuffled
    return drawn[:count]


def prepare(corpus: Corpus, out: Path, workers: int) -> None:
    """Write ``out/<corpus>_<set>``, synthesising what is not there yet."""
    texts = texts_of(corpus)
    plans = {name: _plan(f"{corpus.name}_{name}", parts, texts[name], out) for name, parts in corpus.parts.items()}
    jobs = [planned.job for plan in plans.values() for planned in plan]
    there = sum(job.path.exists() for job in jobs)
    with only_writer(out / "wav"):
        done = synth.synthesize(jobs, workers)
        for _ in tqdm(done, total=len(jobs), initial=there, desc="speech", unit="utt", disable=None):
            pass
    for name, plan in plans.items():
        utterances = [
            Utterance(planned.utt_id, planned.job.path, text=planned.job.text, speaker=planned.job.voice.speaker)
            for planned in plan
        ]
        groups = {planned.utt_id: planned.group for planned in plan}
        write_dir(out / f"{corpus.name}_{name}", utterances, {"utt2group": groups})


def _plan(name: str, parts: Sequence[Part], texts: Sequence[str], out: Path) -> list[Planned]:
    """Return every utterance of a set; ids begin with the speaker."""
    plan: list[Planned] = []
    number = 0
    for part in parts:
        for index in range(part.count):
            voice = part.voices[index % len(part.voices)]
            utt_id = f"{voice.speaker}-{name}-{number:04d}"
            # the name holds what was said and how: another sentence under the same id is another sound
            content = hash_texts([texts[number], repr(voice)])
            path = out / "wav" / name / f"{utt_id}.{content}.wav"
            plan.append(Planned(utt_id, synth.Job(texts[number], voice, path), part.group))
            number += 1
    return plan


CORPORA = {"mini": mini, "mini_open": mini_open, "debug": debug}

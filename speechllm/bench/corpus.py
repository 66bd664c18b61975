"""Utterances that were never spoken: lengths of a Japanese corpus, random characters, random frames and sounds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from speechllm.data import archive, audio, kaldi
from speechllm.runtime import derive_seed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

CHARACTERS = (5, 17, 18, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 29, 31, 34, 38, 43, 50, 60, 97)
"""Characters of a transcript of JSUT basic5000, punctuation counted: every twentieth of its 5,000, shortest first."""
MEAN_CHARACTERS = 29.36
MEAN_DURATION_S = 4.68
"""Of JSUT: ten hours, 7,696 utterances (Sonobe 2017, sec. 1 and 2)."""
PACE = (0.85, 1.15)
"""Slowest and fastest utterance, as a part of the mean duration of its text."""
FRAME_RATE_HZ = 50
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
FIRST_KANJI = 0x4E00


@dataclass(frozen=True)
class Utterance:
    """What is made up: so many seconds of sound, and a text."""

    utt_id: str
    duration_s: float
    text: str

    @property
    def num_frames(self) -> int:
        """Return its encoder frames."""
        return max(1, round(self.duration_s * FRAME_RATE_HZ))


def draw(count: int, kanji: str, seed: int) -> list[Utterance]:
    """Return utterances whose lengths are spread as evenly over the corpus as their number allows, in random order."""
    rng = np.random.default_rng(derive_seed("bench", seed))
    places = (np.arange(count) + rng.uniform(size=count)) / count
    lengths = np.interp(places, np.linspace(0, 1, len(CHARACTERS)), CHARACTERS).round().astype(int)
    rng.shuffle(lengths)
    second = MEAN_DURATION_S / MEAN_CHARACTERS
    return [
        Utterance(
            f"made-{number:05d}",
            round(float(length * second * rng.uniform(*PACE)), 3),
            "".join(rng.choice(list(kanji), size=length)),
        )
        for number, length in enumerate(lengths)
    ]


def kanji_of(vocab_size: int, spelled: str) -> str:
    """Return the characters that a vocabulary holds beside the special tokens and those of `spelled`."""
    others = set(spelled)
    room = vocab_size - len(SPECIALS) - len(others)
    spare = (chr(FIRST_KANJI + number) for number in range(vocab_size) if chr(FIRST_KANJI + number) not in others)
    return "".join(itertools.islice(spare, room))


def tokenizer(vocab_size: int, spelled: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with a token for every character of `spelled` and of `kanji_of`."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = (*SPECIALS, *sorted(set(spelled)), *kanji_of(vocab_size, spelled))
    assert len(pieces) == vocab_size
    fast = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token=SPECIALS[3]))
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=fast, **names)


def write_features(folder: Path, utterances: Sequence[Utterance], width_h: int) -> Path:
    """Write random frames [e h] as stage 2 leaves them, and return their folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(derive_seed("bench frames"))
    matrices = ((one.utt_id, rng.standard_normal((one.num_frames, width_h)).astype(np.float16)) for one in utterances)
    archive.write_archive(folder / "feats.0000.ark", matrices)
    places = (folder / "feats.0000.scp").read_text(encoding="utf-8").replace(f"{folder}/", "")
    (folder / "feats.scp").write_text(places, encoding="utf-8")
    kaldi.write_table(folder / "text", {one.utt_id: one.text for one in utterances})
    kaldi.write_table(folder / "utt2num_frames", {one.utt_id: str(one.num_frames) for one in utterances})
    kaldi.write_table(folder / "utt2dur", {one.utt_id: f"{one.duration_s:.3f}" for one in utterances})
    return folder


def write_sounds(folder: Path, utterances: Sequence[Utterance]) -> Path:
    """Write a data directory of noise that swells and fades, and return it."""
    sounds = folder / "wav"
    sounds.mkdir(parents=True)
    rng = np.random.default_rng(derive_seed("bench sounds"))
    listed = []
    for one in utterances:
        samples = round(one.duration_s * audio.SAMPLE_RATE_HZ)
        swell = 0.1 + 0.08 * np.sin(2 * np.pi * 3 * np.arange(samples) / audio.SAMPLE_RATE_HZ)
        wave_s = (rng.standard_normal(samples) * swell).clip(-1, 1).astype(np.float32)
        audio.write_wav(sounds / f"{one.utt_id}.wav", wave_s, audio.SAMPLE_RATE_HZ)
        listed.append(kaldi.Utterance(one.utt_id, sounds / f"{one.utt_id}.wav", text=one.text, speaker="made"))
    kaldi.write_dir(folder / "data", listed)
    return folder / "data"

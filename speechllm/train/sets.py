"""What is trained on: stored features, or sounds that the encoder reads anew in every step."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.data import audio, kaldi
from speechllm.data.archive import as_stored
from speechllm.data.batch import like_lengths
from speechllm.data.dataset import Example, FeatureSet
from speechllm.errors import ConfigError, DataError
from speechllm.model import hub
from speechllm.model.encoder import length_fault, load_encoder, read_for
from speechllm.model.identity import check_dump
from speechllm.runtime import hash_texts, pick_device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from speechllm.config.schema import Config
    from speechllm.data.archive import Stored
    from speechllm.model.encoder import SpeechEncoder


class WaveSet:
    """The examples of a data directory, in byte order of their ids; their frames are made when asked for."""

    def __init__(self, folder: Path, encoder: SpeechEncoder, stored: Stored) -> None:
        """Read the tables and the headers of the sounds; `stored` is how a dump would hold their frames.

        Raises:
            DataError: a table or a sound is at fault, or a sound is too short or too long for the encoder.
        """
        self.folder, self.encoder, self.stored = folder, encoder, stored
        self.encoding = threading.Lock()
        self.data = kaldi.load(folder)
        texts = self.data.texts()
        self.examples = {key: self._example(utt, texts[key]) for key, utt in self.data.utterances.items()}

    def _example(self, utt: kaldi.Utterance, text: str) -> Example:
        duration_s = utt.duration_s()
        num_samples = round(duration_s * audio.SAMPLE_RATE_HZ)
        if fault := length_fault(num_samples, self.encoder.longest_s, self.encoder.min_samples):
            raise DataError(f"{utt.wav} (utterance {utt.utt_id})", fault, "cut it with segments or take it out")
        return Example(utt.utt_id, self.encoder.num_frames(num_samples), text, duration_s)

    def waves(self, utt_ids: Sequence[str]) -> list[NDArray[np.float32]]:
        """Return the samples [s] of utterances."""
        return [read_for(self.encoder, self.data.utterances[utt_id]) for utt_id in utt_ids]

    def frames_of(self, utt_ids: Sequence[str]) -> list[NDArray[np.float32]]:
        """Return the frames [e h] of utterances, rounded as a store would have them."""
        return self.encoded(self.waves(utt_ids))

    def encoded(self, waves_s: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Return the frames [e h] of sounds, rounded as a store would have them; one thread at a time."""
        made: dict[int, NDArray[np.float32]] = {}
        with self.encoding:
            for group in like_lengths([len(wave_s) for wave_s in waves_s]):
                frames = self.encoder.encode([waves_s[index] for index in group])
                stored = (as_stored(one.numpy(), self.stored) for one in frames)
                made |= dict(zip(group, stored, strict=True))
        return [made[index] for index in range(len(waves_s))]


AnySet = FeatureSet | WaveSet


@dataclass(frozen=True)
class Opened:
    """Training and validation examples and what they were made from."""

    train: AnySet
    valid: AnySet
    train_data: str
    """Identity of the training sounds and transcripts."""
    valid_data: str
    encoder_fingerprint: str
    width_h: int
    encoder: SpeechEncoder | None
    """The encoder where it reads in every step; None where its features are stored."""


def open_sets(config: Config, train_dir: Path, valid_dir: Path) -> Opened:
    """Return the examples of two dumps, or of two data directories.

    Raises:
        UserError: data, dumps or encoder are at fault, or do not belong together.
    """
    stored = [(folder / "feats.scp").is_file() for folder in (train_dir, valid_dir)]
    if any(stored) and config.encoder.train:
        folder = train_dir if stored[0] else valid_dir
        raise ConfigError(folder, "holds stored features, but encoder.train is set", "name the data directory itself")
    if any(stored) and config.train.augment.changes_sounds:
        what = "holds stored features, but train.augment changes sounds"
        raise ConfigError(train_dir, what, "name the data directories themselves")
    if stored[0] != stored[1]:
        raise ConfigError(valid_dir, f"is not of one kind with {train_dir}", "give two dumps or two data directories")
    return _open_dumps(config, train_dir, valid_dir) if stored[0] else _open_sounds(config, train_dir, valid_dir)


def _open_dumps(config: Config, train_dir: Path, valid_dir: Path) -> Opened:
    train, valid = FeatureSet(train_dir), FeatureSet(valid_dir)
    dumped = check_dump(train_dir, config.encoder)
    fingerprint = str(dumped["encoder_fingerprint"])
    valid_dumped = check_dump(valid_dir, config.encoder, fingerprint)
    width_h = train.store.width_h
    if valid.store.width_h != width_h:
        what = f"holds features of {valid.store.width_h} channels, {train_dir} of {width_h}"
        raise ConfigError(valid_dir, what, "run stage 2 again")
    identities = _identity(train, dumped["data"]), _identity(valid, valid_dumped["data"])
    return Opened(train, valid, *identities, fingerprint, width_h, None)


def _open_sounds(config: Config, train_dir: Path, valid_dir: Path) -> Opened:
    found = hub.resolve(config.encoder.name, config.encoder.revision)
    encoder = load_encoder(config.encoder, found, pick_device(config.device))
    train, valid = (WaveSet(folder, encoder, config.encoder.stored) for folder in (train_dir, valid_dir))
    identities = _identity(train, kaldi.audio_hash(train.data)), _identity(valid, kaldi.audio_hash(valid.data))
    return Opened(train, valid, *identities, found.fingerprint, encoder.width, encoder)


def _identity(examples: AnySet, data: object) -> str:
    return hash_texts([str(data), *(f"{e.utt_id} {e.text}" for e in examples.examples.values())])

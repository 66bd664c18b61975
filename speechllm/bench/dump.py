"""Stage 2: our dump against a plain Hugging Face loop, an utterance at a time, on the same sounds and weights.

Both leave float16. Our dump works in processes of its own, whose start takes seconds: nothing in a thousand hours, and
much here. So what it gives to them runs in this one, and encoders are loaded in a first round, which is not timed.
"""

from __future__ import annotations

import functools
import logging
import tempfile
import warnings
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

import numpy as np

from speechllm import dump as stage2
from speechllm.bench import corpus, encoders
from speechllm.bench.common import Options, Outcome, Seconds, Unequal, machine, median, timed
from speechllm.config.schema import EncoderConfig
from speechllm.data import kaldi
from speechllm.data.audio import SAMPLE_RATE_HZ
from speechllm.data.dataset import FeatureSet
from speechllm.errors import ConfigError
from speechllm.lengths import whisper_encoder_frames, whisper_mel_frames
from speechllm.runtime import pick_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from speechllm.bench.encoders import Size

log = logging.getLogger(__name__)

SEED = 2
STEP = 2.0**-10
"""Distance of neighbouring float16 values, as a part of the value."""
TOLERANCE = 2.0
"""Largest difference of two values, in steps at the value, or at the mean size of values where that is larger."""
PEER = "hf_loop"
T = TypeVar("T")


@dataclass(frozen=True)
class Maker:
    """One thing that makes features."""

    name: str
    make: Callable[[Path, Path], object]
    """Writes the features of a data directory (first) to a new folder (second)."""


def run(options: Options) -> Outcome:
    """Return what was found; see the top of this module.

    Raises:
        ConfigError: there is no such size, or budgets were given.
        Unequal: the two wrote different features.
    """
    if options.tokens:
        raise ConfigError("bench", "dump has no --tokens", "leave it out")
    name = options.size or "small"
    size = encoders.size_named(name)
    if options.quick:
        size = replace(size, num_utts=size.quick_utts, whisper_utts=size.quick_whisper_utts, rounds=1)
    with tempfile.TemporaryDirectory(prefix="speechllm-bench-") as folder, _threads_kept():
        found = compare(size, pick_device("auto"), Path(folder))
    return replace(found, settings={"size": name, **found.settings})


def compare(size: Size, device: torch.device, folder: Path) -> Outcome:
    """Return equality and times of WavLM, and of Whisper where it is padded to 30 s as in its training, and not."""
    wavlm = encoders.save_wavlm(size.wavlm, folder / "wavlm", size.conv)
    whisper = encoders.save_whisper(size.whisper, folder / "whisper")
    found = _Found(device, size.rounds)
    found.add([_ours("ours", wavlm), _plain(PEER, wavlm)], size.num_utts, folder / "for_wavlm")
    makers = [
        _ours("whisper", whisper, pad_to_30s=True),
        _plain(f"whisper_{PEER}", whisper),
        _ours("whisper_true_length", whisper),
    ]
    found.add(makers, size.whisper_utts, folder / "for_whisper")
    clock = "wall" if device.type == "cuda" else "cpu"
    medians = {name: median(rounds, clock) for name, rounds in found.seconds.items()}
    return Outcome(
        name="dump",
        settings=_settings(size),
        differences=found.differences,
        ratios={
            "vs_hf_loop": medians[PEER] / medians["ours"],
            "whisper_vs_hf_loop": medians[f"whisper_{PEER}"] / medians["whisper"],
            "whisper_true_length_vs_hf_loop": medians[f"whisper_{PEER}"] / medians["whisper_true_length"],
        },
        counters=found.counters,
        seconds=found.seconds,
        clock=clock,
        machine=machine(device),
    )


def _settings(size: Size) -> dict[str, object]:
    return {
        "utterances": size.num_utts,
        "whisper_utterances": size.whisper_utts,
        "wavlm": f"{size.wavlm['num_hidden_layers']} x {size.wavlm['hidden_size']}",
        "whisper": f"{size.whisper['encoder_layers']} x {size.whisper['d_model']}",
        "rounds": size.rounds,
    }


class _Found:
    """What the makers of one encoder after another gave."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.differences: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, list[Seconds]] = {}
        self.counters: dict[str, dict[str, float]] = {}

    def add(self, makers: Sequence[Maker], num_utts: int, folder: Path) -> None:
        """Run all makers in turn, round by round; the first two must write the same, which a first round shows."""
        utterances = corpus.draw(num_utts, "あ", SEED)
        sound_s = sum(utterance.duration_s for utterance in utterances)
        data = corpus.write_sounds(folder / "sounds", utterances)
        for one in makers:
            one.make(data, folder / one.name)
        worst = check_equal(*(folder / one.name for one in makers[:2]))
        self.differences[makers[0].name] = {"features_in_float16_steps": worst}
        for number in range(self.rounds):
            for one in makers:
                took = timed(functools.partial(one.make, data, folder / f"{one.name}-{number}"), self.device)
                self.seconds.setdefault(one.name, []).append(took)
                log.info("round=%d maker=%s cpu=%.2f s wall=%.2f s", number + 1, one.name, took.cpu, took.wall)
        for one in makers:
            self.counters[one.name] = {
                "utterances": num_utts,
                "sound_s": round(sound_s, 1),
                "times_real_time": round(sound_s / median(self.seconds[one.name], "wall"), 2),
            }


def check_equal(ours: Path, plain: Path) -> float:
    """Return the largest difference of two folders of features, in float16's steps.

    Raises:
        Unequal: it is larger than rounding makes it, or the frames differ in number.
    """
    features = FeatureSet(ours)
    worst = 0.0
    for utt_id in features.examples:
        found_eh, wanted_eh = features.frames(utt_id), np.load(plain / f"{utt_id}.npy").astype(np.float32)
        if found_eh.shape != wanted_eh.shape:
            raise Unequal(f"dump: {utt_id} has frames {found_eh.shape}, {PEER} made {wanted_eh.shape}")
        scale_eh = np.maximum(np.abs(wanted_eh), np.sqrt(np.mean(wanted_eh**2)))
        difference = float((np.abs(found_eh - wanted_eh) / scale_eh).max()) / STEP
        # not (x <= tolerance): a NaN is unequal too
        if not difference <= TOLERANCE:
            raise Unequal(f"dump: {utt_id} is off by {difference:.1f} steps of float16 from what {PEER} made")
        worst = max(worst, difference)
    return worst


def _ours(name: str, encoder: Path, *, pad_to_30s: bool = False) -> Maker:
    config = EncoderConfig(name=str(encoder), pad_to_30s=pad_to_30s)

    def make(data: Path, out: Path) -> int:
        with patch.object(stage2, "worker_pool", ThisProcess):
            return stage2.dump(config, "auto", data, out, 1)

    return Maker(name, make)


class ThisProcess(Executor):
    """Stands in for a pool of processes."""

    def __init__(self, _workers: int, initializer: Callable[..., None] | None = None, *arguments: Any) -> None:
        """Prepare this process as each of them would be."""
        if initializer is not None:
            initializer(*arguments)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Do the work at once."""
        done: Future[T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def _plain(name: str, encoder: Path) -> Maker:
    return Maker(name, lambda data, out: hf_loop(encoder, data, out))


def hf_loop(encoder_folder: Path, data: Path, out: Path) -> int:
    """Write the features of each utterance as a file of its own; return how many.

    What transformers' documentation of these models shows: feature extractor, model, next. Whisper's extractor pads to
    30 s; what is behind the end of the sound is cut off.
    """
    import torch

    torch.set_num_threads(stage2.THREADS)
    extractor, model = _loaded(encoder_folder)
    is_whisper = model.config.model_type == "whisper"
    encoder: Any = model.get_encoder() if is_whisper else model
    out.mkdir(parents=True)
    utterances = kaldi.load(data).utterances
    for utt_id, utterance in utterances.items():
        wave_s = utterance.read()
        inputs = extractor(wave_s, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").to(model.device)
        with torch.inference_mode(), warnings.catch_warnings():
            # transformers' WavLM hands torch a boolean and a float mask together; torch converts one and warns
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask", category=UserWarning)
            hidden_eh = encoder(**inputs).last_hidden_state[0]
        if is_whisper:
            hidden_eh = hidden_eh[: whisper_encoder_frames(whisper_mel_frames(len(wave_s)))]
        np.save(out / f"{utt_id}.npy", hidden_eh.half().cpu().numpy())
    return len(utterances)


@functools.lru_cache(maxsize=1)
def _loaded(encoder_folder: Path) -> tuple[Any, Any]:
    """Return feature extractor and model, which our dump too loads once a process."""
    from transformers import AutoFeatureExtractor, AutoModel

    model = AutoModel.from_pretrained(encoder_folder).eval().to(pick_device("auto"))
    return AutoFeatureExtractor.from_pretrained(encoder_folder), model


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Leave the number of threads as it was found: both sides set it."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)

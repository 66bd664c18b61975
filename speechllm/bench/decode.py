"""Decoding: ours against transformers' `generate`, an utterance at a time and in batches.

All decode the same utterances greedily with one and the same model, from frames to tokens, its adapter merged for all.
A random model ends its texts at random, so the lengths are drawn from a Japanese corpus: each text goes on to the
length of its transcript and ends there, in every system (for `generate`, by a stopping criterion for each row). First
the tokens are compared, one by one; then the systems take turns, round by round.
Shapes: b batch, l LM sequence.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from speechllm.bench import corpus, models
from speechllm.bench.common import Options, Outcome, Seconds, Unequal, machine, median, one_thread, timed
from speechllm.config.schema import DecodeConfig
from speechllm.decode.batched import Utterances
from speechllm.decode.engine import Engine, Spent
from speechllm.model.lm import merge_lora
from speechllm.model.speechllm import pad_frames
from speechllm.runtime import computes_bfloat16, derive_seed, pick_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from speechllm.bench.models import Size
    from speechllm.model.speechllm import SpeechLlm

log = logging.getLogger(__name__)

SEED = 2
NEVER = -1  # a token that no model writes: texts end by their length
BATCH = 32
ROUNDS = 2
UTTERANCES = {"tiny": 24, "small": 64, "7b": 1024}
QUICK_UTTERANCES = {"tiny": 24, "small": 24, "7b": 256}
AT_ONCE = {"tiny": (1, 8), "small": (1, 8, BATCH), "7b": (1, 16, 64, 256)}
GENERATE_AT_ONCE = {"tiny": 8, "small": BATCH, "7b": 64}

Texts = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Set:
    """What is decoded."""

    model: SpeechLlm
    utterances: Sequence[corpus.Utterance]
    device: torch.device
    width_h: int

    def frames(self, key: str) -> Tensor:
        """Return the random frames [e h] of an utterance."""
        number = next(number for number, one in enumerate(self.utterances) if one.utt_id == key)
        rng = np.random.default_rng(derive_seed("bench decode", number))
        drawn = rng.standard_normal((self.utterances[number].num_frames, self.width_h), dtype=np.float32)
        return torch.from_numpy(drawn).to(self.model.lm.model.dtype)

    @property
    def sound_s(self) -> float:
        """Return the seconds of sound."""
        return sum(one.duration_s for one in self.utterances)

    @property
    def needed(self) -> int:
        """Return the tokens of all texts."""
        return sum(len(one.text) for one in self.utterances)


class System(Protocol):
    """A way of decoding."""

    spent: Spent

    @property
    def name(self) -> str:
        """Return what it is called in the tables."""
        ...

    def decode(self, data: Set) -> Texts:
        """Return the tokens of every utterance."""
        ...


class Lengths(Utterances):
    """Utterances whose texts are as long as their transcripts."""

    characters: dict[str, int]

    def limit(self, key: str) -> int:
        """Return the length of a transcript."""
        return self.characters[key]


@dataclass
class Ours:
    """Our decoder with so many utterances at a time."""

    at_once: int
    spent: Spent = field(default_factory=Spent)

    @property
    def name(self) -> str:
        """Return what it is called in the tables."""
        return f"ours {self.at_once}"

    def decode(self, data: Set) -> Texts:
        """Return the tokens of every utterance."""
        config = DecodeConfig(batch_size=self.at_once, mend_loops=False)

        def fetch(keys: Sequence[str]) -> tuple[Tensor, list[int]]:
            return pad_frames([data.frames(key) for key in keys], data.device)

        feed = Lengths(data.model, {one.utt_id: one.duration_s for one in data.utterances}, fetch, config)
        feed.characters = {one.utt_id: len(one.text) for one in data.utterances}
        with torch.inference_mode():
            engine = Engine(data.model.lm, data.model.question_start(), config)
        engine.end = NEVER
        found = {one.key: one.nbest[0].tokens for one in engine.run(feed)}
        self.spent = engine.spent
        return found


@dataclass
class Generate:
    """`generate` of transformers on batches of so many utterances, padded on the left, as others decode."""

    at_once: int
    by_length: bool = False
    """Whether utterances of like length share a batch; most tools take them as they come."""
    spent: Spent = field(default_factory=Spent)

    @property
    def name(self) -> str:
        """Return what it is called in the tables."""
        return f"generate {self.at_once}" + (" sorted" if self.by_length else "")

    @torch.inference_mode()
    def decode(self, data: Set) -> Texts:
        """Return the tokens of every utterance."""
        ordered = list(data.utterances)
        if self.by_length:
            ordered.sort(key=lambda one: one.duration_s)
        found: Texts = {}
        self.spent = Spent()
        for start in range(0, len(ordered), self.at_once):
            found |= self._batch(data, ordered[start : start + self.at_once])
        return found

    def _batch(self, data: Set, batch: Sequence[corpus.Utterance]) -> Texts:
        from transformers import StoppingCriteriaList

        frames_beh, frames_b = pad_frames([data.frames(one.utt_id) for one in batch], data.device)
        spliced = data.model.splice(frames_beh, frames_b, None, pad_left=True)
        limits_b = torch.tensor([len(one.text) for one in batch], device=data.device)
        lm: Any = data.model.lm.model
        made_bl = lm.generate(
            inputs_embeds=spliced.embeds_bld,
            attention_mask=spliced.mask_bl.long(),
            max_new_tokens=int(limits_b.max()),
            stopping_criteria=StoppingCriteriaList([_AtLength(limits_b)]),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        self.spent.forwards += made_bl.shape[1]
        self.spent.rows += made_bl.numel()
        self.spent.positions += spliced.mask_bl.numel() + made_bl.numel() - len(batch)
        self.spent.needed += int(limits_b.sum())
        return {one.utt_id: tuple(row[: len(one.text)]) for one, row in zip(batch, made_bl.tolist(), strict=True)}


class _AtLength:
    """Ends each row of a batch at its own length."""

    def __init__(self, limits_b: Tensor) -> None:
        self.limits_b = limits_b

    def __call__(self, ids_bl: Tensor, _scores: object, **_others: object) -> Tensor:
        return self.limits_b <= ids_bl.shape[1]


def run(options: Options) -> Outcome:
    """Return what was found; see the top of this module.

    Raises:
        ConfigError: there is no such size.
        Unequal: a system gave other tokens than `generate` on one utterance at a time.
    """
    name = options.size or "small"
    size = models.size_named(name)
    device = pick_device("auto")
    dtype = "bfloat16" if device.type == "cuda" and computes_bfloat16(device) else "float32"
    count = (QUICK_UTTERANCES if options.quick else UTTERANCES)[name]
    with one_thread(device):
        data = prepare(size, device, dtype, count)
        at_once, batch = options.tokens or AT_ONCE[name], GENERATE_AT_ONCE[name]
        peers: list[System] = [Generate(1), Generate(batch), Generate(batch, by_length=True)]
        rounds = 1 if options.quick else min(ROUNDS, size.rounds)
        found = compare(data, [*(Ours(rows) for rows in at_once), *peers], rounds, dtype)
    return replace(found, settings={"size": name, "dtype": dtype, **found.settings})


def prepare(size: Size, device: torch.device, dtype: str, count: int) -> Set:
    """Return a random model and utterances that were never spoken."""
    made = models.make(size, models.config_of(size, device, dtype), device)
    merge_lora(made.model.lm)
    lm: Any = made.model.lm.model
    lm.generation_config.eos_token_id = None
    kanji = corpus.kanji_of(len(made.model.lm.tokenizer), models.SPELLED)
    projector: Any = made.model.projector
    projector.to(lm.dtype)
    return Set(made.model.eval(), corpus.draw(count, kanji, SEED), device, size.width_h)


def compare(data: Set, systems: Sequence[System], rounds: int, dtype: str) -> Outcome:
    """Return equality, counts and times of all systems; the last three are `generate`."""
    log.info("bench decode: one pass of each to compare the texts and to count")
    texts = {system.name: system.decode(data) for system in systems}
    alone, batched, by_length = (system.name for system in systems[-3:])
    differences = {name: {"texts": float(_different(found, texts[alone]))} for name, found in texts.items()}
    for name, one in differences.items():
        if dtype == "float32" and one["texts"]:
            raise Unequal(f"decode: {name} gave {one['texts']:.0f} other texts than {alone}")
    seconds: dict[str, list[Seconds]] = {system.name: [] for system in systems}
    for number in range(rounds):
        for system in systems:
            seconds[system.name].append(timed(lambda system=system: system.decode(data), data.device))  # type: ignore[misc]
            last = seconds[system.name][-1]
            log.info("round=%d system=%s cpu=%.2f s wall=%.2f s", number + 1, system.name, last.cpu, last.wall)
    clock = "wall" if data.device.type == "cuda" else "cpu"
    took = {name: median(all_of, clock) for name, all_of in seconds.items()}
    fastest = min((name for name in took if name.startswith("ours")), key=took.__getitem__)
    return Outcome(
        name="decode",
        settings={"utterances": len(data.utterances), "sound_s": round(data.sound_s, 1), "rounds": rounds},
        differences=differences,
        ratios={
            "vs_per_utterance": took[alone] / took[fastest],
            "vs_batched_generate": took[batched] / took[fastest],
            "vs_sorted_generate": took[by_length] / took[fastest],
        },
        counters={system.name: _counters(system, data, took[system.name]) for system in systems},
        seconds=seconds,
        clock=clock,
        machine=machine(data.device),
    )


def _different(found: Texts, wanted: Texts) -> int:
    return sum(found[key] != wanted[key] for key in wanted)


def _counters(system: System, data: Set, took_s: float) -> dict[str, float]:
    spent = system.spent
    return {
        "forwards": spent.forwards,
        "row steps": spent.rows,
        "over needed": round(spent.rows / data.needed, 4),
        "positions": spent.positions,
        "x real time": round(data.sound_s / took_s, 2),
    }

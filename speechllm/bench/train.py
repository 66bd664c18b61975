"""Training: ours against a padded loop like SLAM-LLM's, transformers' Trainer, and our own padded batches.

All train one and the same model on the same utterances for one pass. First, without any update, their summed losses and
summed gradients over the whole set are compared, in units that do not depend on how a system averages: nats, and nats
over the parameter, each batch's mean times its number of answer tokens. Then they take turns, a pass each, round by
round, with their optimizers. A pass of ours has the loop's records, one validation and one saved state in it.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from speechllm.bench import corpus, models
from speechllm.bench.closer import closer_look
from speechllm.bench.common import Options, Outcome, Seconds, Unequal, machine, median, one_thread, timed
from speechllm.bench.count import Pass, System, one_pass
from speechllm.bench.ours import Ours
from speechllm.bench.peers import HfTrainer, Items, SlamStyle
from speechllm.data.dataset import FeatureSet
from speechllm.runtime import computes_bfloat16, pick_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from speechllm.bench.models import Made, Size
    from speechllm.config.schema import Config

log = logging.getLogger(__name__)

TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (1e-3, 1e-1)}
"""Largest relative difference of the loss, and of one parameter's gradient in its norm. Of 32 layers in bfloat16, 0.05
were seen for the second between any two systems."""
SEED = 1


@dataclass(frozen=True)
class Bench:
    """What is compared, and on what."""

    size: Size
    config: Config
    device: torch.device
    utterances: Sequence[corpus.Utterance]
    made: Made
    sets: tuple[FeatureSet, FeatureSet]

    @property
    def hours(self) -> float:
        """Return the hours of sound of a pass."""
        return sum(one.duration_s for one in self.utterances) / 3600

    @property
    def utterance_positions(self) -> int:
        """Return the positions that the utterances have one by one, each with its prompt, the last token left out."""
        model = self.made.model
        return sum(model.expected_positions(one.num_frames, one.text) for one in self.utterances)

    def ours(self, name: str, *, packing: bool, batch_tokens: int) -> Ours:
        """Return our own training with these batches."""
        train = self.config.train.model_copy(update={"packing": packing, "batch_tokens": batch_tokens})
        return Ours(name, self.made, self.config.model_copy(update={"train": train}), self.sets)


def run(options: Options) -> Outcome:
    """Return what was found; see the top of this module.

    Raises:
        ConfigError: there is no such size, or accelerate is not installed.
        Unequal: a system gave another loss or other gradients than the reference.
    """
    name = options.size or "small"
    size = models.size_named(name)
    if options.quick:
        size = replace(size, num_utts=min(size.num_utts, size.quick_utts), rounds=1)
    device = pick_device("auto")
    dtype = "bfloat16" if device.type == "cuda" and computes_bfloat16(device) else "float32"
    with tempfile.TemporaryDirectory(prefix="speechllm-bench-") as folder, one_thread(device):
        bench = prepare(size, models.config_of(size, device, dtype), Path(folder))
        found = compare(bench, options.tokens or size.closer, Path(folder))
    return replace(found, settings={"size": name, **found.settings})


def prepare(size: Size, config: Config, folder: Path, utterances: Sequence[corpus.Utterance] | None = None) -> Bench:
    """Return what is needed to compare; features are written below `folder`. Without `utterances` they are drawn."""
    device = pick_device(config.device)
    made = models.make(size, config, device)
    if utterances is None:
        kanji = corpus.kanji_of(len(made.model.lm.tokenizer), models.SPELLED)
        utterances = corpus.draw(size.num_utts, kanji, SEED)
    train = FeatureSet(corpus.write_features(folder / "train", utterances, size.width_h))
    valid = FeatureSet(corpus.write_features(folder / "valid", utterances[:1], size.width_h))
    return Bench(size, config, device, utterances, made, (train, valid))


def systems_of(bench: Bench) -> list[System]:
    """Return what is compared: ours first."""
    items = Items(bench.sets[0], bench.made, SEED)
    budget = bench.size.batch_tokens
    return [
        bench.ours("ours", packing=True, batch_tokens=budget),
        SlamStyle(bench.made, bench.config, items),
        HfTrainer(bench.made, bench.config, items),
        bench.ours("padded", packing=False, batch_tokens=budget),
    ]


def compare(bench: Bench, closer: Sequence[int], folder: Path) -> Outcome:
    """Return equality, counts and times of all systems."""
    systems = systems_of(bench)
    log.info("bench train: one pass of each to compare results and to count")
    passes = {system.name: one_pass(system) for system in systems}
    differences = check_equal(passes, "hf_trainer", TOLERANCE[bench.config.lm.dtype])
    seconds = time_rounds(systems, bench, folder)
    clock = "wall" if bench.device.type == "cuda" else "cpu"
    ours = median(seconds["ours"], clock)
    return Outcome(
        name="train",
        settings=_settings(bench),
        differences=differences,
        ratios={f"vs_{name}": median(rounds, clock) / ours for name, rounds in seconds.items() if name != "ours"},
        counters={name: one.counts.shown(bench.utterance_positions) for name, one in passes.items()},
        seconds=seconds,
        clock=clock,
        machine=machine(bench.device),
        closer=[
            closer_look(bench.ours(f"ours {budget}", packing=True, batch_tokens=budget), bench, folder)
            for budget in closer
        ],
    )


def _settings(bench: Bench) -> dict[str, object]:
    lm = bench.made.plain_lm.config
    return {
        "utterances": len(bench.utterances),
        "sound_s": round(bench.hours * 3600, 1),
        "utterance_positions": bench.utterance_positions,
        "width": lm.hidden_size,
        "layers": lm.num_hidden_layers,
        "vocabulary": lm.vocab_size,
        "dtype": bench.config.lm.dtype,
        "batch_tokens": bench.size.batch_tokens,
        "rounds": bench.size.rounds,
    }


def check_equal(passes: dict[str, Pass], reference: str, tolerance: tuple[float, float]) -> dict[str, dict[str, float]]:
    """Return the relative differences of losses and gradients from those of `reference`.

    Raises:
        Unequal: a loss or a gradient is off by more than its tolerance.
    """
    wanted = passes[reference]
    found: dict[str, dict[str, float]] = {}
    for name, one in passes.items():
        if name == reference:
            continue
        loss = abs(one.nll - wanted.nll) / abs(wanted.nll)
        gradients = {
            key: float((one.gradients[key] - value).norm() / value.norm()) for key, value in wanted.gradients.items()
        }
        worst = max(gradients, key=gradients.__getitem__)
        found[name] = {"loss": loss, "gradients": gradients[worst]}
        # not (x <= tolerance): a NaN is unequal too
        if not loss <= tolerance[0]:
            raise Unequal(f"train: {name} has a loss of {one.nll:.6g} nats, {reference} {wanted.nll:.6g}")
        if not gradients[worst] <= tolerance[1]:
            raise Unequal(f"train: the gradient of {worst} in {name} is off by {gradients[worst]:.1e} of {reference}'s")
    return found


def time_rounds(systems: Sequence[System], bench: Bench, folder: Path) -> dict[str, list[Seconds]]:
    """Return what a pass of each system took, round by round; all take their turn in every round."""
    import torch.utils.tensorboard  # noqa: F401 - its import is not training

    seconds: dict[str, list[Seconds]] = {system.name: [] for system in systems}
    for number in range(bench.size.rounds):
        for system in systems:
            work = system.prepare(folder)
            seconds[system.name].append(timed(work, bench.device))
            last = seconds[system.name][-1]
            log.info("round=%d system=%s cpu=%.2f s wall=%.2f s", number + 1, system.name, last.cpu, last.wall)
    return seconds

"""Our own training as users run it: the real loop, a real task, features as stage 2 leaves them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speechllm.train.tasks import Features, SpeechTask
from speechllm.train.trainer import Loop, LoopOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from speechllm.bench.models import Made
    from speechllm.config.schema import Config
    from speechllm.data.dataset import FeatureSet

NEVER = 10**9  # steps


class Ours:
    """One way of ours to make batches; the model is shared by all of them."""

    def __init__(self, name: str, made: Made, config: Config, sets: tuple[FeatureSet, FeatureSet]) -> None:
        """`config` says how batches are made; the second of `sets` is for the loop's one validation."""
        self.name, self.lm = name, made.model.lm.model
        device: torch.device = made.model.lm.model.device
        features = Features(config, *sets, device)
        self.task = SpeechTask(features, made.model, _no_texts, lambda _references, _texts: 0.0)
        self.runs = 0

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained."""
        return {name: value for group in self.task.groups() for name, value in group.named.items()}

    def batches(self) -> Iterator[Sequence[str]]:
        """Return the utterance ids of each batch of a pass."""
        return iter(self.task.batches(0))

    def loss(self, utt_ids: Sequence[str]) -> Tensor:
        """Return the summed loss of a batch."""
        return self.task.loss(self.task.prepare(utt_ids, 0)).nll

    def prepare(self, folder: Path) -> Callable[[], object]:
        """Return what trains for one pass in a new folder, records, validation and saved state included."""
        self.runs += 1
        train = self.task.config.train
        options = LoopOptions(
            epochs=1,
            accumulate=1,
            warmup=train.warmup,
            weight_decay=train.weight_decay,
            clip_norm=train.clip_norm,
            validate_every=NEVER,
            save_every=NEVER,
        )
        return Loop(self.task, options, folder / f"{self.name}-{self.runs}").run


def _no_texts(utt_ids: Sequence[str]) -> dict[str, str]:
    """Return an empty text for each utterance: decoding is not what is timed."""
    return dict.fromkeys(utt_ids, "")

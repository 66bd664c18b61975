"""What the training loop asks of the thing that is trained, and what it hears back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from speechllm.train.optim import Group

P = TypeVar("P")
"""A batch made ready."""


@dataclass(frozen=True)
class Outcome:
    """What a batch cost: the loss is on the device, all else is known to the host."""

    nll: Tensor
    """Summed loss, in nats."""
    tokens: int
    """What it is summed over."""
    audio_s: float = 0.0
    positions: int = 0
    """Positions that the model computed."""
    padded: int = 0
    """How many of them were padding."""


class Sample(NamedTuple):
    """What was heard of one utterance of the validation set."""

    utt_id: str
    ref: str
    hyp: str


@dataclass(frozen=True)
class Validation:
    """Results on the validation set."""

    scores: Mapping[str, float]
    """By name; ``score`` is the one to make small."""
    samples: Sequence[Sample] = ()


class Task(Protocol[P]):
    """What is trained; the loop knows nothing else of it."""

    name: str
    seed: int

    def groups(self) -> Sequence[Group]:
        """Return the trainable parameters and their learning rates."""
        ...

    def batches(self, epoch: int) -> list[list[str]]:
        """Return the utterance ids of each batch of an epoch, a pure function of it."""
        ...

    def prepare(self, utt_ids: Sequence[str], epoch: int) -> P:
        """Return a batch read and augmented; called from several threads, ahead of its turn."""
        ...

    def loss(self, ready: P) -> Outcome:
        """Return the loss of a batch; the host does not wait for the device."""
        ...

    def validate(self) -> Validation:
        """Return results on the validation set; it changes nothing, and may be broken off by an exception."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what training changes, by name."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill what training changes."""
        ...

"""Several processes that train one model: each has all of it, and only gradients of what is trained travel.

A step's batches are shared out; gradients of summed losses are added up and divided by the tokens of all, so a step
is that of one process with the same batches, whatever each of them got.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    T = TypeVar("T")

GONE = ("by peer", "remote worker", "remote process exited")
PATIENCE = timedelta(hours=4)  # the others wait while the first validates


@dataclass(frozen=True)
class World:
    """The processes of a run and which of them this is."""

    rank: int = 0
    size: int = 1
    lockstep: bool = False
    """Whether a forward is a thing of all processes: each must run as many, in the same order (see `sharded`)."""

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files and validates."""
        return self.rank == 0

    def share(self, batches: Sequence[object]) -> list[tuple[int, float]]:
        """Return the numbers of the batches of a step that fall to this process, and a weight for the loss of each.

        In lockstep each process gets as many: where there are too few, it computes the first once more, with weight 0.
        """
        mine = [(number, 1.0) for number in range(self.rank, len(batches), self.size)]
        if self.lockstep and len(mine) < -(-len(batches) // self.size):
            mine.append((0, 0.0))
        return mine

    def add_up(self, values: Tensor) -> Tensor:
        """Return the sums of `values` over all processes; the host does not wait."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, value: T) -> T:
        """Return the first process's `value`."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=_device())
        return box[0]

    def wait(self) -> None:
        """Return once every process is here."""
        if self.size > 1:
            float(self.add_up(torch.zeros(1, device=_device())))


ALONE = World()


class Gradients:
    """The gradients of parameters, added up over all processes."""

    def __init__(self, world: World, parameters: Sequence[nn.Parameter]) -> None:
        """Say whose; every process has the same parameters in the same order."""
        self.world, self.parameters = world, list(parameters)
        self._used: list[nn.Parameter] | None = None

    def add_up(self) -> None:
        """Put the sum over all processes in the place of each gradient; what none of them has stays without.

        Which parameters have one is asked at the first call alone: it is the model's nature.
        """
        if self.world.size == 1:
            return
        if self._used is None:
            present = [float(parameter.grad is not None) for parameter in self.parameters]
            counts = self.world.add_up(torch.tensor(present, device=_device())).tolist()
            self._used = [parameter for parameter, count in zip(self.parameters, counts, strict=True) if count]
        for parameter in self._used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in self._used if parameter.grad is not None])
        self.world.add_up(flat)
        for parameter, part in zip(self._used, torch.split(flat, [one.numel() for one in self._used]), strict=True):
            parameter.grad = part.view_as(parameter)


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def join() -> World:
    """Return the world that a launcher put this process into, by RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    rank = int(os.environ["RANK"])
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        backend = "nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=PATIENCE)
    return World(rank, size)


def is_bereft(error: RuntimeError) -> bool:
    """Return whether an error comes of another process that is gone; gloo and NCCL have no exception of their own."""
    return any(one in str(error) for one in GONE)


def leave() -> None:
    """Say goodbye to the others."""
    if dist.is_initialized():
        dist.destroy_process_group()

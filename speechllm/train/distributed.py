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

    from torch import nn

    T = TypeVar("T")

PATIENCE = timedelta(hours=4)  # the others wait while the first validates


@dataclass(frozen=True)
class World:
    """The processes of a run and which of them this is."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files and validates."""
        return self.rank == 0

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """Return what of `things` falls to this process."""
        return things[self.rank :: self.size]

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums of `values` over all processes."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(sums)
        return [float(value) for value in sums]

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the sum over all processes in the place of each gradient; what none of them has stays without."""
        if self.size == 1:
            return
        present = self.total([float(parameter.grad is not None) for parameter in parameters])
        given = [parameter for parameter, count in zip(parameters, present, strict=True) if count]
        for parameter in given:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in given if parameter.grad is not None])
        dist.all_reduce(flat)
        parts = torch.split(flat, [parameter.numel() for parameter in given])
        for parameter, part in zip(given, parts, strict=True):
            parameter.grad = part.view_as(parameter)

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
            self.total([0.0])


ALONE = World()


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


def leave() -> None:
    """Say goodbye to the others."""
    if dist.is_initialized():
        dist.destroy_process_group()

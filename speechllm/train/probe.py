"""Tries the largest batch before the first step: a run that will not fit says so at once, and what would."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import torch

from speechllm.errors import ConfigError, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from speechllm.train.distributed import World
    from speechllm.train.tasks import SpeechTask

log = logging.getLogger(__name__)

ADVISED = 0.9
"""Part of what fits that is advised: what is free lies in pieces, and batches read ahead take some too."""


def check_memory(task: SpeechTask, world: World) -> None:
    """Return if the largest batch of the first epoch goes through forward and backward pass.

    In lockstep no smaller one is tried: the others would wait for a forward that broke off.

    Raises:
        ConfigError: it does not; the message says which budget does.
    """
    batch = max(task.batches(0), key=task.positions)
    if _fits(task, batch):
        return
    fitting = 0 if world.lockstep else _most_that_fit(task, batch)
    what = (
        f"is {task.config.train.batch_tokens}, and a batch of {task.positions(batch)} positions does not fit the memory"
    )
    advised = batch[: max(1, int(ADVISED * fitting))] if fitting else ()
    fix = f"set it to {task.positions(advised)}, which does" if advised else "lower it"
    raise ConfigError("train.batch_tokens", what, f"{fix}, or train.checkpointing to true, or take a larger card")


def _most_that_fit(task: SpeechTask, batch: Sequence[str]) -> int:
    """Return how many utterances of a batch fit that does not fit whole, by bisection."""
    fitting, too_many = 0, len(batch)
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if _fits(task, batch[:middle]):
            fitting = middle
        else:
            too_many = middle
    return fitting


def _fits(task: SpeechTask, batch: Sequence[str]) -> bool:
    parameters = [parameter for group in task.groups() for parameter in group.named.values()]
    try:
        moments = [torch.empty_like(parameter) for parameter in parameters for _ in range(2)]
        task.loss(task.prepare(batch, 0)).nll.backward()  # type: ignore[no-untyped-call]
        del moments
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        log.info("memory: %d positions do not fit", task.positions(batch))
        return False
    finally:
        for parameter in parameters:
            parameter.grad = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True

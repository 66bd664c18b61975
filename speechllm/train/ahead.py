"""Batches made ready by threads while the model computes, in the order of the steps."""

from __future__ import annotations

import contextlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

from speechllm.train.task import P

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from speechllm.train.distributed import World
    from speechllm.train.task import Task

THREADS = 2
STEPS_AHEAD = 2


@dataclass(frozen=True)
class Step(Generic[P]):
    """The batches of one step, and those of them that fall to this process."""

    batches: Sequence[Sequence[str]]
    mine: Sequence[tuple[int, Future[P], float]]
    """Number of the batch in the step, the batch itself, and what its loss is multiplied by."""


@contextlib.contextmanager
def making_ready(
    task: Task[P], steps: Iterable[tuple[int, Sequence[Sequence[str]]]], world: World
) -> Iterator[Iterator[Step[P]]]:
    """Yield the steps, given as (epoch, batches), each when it is due, its batches being made ready before."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix=f"{task.name}-batches")

    def begun(epoch: int, batches: Sequence[Sequence[str]]) -> Step[P]:
        share = world.share(batches)
        mine = [(index, pool.submit(task.prepare, batches[index], epoch), weight) for index, weight in share]
        return Step(batches, mine)

    def in_turn() -> Iterator[Step[P]]:
        waiting: deque[Step[P]] = deque()
        for epoch, batches in steps:
            waiting.append(begun(epoch, batches))
            if len(waiting) > STEPS_AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    try:
        yield in_turn()
    finally:
        pool.shutdown(cancel_futures=True)

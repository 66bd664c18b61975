"""One model, many requests: their segments wait in one line, take turns, and go to the model in batches."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from speechllm.decode.hotwords import Hotwords
    from speechllm.decode.longform import Recognizer
    from speechllm.decode.result import Recognized

LOG = logging.getLogger(__name__)


class Dropped(Exception):  # noqa: N818 - nobody's fault: the client left, or the time was over
    """The request is not wanted any more."""


@dataclass(frozen=True)
class _Item:
    wave_s: NDArray[np.float32]
    hotwords: Hotwords | None
    found: Future[Recognized] = field(default_factory=Future)


class Batches:
    """The line of segments and the one thread that works it off."""

    def __init__(self, recognizer: Recognizer, max_batch: int) -> None:
        """Start the thread."""
        self.longest_s, self.joined_s = recognizer.longest_s, recognizer.joined_s
        self._recognizer, self._max_batch = recognizer, max_batch
        self._changed = threading.Condition()
        # the requests in the order of their turns; each has at least one segment
        self._waiting: dict[Ticket, deque[_Item]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="recognize", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return the number of segments that wait."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def put(self, ticket: Ticket, items: Sequence[_Item]) -> None:
        """Add segments of a request to the line."""
        with self._changed:
            if self._closed or ticket.is_dropped:
                raise Dropped
            self._waiting.setdefault(ticket, deque()).extend(items)
            self._changed.notify()

    def drop(self, ticket: Ticket) -> None:
        """Take a request's segments out of the line."""
        with self._changed:
            self._waiting.pop(ticket, None)

    def close(self) -> None:
        """Drop everything and end the thread after the batch that it works on."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._changed.notify()
        for ticket in waiting:
            ticket.drop()

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the thread."""
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while batch := self._next():
            self._recognize(batch)

    def _next(self) -> list[_Item]:
        """Wait for segments; return a batch of them, or none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return [] if self._closed else self._take()

    def _take(self) -> list[_Item]:
        """Return segments of one list of hotwords, one from each request in turn, until the batch is full."""
        batch: list[_Item] = []
        hotwords = next(iter(self._waiting.values()))[0].hotwords
        while len(batch) < self._max_batch:
            turn = [ticket for ticket, items in self._waiting.items() if items[0].hotwords == hotwords]
            for ticket in turn[: self._max_batch - len(batch)]:
                items = self._waiting.pop(ticket)
                batch.append(items.popleft())
                if items:
                    self._waiting[ticket] = items  # at the end of the order: the others are next
            if not turn:
                break
        return batch

    def _recognize(self, batch: list[_Item]) -> None:
        """Work on a batch; where it fails, on each segment alone, so that one cannot spoil the others."""
        try:
            texts = self._recognizer.recognize([item.wave_s for item in batch], hotwords=batch[0].hotwords)
            assert len(texts) == len(batch)
        except Exception as error:  # the thread lives on, whatever a model raises
            if len(batch) > 1:
                for item in batch:
                    self._recognize([item])
                return
            LOG.exception("event=segment_failed")
            if batch[0].found.set_running_or_notify_cancel():
                batch[0].found.set_exception(error)
            return
        for item, text in zip(batch, texts, strict=True):
            if item.found.set_running_or_notify_cancel():  # False: dropped while the model was at work
                item.found.set_result(text)


class Ticket:
    """One request's way to the model; it is a recogniser itself, and fails once it is dropped."""

    def __init__(self, batches: Batches) -> None:
        """Begin with no segment in the line."""
        self._batches = batches
        self.longest_s, self.joined_s = batches.longest_s, batches.joined_s
        self._dropped = threading.Event()
        self._open: list[_Item] = []

    @property
    def is_dropped(self) -> bool:
        """Return whether the request is not wanted any more."""
        return self._dropped.is_set()

    def drop(self) -> None:
        """Take its segments out of the line; whoever waits for them is told so."""
        self._dropped.set()
        self._batches.drop(self)
        for item in list(self._open):
            item.found.cancel()

    def recognize(
        self,
        waves_s: Sequence[NDArray[np.float32]],
        *,
        hotwords: Hotwords | None = None,
        beam: int | None = None,
        words: bool = True,
    ) -> list[Recognized]:
        """Return the text of each wave [s] at 16 kHz, after waiting for its turn.

        Raises:
            Dropped: the request was dropped.
        """
        assert beam is None
        assert words
        self._open = [_Item(wave, hotwords) for wave in waves_s]
        self._batches.put(self, self._open)
        try:
            return [item.found.result() for item in self._open]
        except CancelledError as error:
            raise Dropped from error
        finally:
            self._open = []

    def __enter__(self) -> Self:
        """Return the ticket."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what is left of it."""
        self.drop()

"""One request from its form to its segments: options, decoding, and the walk through the recording."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechllm.decode.result import Segment, Transcript
from speechllm.errors import DataError
from speechllm.serve.answers import FORMATS
from speechllm.serve.connections import lack_of_files
from speechllm.serve.decoding import Unpacker
from speechllm.serve.limits import STOP_S, ApiError, Limits, Places, Rates, busy
from speechllm.serve.queue import Batches, Dropped, Ticket
from speechllm.serve.scratch import Scratch, remove

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from speechllm.decode.hotwords import Hotwords
    from speechllm.decode.longform import Recognizer
    from speechllm.serve.uploads import Form

    Walk = Callable[[Ticket, Path, Hotwords | None], Iterator[Segment]]
    """Goes through a recording of any length and yields its segments as they are found."""

LOG = logging.getLogger(__name__)
ANY_MODEL = "whisper-1"  # many clients have OpenAI's name built in
GRANULARITIES = ("word", "segment")
MAX_PROMPT_WORDS = 200


def longform_walk(ticket: Ticket, path: Path, hotwords: Hotwords | None) -> Iterator[Segment]:
    """Yield the segments of a recording as ``speechllm transcribe`` finds them, until the ticket is dropped."""
    from speechllm.data import streaming
    from speechllm.decode import longform

    def blocks() -> Iterator[NDArray[np.float32]]:
        for block in streaming.blocks(path):
            if ticket.is_dropped:
                raise Dropped
            yield block

    yield from longform.transcribe_stream(ticket, blocks(), longform.LongOptions(hotwords=hotwords))


@dataclass(frozen=True)
class Options:
    """What a request asked for."""

    response_format: str
    words: bool
    segments: bool
    stream: bool
    hotwords: Hotwords | None

    @classmethod
    def of(cls, form: Form, model: str, language: str) -> Options:
        """Return the options in a form.

        Raises:
            ApiError: 400, a field is out of its range, or there is no file; 404, another model.
        """
        if not form.has_file or not form.file_bytes:
            raise ApiError(400, "The form has no file, or an empty one.", param="file", code="missing_file")
        _choose(form, "language", ("", language))
        if form.one("model", ANY_MODEL) not in (model, ANY_MODEL):
            raise ApiError(404, f"This server has the model '{model}'.", param="model", code="model_not_found")
        _check_temperature(form)
        granularities = form.fields.get("timestamp_granularities[]", ["segment"])
        for wanted in granularities:
            if wanted not in GRANULARITIES:
                raise _wrong("timestamp_granularities[]", GRANULARITIES)
        return cls(
            _choose(form, "response_format", ("json", *FORMATS)),
            "word" in granularities,
            "segment" in granularities,
            _choose(form, "stream", ("false", "true")) == "true",
            _hotwords(form.one("prompt")),
        )


def _choose(form: Form, name: str, choices: tuple[str, ...]) -> str:
    """Return a field that has one of some values; the first of them where it is missing."""
    value = form.one(name, choices[0])
    if value not in choices:
        raise _wrong(name, choices)
    return value


def _wrong(name: str, choices: tuple[str, ...]) -> ApiError:
    allowed = ", ".join(dict.fromkeys(choice for choice in choices if choice))
    return ApiError(400, f"'{name}' must be {allowed}.", param=name, code="invalid_value")


def _check_temperature(form: Form) -> None:
    """Refuse what is no temperature; the search draws nothing at random, so that its value changes nothing."""
    try:
        temperature = float(form.one("temperature", "0"))
    except ValueError:
        temperature = -1.0
    if not 0 <= temperature <= 1:
        raise ApiError(400, "'temperature' must be a number from 0 to 1.", param="temperature", code="invalid_value")


def _hotwords(prompt: str) -> Hotwords | None:
    """Return the words of a prompt: one a line, a reading after a tab; or many in a line, with blanks between."""
    from speechllm.decode.hotwords import parse_hotwords

    lines = [line.strip() for line in prompt.splitlines()]
    entries = [entry for line in lines for entry in ([line] if "\t" in line else line.split())]
    entries = list(dict.fromkeys(entries))
    if not entries:
        return None
    if len(entries) > MAX_PROMPT_WORDS:
        raise ApiError(400, f"The prompt has more than {MAX_PROMPT_WORDS} words.", param="prompt", code="invalid_value")
    try:
        return parse_hotwords(entries, "prompt")
    except DataError as error:
        message = f"The prompt is a list of words to listen for: {error.where}: {error.what}; {error.fix}."
        raise ApiError(400, message, param="prompt", code="invalid_value") from error


class Service:
    """A model behind its limits."""

    def __init__(
        self, recognizer: Recognizer, limits: Limits, *, name: str, language: str = "ja", walk: Walk = longform_walk
    ) -> None:
        """Take the parts; `start` brings them to life."""
        self.limits, self.name, self.language = limits, name, language
        self.places, self.rates = Places(limits), Rates(limits.rate_per_min)
        self.batches = Batches(recognizer, limits.max_batch)
        self._walk = walk
        self._unpacker = Unpacker(limits)
        self._threads = ThreadPoolExecutor(limits.max_queue, "request")
        self._scratch = Scratch()
        self._is_stopping = self._is_over = False
        self._at_work: set[asyncio.Timeout] = set()

    def start(self) -> None:
        """Start what must be ready before the first request."""
        self._unpacker.start()

    def close(self) -> None:
        """Drop all requests, end the threads, remove the files; wait for what the model works on."""
        self._is_stopping = True
        self.batches.close()
        self._unpacker.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._scratch.close()
        self.batches.join(STOP_S)  # a thread that is cut off inside the model can crash the process

    def check_open(self) -> None:
        """Refuse a request while the server stops.

        Raises:
            ApiError: 503.
        """
        if self._is_stopping:
            raise _stopping()

    def stop(self) -> None:
        """Refuse requests from now on; those that are here go on."""
        self._is_stopping = True

    def end_all(self) -> None:
        """End what `until_end` holds: no more can be waited for it."""
        self._is_stopping = self._is_over = True
        now = asyncio.get_running_loop().time()
        for work in list(self._at_work):
            work.reschedule(now)

    @contextlib.asynccontextmanager
    async def until_end(self) -> AsyncIterator[None]:
        """Let the block go on until `end_all` is called.

        Raises:
            ApiError: 503, it was.
        """
        if self._is_over:
            raise _stopping()
        try:
            async with asyncio.timeout(None) as work:
                self._at_work.add(work)
                try:
                    yield
                finally:
                    self._at_work.remove(work)
        except TimeoutError as error:
            if work.expired():
                raise _stopping() from error
            raise

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield a new folder for the files of one request, which is then removed.

        Raises:
            ApiError: 503, it cannot be made.
        """
        try:
            path = self._scratch.new_folder()
        except OSError as error:
            raise busy(503, "The server cannot store the file now.", "no_room") from error
        try:
            yield path
        finally:
            remove(path)

    def ends_at(self) -> float:
        """Return when the time of a request is over whose upload ends now, by the clock of the event loop."""
        return asyncio.get_running_loop().time() + self.limits.timeout_s

    async def unpack(self, source: Path, ends_at: float) -> tuple[Path, float]:
        """Return a plain WAV of what is in `source`, beside it, and its seconds; `source` is removed.

        Raises:
            ApiError: as `Unpacker.unpack`; 503, the time is over.
        """
        target = source.with_name("plain.wav")
        try:
            async with asyncio.timeout_at(ends_at):
                duration_s = await self._unpacker.unpack(source, target)
        except TimeoutError as error:
            raise self._late() from error
        source.unlink()  # noqa: ASYNC240 - no more blocking than the rest of a small program
        return target, duration_s

    def _late(self) -> ApiError:
        return busy(503, f"The text was not ready within {self.limits.timeout_s:g} s.", "timeout")

    async def segments(
        self, ticket: Ticket, path: Path, hotwords: Hotwords | None, ends_at: float
    ) -> AsyncIterator[Segment]:
        """Yield the segments of a recording as they are found.

        Raises:
            ApiError: 422, it cannot be read; 503, the time is over or the server stops; 500, our own fault.
        """
        loop = asyncio.get_running_loop()
        found: asyncio.Queue[Segment | Exception | None] = asyncio.Queue()

        def post(value: Segment | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped: nobody listens
                loop.call_soon_threadsafe(found.put_nowait, value)

        self._threads.submit(_go, lambda: self._walk(ticket, path, hotwords), post)
        while True:
            try:
                async with self.until_end(), asyncio.timeout_at(ends_at):
                    value = await found.get()
            except TimeoutError as error:
                ticket.drop()
                raise self._late() from error
            if value is None:
                return
            if isinstance(value, Exception):
                raise _as_api_error(value)
            yield value

    async def transcript(self, ticket: Ticket, source: Path, hotwords: Hotwords | None, ends_at: float) -> Transcript:
        """Return the text of an uploaded file.

        Raises:
            ApiError: as `unpack` and `segments`.
        """
        path, duration_s = await self.unpack(source, ends_at)
        segments = [segment async for segment in self.segments(ticket, path, hotwords, ends_at)]
        return Transcript(duration_s, tuple(segments))


def _go(walk: Callable[[], Iterator[Segment]], post: Callable[[Segment | Exception | None], None]) -> None:
    """Walk through a recording in a thread; what it finds, and how it ends, is posted."""
    try:
        for segment in walk():
            post(segment)
    except Exception as error:  # noqa: BLE001 - it is raised again by whoever reads what is posted
        post(error)
    else:
        post(None)


def _stopping() -> ApiError:
    return busy(503, "The server is stopping.", "stopping")


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, DataError):
        return ApiError(422, f"The file {error.what}.", param="file", code="broken_file")
    if isinstance(error, Dropped):
        return _stopping()
    if refused := lack_of_files(error):
        return refused
    LOG.error("event=request_failed", exc_info=error)
    return ApiError(500, "The server failed on this file; its log says why.", code="failed")

"""The HTTP side: OpenAI's transcription end point, its errors, the page, and who may ask."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from speechllm.decode import formats
from speechllm.decode.result import Transcript
from speechllm.serve import answers, corrected, uploads
from speechllm.serve.connections import lack_of_files
from speechllm.serve.hosts import LocalOnly
from speechllm.serve.limits import ApiError
from speechllm.serve.protocol import ABORT
from speechllm.serve.queue import Ticket
from speechllm.serve.service import Options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from starlette.types import Receive, Scope, Send

    from speechllm.decode.result import Segment
    from speechllm.serve.service import Service

T = TypeVar("T")
LOG = logging.getLogger(__name__)
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
LAST_EVENT_S = 1.0  # to tell a client that reads that the time is over
CLIENT_GONE = 499  # nobody reads it; as nginx writes it into its log
SAFETY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def create_app(service: Service, *, is_local: bool = False) -> FastAPI:
    """Return the application of a service that was started; `is_local`: under this machine's names alone."""
    # the pages that describe an API would load scripts from elsewhere
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(OSError, _refuse_for_lack)
    app.add_exception_handler(Exception, _refuse)
    if is_local:
        app.add_middleware(LocalOnly, others=service.limits.hosts)
    _add_pages(app)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        service.check_open()
        counts = {"requests": service.places.taken, "segments_waiting": service.batches.waiting}
        return JSONResponse({"status": "ok", "model": service.name, **counts})

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        if name != service.name:
            raise ApiError(404, f"This server has the model '{service.name}'.", param="model", code="model_not_found")
        return JSONResponse(_model(service))

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(request: Request) -> Response:
        began = time.monotonic()
        try:
            async with service.until_end():
                answer = await _transcribe(request, service)
        except ApiError as error:
            LOG.info("event=refused status=%d code=%s after_s=%.2f", error.status, error.code, time.monotonic() - began)
            raise
        event = "streaming" if isinstance(answer, _Stream) else "answered"
        LOG.info("event=%s after_s=%.2f", event, time.monotonic() - began)
        return answer

    converting = asyncio.Lock()  # one at a time takes all that Python has of a processor

    @app.post("/formats/{kind}")
    async def save(kind: str, request: Request) -> Response:
        address = _address(request)
        _check_origin(request)
        service.rates.check(address)
        if kind not in formats.FORMATS:
            raise ApiError(404, f"'{kind}' is none of {', '.join(formats.FORMATS)}.", code="no_such_format")
        async with service.until_end():
            with service.places.take(address):
                data = await _body(request, service.limits.upload_s)
                async with converting:
                    text = await asyncio.to_thread(corrected.convert, data, kind)
        return PlainTextResponse(text, headers=SAFETY)

    return app


def _add_pages(app: FastAPI) -> None:
    def page(name: str, kind: str) -> None:
        data = (Path(__file__).parent / PAGE[name][0]).read_bytes()

        @app.get(name)
        async def send() -> Response:
            return Response(data, media_type=kind, headers=SAFETY)

    for name, (_, kind) in PAGE.items():
        page(name, f"{kind}; charset=utf-8")


def _model(service: Service) -> dict[str, object]:
    return {
        "id": service.name,
        "object": "model",
        "created": 0,
        "owned_by": "speechllm",
        "language": service.language,
    }


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    """Return any error in OpenAI's shape."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{error.detail}.", code=None)
    if not isinstance(error, ApiError):
        error = ApiError(500, "The server failed; its log says why.", code="failed")
    return JSONResponse(error.body(), error.status, error.headers())


async def _refuse_for_lack(request: Request, error: Exception) -> JSONResponse:
    """Return what tells of a lack of open files; any other error of the system is a fault of ours."""
    refused = lack_of_files(error)
    if refused is None:
        raise error
    return await _refuse(request, refused)


async def _transcribe(request: Request, service: Service) -> Response:
    """Return the answer to one upload; its place, files and segments are given back whatever happens."""
    address = _address(request)
    _check_origin(request)
    service.check_open()
    service.rates.check(address)
    uploads.check_length(request.headers.get("content-length"), service.limits)
    async with AsyncExitStack() as held:
        held.enter_context(service.places.take(address))
        file = held.enter_context(service.folder()) / "upload"
        form = await _receive(request, file, service)
        ends_at = service.ends_at()
        options = Options.of(form, service.name, service.language)
        ticket = held.enter_context(Ticket(service.batches))
        if options.stream:
            path, duration_s = await _while_connected(request, service.unpack(file, ends_at))
            events = _events(service.segments(ticket, path, options.hotwords, ends_at), duration_s)
            return _Stream(events, held.pop_all(), ends_at + LAST_EVENT_S)
        transcript = await _while_connected(request, service.transcript(ticket, file, options.hotwords, ends_at))
    return _render(transcript, options, service.language)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _check_origin(request: Request) -> None:
    """Refuse what another site's page sends: browsers put that site's name into the request."""
    origin = request.headers.get("origin")
    if origin is not None and _site(origin) != request.headers.get("host"):
        raise ApiError(403, "Pages of other sites cannot use this server.", code="other_origin")


def _site(origin: str) -> str | None:
    """Return the host and port in an origin; None where it is no address."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


async def _receive(request: Request, file: Path, service: Service) -> uploads.Form:
    try:
        return await uploads.receive(request.stream(), request.headers.get("content-type", ""), file, service.limits)
    except ClientDisconnect as error:
        raise ApiError(CLIENT_GONE, "The client left.", code="client_gone") from error


async def _while_connected(request: Request, work: Coroutine[object, object, T]) -> T:
    """Return the result of `work`, which is cancelled when the client goes away."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_GONE, "The client left.", code="client_gone")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(request: Request) -> None:
    """Wait until the client is gone: with the body read, the next message says so."""
    await request.receive()


class _Stream(StreamingResponse):
    """Server-sent events; what the request holds is given back after the last, or when the client goes away.

    So it is at `ends_at`, when the connection of a client that does not read is aborted: sending waits for it for ever.
    """

    def __init__(self, events: AsyncIterator[str], held: AsyncExitStack, ends_at: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._held, self._ends_at = held, ends_at

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._held, asyncio.timeout_at(self._ends_at):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            LOG.info("event=unread")
            scope["state"][ABORT]()
            await self.listen_for_disconnect(receive)


async def _events(segments: AsyncIterator[Segment], duration_s: float) -> AsyncIterator[str]:
    """Yield OpenAI's events of a transcription; each part carries its segment with words and times."""
    found: tuple[Segment, ...] = ()
    text = ""
    try:
        async for segment in segments:
            found = (*found, segment)
            before, text = text, Transcript(duration_s, found).text
            record = answers.segment_record(len(found) - 1, segment)
            record["words"] = [answers.word_record(word) for word in segment.words]
            yield _event({"type": "transcript.text.delta", "delta": text[len(before) :], "segment": record})
    except ApiError as error:
        yield _event(error.body())
        return
    yield _event({"type": "transcript.text.done", "text": text, "duration": round(duration_s, 3)})


def _event(value: object) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _body(request: Request, upload_s: float) -> bytes:
    """Return a body that is small enough to be held in memory."""
    data = bytearray()
    try:
        async with asyncio.timeout(upload_s):
            async for chunk in request.stream():
                data += chunk
                if len(data) > corrected.MAX_BYTES:
                    raise ApiError(413, "The transcript is too long.", code="request_too_large")
    except TimeoutError as error:
        raise ApiError(408, f"The upload took longer than {upload_s:g} s.", code="upload_timeout") from error
    except ClientDisconnect as error:
        raise ApiError(CLIENT_GONE, "The client left.", code="client_gone") from error
    return bytes(data)


def _render(transcript: Transcript, options: Options, language: str) -> Response:
    """Return the transcript in the format that was asked for."""
    match options.response_format:
        case "verbose_json":
            return JSONResponse(answers.verbose(transcript, language, words=options.words, segments=options.segments))
        case "text":
            return PlainTextResponse(transcript.text + "\n")
        case "srt":
            return PlainTextResponse(formats.as_srt(transcript), media_type="application/x-subrip; charset=utf-8")
        case "vtt":
            return PlainTextResponse(formats.as_vtt(transcript), media_type="text/vtt; charset=utf-8")
    return JSONResponse({"text": transcript.text})

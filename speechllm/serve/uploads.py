"""Receives a form with a file: streamed to disk, bounded in bytes, fields, headers and time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from speechllm.serve.limits import ApiError, busy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from types import TracebackType
    from typing import BinaryIO, Self

    from speechllm.serve.limits import Limits

MAX_FIELDS = 32
MAX_FIELD_BYTES = 64 << 10
FILE_FIELD = "file"


@dataclass
class Form:
    """What a form held; the file is on disk."""

    file: Path
    file_bytes: int = 0
    has_file: bool = False
    fields: dict[str, list[str]] = field(default_factory=dict)

    def one(self, name: str, default: str = "") -> str:
        """Return the value of a field.

        Raises:
            ApiError: 400, it was given more than once.
        """
        values = self.fields.get(name, [default])
        if len(values) > 1:
            raise ApiError(400, f"The field '{name}' was given {len(values)} times.", param=name)
        return values[0]


async def receive(stream: AsyncIterator[bytes], content_type: str, file: Path, limits: Limits) -> Form:
    """Return the form in a request's body; its file is written to `file`.

    Raises:
        ApiError: 415, not a form; 413, too many bytes, whatever the header said; 408, too slow; 400, not a whole
            form, or fields out of bounds; 503, the disk is full.
    """
    boundary = _boundary(content_type)
    try:
        with _Reader(boundary, file, limits) as reader:
            async with asyncio.timeout(limits.upload_s):
                async for chunk in stream:
                    reader.feed(chunk)
            return reader.finish()
    except TimeoutError as error:
        raise ApiError(408, f"The upload took longer than {limits.upload_s:g} s.", code="upload_timeout") from error
    except FormParserError as error:
        raise ApiError(400, "The body is not a form as its boundary says.", code="invalid_form") from error
    except OSError as error:
        raise busy(503, "The server cannot store the file now.", "no_room") from error


def check_length(content_length: str | None, limits: Limits) -> None:
    """Refuse a body that is too large by its own header, before any of it is read.

    Raises:
        ApiError: 413.
    """
    if content_length is not None and content_length.isdecimal() and int(content_length) > limits.max_bytes:
        raise too_large(limits)


def too_large(limits: Limits) -> ApiError:
    """Return the error for a body over the bound."""
    return ApiError(413, f"The request is larger than {limits.max_bytes} bytes.", code="request_too_large")


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise ApiError(415, "The body must be a form: multipart/form-data with a boundary.", code="not_a_form")
    return boundary


class _Reader:
    """Takes a form apart while it arrives."""

    def __init__(self, boundary: bytes, file: Path, limits: Limits) -> None:
        self._form, self._limits = Form(file), limits
        self._seen = self._parts = 0
        self._header, self._value, self._name = bytearray(), bytearray(), ""
        self._disposition = b""
        self._is_file = self._is_whole = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._open,
                "on_part_data": self._data,
                "on_part_end": self._close,
                "on_end": self._end,
            },
        )
        self._stream: BinaryIO = file.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def feed(self, chunk: bytes) -> None:
        self._seen += len(chunk)
        if self._seen > self._limits.max_bytes:
            raise too_large(self._limits)
        if chunk and not self._is_whole:  # what follows the last boundary means nothing
            self._parser.write(chunk)

    def finish(self) -> Form:
        if not self._is_whole:
            raise ApiError(400, "The form ends before its last boundary.", code="invalid_form")
        self._stream.flush()
        return self._form

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_FIELDS:
            raise ApiError(400, f"The form has more than {MAX_FIELDS} fields.", code="invalid_form")
        self._disposition = b""

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = self._name == FILE_FIELD
        if self._is_file and self._form.has_file:
            raise ApiError(400, "The form has more than one file.", param=FILE_FIELD)
        self._form.has_file = self._form.has_file or self._is_file
        self._value.clear()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._form.file_bytes += self._stream.write(data[start:end])
            return
        self._value.extend(data[start:end])
        if len(self._value) > MAX_FIELD_BYTES:
            raise ApiError(400, f"A field is longer than {MAX_FIELD_BYTES} bytes.", param=self._name[:64])

    def _close(self) -> None:
        if self._is_file:
            return
        try:
            text = self._value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ApiError(400, "A field is not UTF-8.", param=self._name[:64]) from error
        self._form.fields.setdefault(self._name, []).append(text)
        self._value.clear()

    def _end(self) -> None:
        self._is_whole = True

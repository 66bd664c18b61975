"""A transcript as the page sends it back after corrections, to be saved in the formats of ``speechllm transcribe``."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from speechllm.decode import formats
from speechllm.decode.result import Segment, Transcript, Word
from speechllm.serve.limits import ApiError

MAX_BYTES = 5 << 20
"""An hour in which 20 words are spoken a second, of 70 bytes each with their times; or four hours of 5 a second."""
MAX_SEGMENTS = 20_000
MAX_WORDS = 2_000
MAX_FLAGS = 10
CORRECTED = "corrected"
"""The flag of a segment whose text is the user's."""

Seconds = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Confidence = Annotated[float, Field(ge=0, le=1)]
_Flag = Annotated[str, Field(pattern="^[a-z_]{1,20}$")]


class _Word(BaseModel):
    model_config = ConfigDict(frozen=True)
    word: str
    start: Seconds
    end: Seconds
    confidence: Confidence


class _Segment(BaseModel):
    model_config = ConfigDict(frozen=True)
    text: str
    start: Seconds
    end: Seconds
    confidence: Confidence
    words: Annotated[tuple[_Word, ...], Field(max_length=MAX_WORDS), FailFast()] = ()
    flags: Annotated[tuple[_Flag, ...], Field(max_length=MAX_FLAGS), FailFast()] = ()
    corrected: bool = False

    def segment(self) -> Segment:
        """Return it as the rest of the package has it; the words of a corrected text are not known any more."""
        words = () if self.corrected else self.words
        flags = (*self.flags, CORRECTED) if self.corrected else self.flags
        spoken = tuple(Word(word.word, word.start, word.end, word.confidence) for word in words)
        return Segment(self.start, self.end, self.text, self.confidence, spoken, flags)


class _Transcript(BaseModel):
    model_config = ConfigDict(frozen=True)
    duration: Seconds
    # the first fault is told, and all others would cost much: a second for each 100 kB
    segments: Annotated[tuple[_Segment, ...], Field(max_length=MAX_SEGMENTS), FailFast()]


def convert(data: bytes, kind: str) -> str:
    """Return the transcript in a JSON body in one of `formats.FORMATS`.

    Raises:
        ApiError: as `parse`.
    """
    return formats.FORMATS[kind](parse(data))


def parse(data: bytes) -> Transcript:
    """Return the transcript in a JSON body.

    Raises:
        ApiError: 400, it is not one.
    """
    try:
        given = _Transcript.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise ApiError(400, f"{where}: {first['msg']}.", code="invalid_transcript") from error
    return Transcript(given.duration, tuple(segment.segment() for segment in given.segments))

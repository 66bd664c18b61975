"""A transcript as text, JSON, SubRip or WebVTT."""

from __future__ import annotations

import dataclasses
import html
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from speechllm.decode.result import Segment, Transcript

MS_PER_S = 1000
MS_PER_MIN = 60 * MS_PER_S
MS_PER_H = 60 * MS_PER_MIN
DIGITS = 3  # of seconds and confidences in JSON
CUE_CHARS = 40  # two lines of a Japanese subtitle
CUE_S = 7.0
MIN_CUE_MS = 1
BREAKS_AFTER = "。!?!?、"


@dataclasses.dataclass(frozen=True)
class Cue:
    """What a subtitle shows, and when."""

    start_s: float
    end_s: float
    text: str


def as_txt(transcript: Transcript) -> str:
    """Return the text of each segment on a line of its own; those without speech are left out."""
    return "".join(f"{text}\n" for segment in transcript.segments if (text := _one_line(segment.text)))


def as_record(transcript: Transcript) -> dict[str, object]:
    """Return what the JSON form holds: text, duration, and every segment with its words, confidence and flags."""
    return {"text": transcript.text, **_rounded(dataclasses.asdict(transcript))}


def as_json(transcript: Transcript) -> str:
    """Return one indented JSON object."""
    return json.dumps(as_record(transcript), ensure_ascii=False, indent=1) + "\n"


def as_srt(transcript: Transcript) -> str:
    """Return SubRip: numbered cues, a comma before the milliseconds."""
    blocks = [
        f"{number}\n{_clock(start_ms, ',')} --> {_clock(end_ms, ',')}\n{text}\n"
        for number, (start_ms, end_ms, text) in enumerate(_timed(transcript), start=1)
    ]
    return "\n".join(blocks)


def as_vtt(transcript: Transcript) -> str:
    """Return WebVTT (https://www.w3.org/TR/webvtt1/); what would be markup in it is escaped."""
    blocks = [
        f"{_clock(start_ms, '.')} --> {_clock(end_ms, '.')}\n{html.escape(text, quote=False)}\n"
        for start_ms, end_ms, text in _timed(transcript)
    ]
    return "\n".join(["WEBVTT\n", *blocks])


FORMATS: dict[str, Callable[[Transcript], str]] = {"txt": as_txt, "json": as_json, "srt": as_srt, "vtt": as_vtt}


def cues(segment: Segment) -> Iterator[Cue]:
    """Yield the subtitles of a segment: whole, or in parts of whole words where it is too long and its words are timed.

    Parts end after a mark where they can, else where they are full.
    """
    text = _one_line(segment.text)
    if not text:
        return
    spelled = "".join(word.text for word in segment.words)
    if (len(text) <= CUE_CHARS and segment.end_s - segment.start_s <= CUE_S) or spelled != segment.text:
        yield Cue(segment.start_s, segment.end_s, text)
        return
    first = 0
    for after, word in enumerate(segment.words, start=1):
        part = segment.words[first:after]
        shown = "".join(one.text for one in part)
        upcoming = segment.words[after] if after < len(segment.words) else None
        is_full = upcoming is not None and (
            len(shown) + len(upcoming.text) > CUE_CHARS or upcoming.end_s - part[0].start_s > CUE_S
        )
        is_phrase = word.text[-1:] in BREAKS_AFTER and len(shown) > CUE_CHARS // 2
        if upcoming is None or is_full or is_phrase:
            yield Cue(part[0].start_s, word.end_s, _one_line(shown))
            first = after


def _timed(transcript: Transcript) -> Iterator[tuple[int, int, str]]:
    """Yield begin and end in milliseconds, and text; a cue lasts, and begins no earlier than the one before ends."""
    before_ms = 0
    for segment in transcript.segments:
        for cue in cues(segment):
            start_ms = max(before_ms, round(cue.start_s * MS_PER_S))
            before_ms = max(start_ms + MIN_CUE_MS, round(cue.end_s * MS_PER_S))
            yield start_ms, before_ms, cue.text


def _clock(time_ms: int, point: str) -> str:
    hours, rest = divmod(time_ms, MS_PER_H)
    minutes, rest = divmod(rest, MS_PER_MIN)
    seconds, left = divmod(rest, MS_PER_S)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{left:03d}"


def _one_line(text: str) -> str:
    """Return the text without line breaks, which would end a cue."""
    return " ".join(text.split())


def _rounded(value: dict[str, object]) -> dict[str, object]:
    """Return the object with its numbers rounded, lists and objects inside included."""
    return {key: _rounded_one(one) for key, one in value.items()}


def _rounded_one(value: object) -> object:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return _rounded(value)
    if isinstance(value, list | tuple):
        return [_rounded_one(one) for one in value]
    return value

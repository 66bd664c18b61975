"""What is forgiven and what is not, and under which cause every edit falls."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.score.causes import CAUSES, main_cause
from speechllm.score.texts import JoinedText
from speechllm.score.utterance import UttScore, Wanted, score_utterance
from speechllm.text.normalize import get_profile

SENTENCES = st.lists(
    st.sampled_from(
        [
            "水を買う",
            "みず",
            "記者が",
            "汽車が",
            "二十人",
            "サーバー",
            "サーバ",
            "子供",
            "子ども",
            "a",
            "、",
            " ",
            "会う",
        ]
    ),
    max_size=6,
).map("".join)


def scored(ref: str, hyp: str, profile: str = "default") -> UttScore:
    wanted = Wanted(profile=get_profile(profile), metrics=frozenset({"cer_lenient"}))
    return score_utterance(JoinedText("u", ref, hyp), wanted)


@pytest.mark.parametrize(
    ("ref", "hyp", "cause"),
    [
        ("子供が遊ぶ", "子どもが遊ぶ", "spelling"),
        ("取り組みを続ける", "取組を続ける", "spelling"),
        ("本を読む事", "本を読むこと", "spelling"),
        ("大会で優勝する", "たいかいで優勝する", "spelling"),
        ("記者が来た", "汽車が来た", "homophone"),
        ("ひとつ買った", "一つ買った", "numeral"),
        ("サーバーが落ちた", "サーバが落ちた", "katakana"),
        ("ヴァイオリンを弾く", "バイオリンを弾く", "katakana"),
    ],
)
def test_what_sounds_alike_is_forgiven(ref: str, hyp: str, cause: str) -> None:
    score = scored(ref, hyp)
    assert score.counts["cer"].edits > 0
    assert score.counts["cer_lenient"].edits == 0
    assert score.counts["cer_lenient"].ref == score.counts["cer"].ref
    assert score.leniency is not None
    assert [pair.cause for pair in score.leniency.forgiven] == [cause]
    assert score.leniency.causes == {cause: score.counts["cer"].edits}


@pytest.mark.parametrize(
    ("ref", "hyp", "cause"),
    [
        ("月が見える", "杉が見える", "phonetic"),
        ("ビルを飲む", "ビールを飲む", "katakana"),
        ("二十五人", "二十六人", "numeral"),
        ("水を買う", "水買う", "dropped"),
        ("水買う", "水を買う", "added"),
        ("水を買うために歩いて行った", "", "empty"),
        ("水を買うために遠くの町まで歩いて行った", "水を買うために", "truncation"),
        ("水を買う", "水を買うはいはいはいはいはいはいはいはいはい", "loop"),
        ("水を買う", "水を買うご視聴ありがとうございました次回もお楽しみに", "hallucination"),
    ],
)
def test_what_sounds_different_is_not(ref: str, hyp: str, cause: str) -> None:
    score = scored(ref, hyp)
    assert score.counts["cer_lenient"].edits == score.counts["cer"].edits > 0
    assert score.leniency is not None
    assert main_cause(score.leniency.causes) == cause


def test_punctuation_is_a_cause_where_the_profile_counts_it() -> None:
    leniency = scored("水を、買う。", "水を買う", "raw").leniency
    assert leniency is not None
    assert leniency.causes == {"symbol": 2}


def test_a_word_that_is_right_is_never_part_of_a_pair() -> None:
    leniency = scored("記者が駅に来た", "汽車が駅に来た").leniency
    assert leniency is not None
    assert [(pair.ref, pair.hyp) for pair in leniency.forgiven] == [("記者", "汽車")]


def test_no_edits_have_the_cause_correct() -> None:
    leniency = scored("水", "水").leniency
    assert leniency is not None
    assert main_cause(leniency.causes) == "correct"


@settings(deadline=None)
@pytest.mark.parametrize("profile", ["default", "raw"])
@given(ref=SENTENCES, hyp=SENTENCES)
def test_lenient_is_at_most_plain_and_causes_add_up(profile: str, ref: str, hyp: str) -> None:
    score = scored(ref, hyp, profile)
    assert score.counts["cer_lenient"].edits <= score.counts["cer"].edits
    assert score.leniency is not None
    assert score.leniency.causes.total() == score.counts["cer"].edits
    assert set(score.leniency.causes) <= set(CAUSES)
    assert scored(ref, ref, profile).counts["cer_lenient"].edits == 0


def test_a_long_loop_does_not_take_long() -> None:
    start = time.process_time()
    score = scored("あ" * 800, "ア" * 800)
    assert score.counts["cer_lenient"].edits <= score.counts["cer"].edits
    assert time.process_time() - start < 20

"""Text profiles: the order of their steps, and that they change nothing twice."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from speechllm.errors import UserError
from speechllm.text.normalize import PROFILES, get_profile, normalize

JAPANESE = st.text(
    st.sampled_from(
        "あがはをっーカヴァィゞ々〆〇千葉一二三十百万点年円。、「」！？・…〜～-－−―ｶﾞﾟ゛゜"
        "０1２9.,，%％℃＄¥&＆ aＢ　\u3099\u2028㎞㎡²①½"
    )
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("デ−タとデ―タとデ-タ", "データとデータとデータ"),
        ("すご〜い！ え～と…", "すごーいえーと"),
        ("五〜十人と５～１０人", "五から十人と五から十人"),
        ("Ｗｉ－Ｆｉは速い。", "wifiは速い"),
        ("降水確率は10％、気温は−5℃", "降水確率は十パーセント気温はマイナス五度"),
        ("3.5倍と35倍", "三点五倍と三十五倍"),
        ("1,234円と￥980と12、000人", "千二百三十四円と九百八十円と一万二千人"),
        ("0120-444-444", "〇一二〇四四四四四四"),
        ("佐々木さんの〆切は一〇〇日後", "佐々木さんの〆切は百日後"),
        ("千葉と三重と一人", "千葉と三重と一人"),
        ("がぎぐ か゛", "がぎぐが"),
        ("ｶﾞｽﾀﾝｸ", "ガスタンク"),
        ("①番と㎞と㈱", "一番とkmと株"),
        ("🎉やった\u200b！", "やった"),
    ],
)
def test_default_profile_by_example(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("profile", "text", "expected"),
    [
        ("espnet", "水を、買う。 ", "水を、買う。 "),
        ("raw", " 水を、  買う。\t", "水を、 買う。"),
        ("kotoba", "（笑）[雑音]<咳>(小声)ＡＢＣは3.5％。", "笑abcは35"),
        ("kotoba", "ガスとガス", "ガスとガス"),
        ("reazon", "「０１２０」は、25人？", "百二十は二十五人"),
        ("reazon", "ＡＢＣ・3.5％", "ABC・三点五％"),
        ("train", "ｶﾀｶﾅ と　Ｅｎｇｌｉｓｈ  text、 25％?", "カタカナとEnglish text、25%？"),
        ("train", "え！ほんと？……（笑）", "え！ほんと？……（笑）"),
    ],
)
def test_other_profiles_by_example(profile: str, text: str, expected: str) -> None:
    assert normalize(text, profile) == expected


def test_decomposed_text_equals_composed_text() -> None:
    assert normalize("か\u3099く\u3099ぱ") == normalize("がぐは\u309a")


@pytest.mark.parametrize("profile", sorted(PROFILES))
@given(text=JAPANESE)
@example(text="-1〜2.5")
@example(text="一、〇〇〇円")
def test_normalisation_is_idempotent_on_japanese(profile: str, text: str) -> None:
    once = normalize(text, profile)
    assert normalize(once, profile) == once


@pytest.mark.parametrize("profile", ["default", "train", "raw", "espnet"])
@given(text=st.text())
def test_our_own_profiles_are_idempotent_on_any_text(profile: str, text: str) -> None:
    once = normalize(text, profile)
    assert normalize(once, profile) == once


@given(text=JAPANESE)
def test_default_leaves_letters_and_numbers_only(text: str) -> None:
    assert all(char.isalnum() or char in "ー々〆〇ゞ" for char in normalize(text))


def test_profiles_are_found_with_and_without_version() -> None:
    assert get_profile("train_v1") is get_profile("train")
    assert [profile.tag for profile in PROFILES.values()] == [
        "default_v1",
        "espnet_v1",
        "reazon_v1",
        "kotoba_v1",
        "raw_v1",
        "train_v1",
    ]


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="no such text profile; choose one of default_v1, espnet_v1"):
        normalize("水", "defautl")

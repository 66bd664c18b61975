"""The sentence generator of the mini corpus: what it draws, what faulty files are told."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from local_scripts import LOCAL, load

from speechllm.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

DOMAIN_YAML = LOCAL / "corpus" / "domain.yaml"
ALLOWED = re.compile(r"[ぁ-んァ-ヶー一-龠々0-9、]+[。？]")


sentences = load("sentences")

SMALL = """
slots:
  name: ["佐藤", "鈴木", "高橋", "長谷川"]
  month: {min: 1, max: 12, suffix: "月"}
  day: {min: 1, max: 21, step: 10, suffix: "日"}
  date: ["{month}{day}"]
templates:
  - "{date}に{name}さんと会います。"
  - "{name}さんと{name}さんは{date}に来ますか？"
"""


def _domain(folder: Path, text: str = SMALL) -> object:
    path = folder / "domain.yaml"
    path.write_text(text, encoding="utf-8")
    domain: object = sentences.load_domain(path)
    return domain


def _fault(folder: Path, text: str) -> str:
    with pytest.raises(DataError) as caught:
        _domain(folder, text)
    return str(caught.value)


def _extreme(slots: dict[str, tuple[str, ...]], text: str, sign: int) -> int:
    """Length of the shortest (sign 1) or the longest (sign -1) filling."""
    names = re.findall(r"\{(\w+)\}", text)
    fixed = len(re.sub(r"\{\w+\}", "", text))
    best = [min(sign * _extreme(slots, value, sign) for value in slots[name]) for name in names]
    return fixed + sign * sum(best)


def test_numbers_are_written_out_and_references_filled(tmp_path: Path) -> None:
    domain = _domain(tmp_path)
    drawn = sentences.sample(domain, 40, 1, [], 0.0)
    day = r"([1-9]|1[0-2])月(1|11|21)日"
    name = "(佐藤|鈴木|高橋|長谷川)"
    form = re.compile(rf"{day}に{name}さんと会います。|{name}さんと{name}さんは{day}に来ますか？")
    assert all(form.fullmatch(sentence) for sentence in drawn)


def test_a_slot_named_twice_takes_two_values(tmp_path: Path) -> None:
    drawn = sentences.sample(_domain(tmp_path), 200, 1, [], 0.0)
    pairs = [re.fullmatch(r"(.+)さんと(.+)さんは.*", sentence) for sentence in drawn]
    assert any(pairs)
    assert all(pair[1] != pair[2] for pair in pairs if pair)


def test_same_seed_same_sentences(tmp_path: Path) -> None:
    domain = _domain(tmp_path)
    first = sentences.sample(domain, 50, 7, [], 0.0)
    assert first == sentences.sample(domain, 50, 7, [], 0.0)
    assert first != sentences.sample(domain, 50, 8, [], 0.0)


def test_all_different_evenly_from_the_templates(tmp_path: Path) -> None:
    drawn = sentences.sample(_domain(tmp_path), 100, 1, [], 0.0)
    assert len(set(drawn)) == 100
    assert sum(sentence.endswith("？") for sentence in drawn) == 50


def test_avoided_sentences_stay_out_even_without_a_distance(tmp_path: Path) -> None:
    domain = _domain(tmp_path)
    held_out = sentences.sample(domain, 100, 1, [], 0.0)
    assert not set(held_out) & set(sentences.sample(domain, 100, 2, held_out, 0.0))


def test_too_many_sentences_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "domain.yaml"
    domain = _domain(tmp_path, 'slots: {a: ["あ", "い", "う"]}\ntemplates: ["{a}です。"]')
    with pytest.raises(DataError) as caught:
        sentences.sample(domain, 4, 1, [], 0.2)
    assert str(caught.value) == (
        f"{path}: only 3 of 4 sentences found that are 0.2 from the held-out ones; "
        "ask for fewer, lower the distance, or add templates"
    )


def test_distance_is_edits_over_the_longer_length() -> None:
    assert sentences.nearest_distance("明日は雨です。", ["明日は晴れです。"]) == 2 / 8
    assert sentences.nearest_distance("あいう", ["かきくけこ", "あいう"]) == 0.0
    assert sentences.nearest_distance("あいう", []) == 1.0
    assert sentences.far_from("明日は雨です。", ["明日は晴れです。"], 0.25)
    assert not sentences.far_from("明日は雨です。", ["明日は晴れです。"], 0.26)


def test_unknown_slot_is_one_line(tmp_path: Path) -> None:
    message = _fault(tmp_path, SMALL.replace("{date}に来", "{week}に来"))
    assert message == (
        f"{tmp_path / 'domain.yaml'}: template {{name}}さんと{{name}}さんは{{week}}に来ますか？: "
        "there is no slot {week}; add it to slots, or name one of date, day, month, name"
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{month}{day}", "{month}{hour}", "slot date: there is no slot {hour}"),
        ("{month}{day}", "{month}{date}", "slot date: refers to itself: date -> date"),
        ("{month}{day}", "{month}{day", "slot date: a brace without its partner"),
        ('"鈴木"', "12", "slot name: 12 is not a string; put it in quotes"),
        ("min: 1, max: 12", "min: 12, max: 1", "slot month: is not a range of numbers"),
        ("min: 1, max: 12", "min: 1, most: 12", "slot month: is not a range of numbers"),
        ("slots:", "slot:", "has the keys slot, templates; give it just slots and templates"),
        ("slots:", "slots: [", "not YAML"),
    ],
)
def test_a_faulty_file_says_where_and_what(tmp_path: Path, old: str, new: str, said: str) -> None:
    message = _fault(tmp_path, SMALL.replace(old, new))
    assert message.startswith(str(tmp_path / "domain.yaml"))
    assert said in message
    assert "\n" not in message


def test_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        sentences.load_domain(tmp_path / "none.yaml")


def test_unseen_values_are_whole_words(tmp_path: Path) -> None:
    domain = _domain(tmp_path)
    train, held_out = ["1月1日に佐藤さんと会います。"], ["2月1日に鈴木さんと会います。"]
    assert sentences.unseen_values(domain, train, held_out) == ["鈴木"]


def test_read_sentences(tmp_path: Path) -> None:
    path = tmp_path / "open.txt"
    path.write_text("雨です。\n晴れです。\n", encoding="utf-8")
    assert sentences.read_sentences(path) == ["雨です。", "晴れです。"]
    path.write_text("雨です。\n晴れです。\n雨です。\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"open\.txt:3: the same sentence as in line 1; delete"):
        sentences.read_sentences(path)
    path.write_text("雨です。\n\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"open\.txt:2: an empty line; write one sentence a line"):
        sentences.read_sentences(path)


def test_our_domain_has_thousands_of_well_formed_sentences() -> None:
    drawn = sentences.sample(sentences.load_domain(DOMAIN_YAML), 5000, 1, [], 0.0)
    assert len(set(drawn)) == 5000
    assert [sentence for sentence in drawn if not ALLOWED.fullmatch(sentence)] == []


def test_our_domain_stays_within_its_lengths() -> None:
    domain = sentences.load_domain(DOMAIN_YAML)
    for template in domain.templates:
        assert _extreme(domain.slots, template, 1) >= 10, template
        assert _extreme(domain.slots, template, -1) <= 32, template


def test_our_domain_uses_every_slot() -> None:
    domain = sentences.load_domain(DOMAIN_YAML)
    texts = [*domain.templates, *(text for values in domain.slots.values() for text in values)]
    assert set(domain.slots) == set(re.findall(r"\{(\w+)\}", " ".join(texts)))


def test_our_split_has_no_near_copies_and_trains_on_every_word() -> None:
    domain = sentences.load_domain(DOMAIN_YAML)
    split = sentences.split_domain(domain, {"train": 2500, "dev": 60, "eval": 120}, 1, 0.2)
    assert {name: len(drawn) for name, drawn in split.items()} == {
        "train": 2500,
        "dev": 60,
        "eval": 120,
    }
    held_out = split["dev"] + split["eval"]
    assert all(sentences.far_from(sentence, held_out, 0.2) for sentence in split["train"])
    assert all(sentences.far_from(sentence, split["dev"], 0.2) for sentence in split["eval"])
    words = {text for values in domain.slots.values() for text in values}
    for word in words:
        if not re.search(r"[{0-9]", word):
            assert sum(word in sentence for sentence in split["train"]) >= 3, word


def test_held_out_sets_do_not_depend_on_the_training_size(tmp_path: Path) -> None:
    domain = _domain(tmp_path)
    small = sentences.split_domain(domain, {"train": 2, "eval": 3}, 1, 0.2)
    large = sentences.split_domain(domain, {"train": 9, "eval": 3}, 1, 0.2)
    assert small["eval"] == large["eval"]
    assert list(small) == ["train", "eval"]

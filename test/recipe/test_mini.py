"""The mini corpora on paper: their sizes, who speaks, and that held-out sentences are no near copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from local_scripts import load

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {
    "mini": {"train": 1700, "dev": 100, "eval": 100},
    "mini_open": {"train": 4520, "dev": 120, "eval": 120},
    "debug": {"train": 8},
}


sentences, synth, mini = [load(name) for name in ("sentences", "synth", "mini")]


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[str, list[str]]]:
    """Return corpus -> set -> sentences."""
    return {name: mini.texts_of(make()) for name, make in mini.CORPORA.items()}


def _voices(corpus: str, name: str, group: str | None = None) -> set[object]:
    parts = mini.CORPORA[corpus]().parts[name]
    return {voice for part in parts if group in (None, part.group) for voice in part.voices}


def _base(voice: object) -> str:
    """Return the voice without tempo and pitch: another tempo makes no new speaker."""
    return voice.name if isinstance(voice, synth.KokoroVoice) else "mei_normal"


def test_the_corpora_are_as_large_as_documented(texts: dict[str, dict[str, list[str]]]) -> None:
    assert {name: {part: len(lines) for part, lines in sets.items()} for name, sets in texts.items()} == SIZES


def test_forty_different_variants_of_the_first_voice() -> None:
    voices = mini.open_jtalk_voices()
    assert len(voices) == len({voice.speaker for voice in voices}) == 40
    assert all(0.4 < voice.alpha < 0.7 for voice in voices)
    ordered = sorted(voices, key=lambda voice: voice.half_tone)
    assert ordered[0].alpha > ordered[-1].alpha  # a low voice has the longer vocal tract


@pytest.mark.parametrize("corpus", ["mini", "mini_open"])
@pytest.mark.parametrize("name", ["dev", "eval"])
def test_an_unheard_voice_is_never_in_train(corpus: str, name: str) -> None:
    trained = {_base(voice) for voice in _voices(corpus, "train")}
    unheard = {_base(voice) for voice in _voices(corpus, name, mini.UNHEARD)}
    assert unheard
    assert not unheard & trained
    assert _voices(corpus, name, mini.HEARD) <= _voices(corpus, "train")


@pytest.mark.parametrize("corpus", ["mini", "mini_open"])
def test_dev_and_eval_have_unheard_voices_of_their_own(corpus: str) -> None:
    dev, held_out = ({_base(voice) for voice in _voices(corpus, name, mini.UNHEARD)} for name in ("dev", "eval"))
    assert not dev & held_out


@pytest.mark.parametrize("corpus", ["mini", "mini_open"])
@pytest.mark.parametrize("name", ["dev", "eval"])
def test_no_held_out_sentence_is_a_near_copy_of_a_training_one(
    texts: dict[str, dict[str, list[str]]], corpus: str, name: str
) -> None:
    train = set(texts[corpus]["train"])
    nearest = {text: sentences.nearest_distance(text, train) for text in texts[corpus][name]}
    assert len(nearest) == SIZES[corpus][name]  # and no sentence comes twice
    assert {text: distance for text, distance in nearest.items() if distance < 0.2} == {}


@pytest.mark.parametrize("corpus", ["mini", "mini_open"])
def test_no_eval_sentence_is_a_near_copy_of_a_dev_one(texts: dict[str, dict[str, list[str]]], corpus: str) -> None:
    assert all(sentences.far_from(text, texts[corpus]["dev"], 0.2) for text in texts[corpus]["eval"])


def test_the_open_sentences_are_over_a_thousand_and_no_set_shares_one(
    texts: dict[str, dict[str, list[str]]],
) -> None:
    sets = {name: set(lines) for name, lines in texts["mini_open"].items()}
    assert len(sets["train"]) >= 1000
    assert len(set.union(*sets.values())) == sum(map(len, sets.values()))


def test_open_sentences_come_round_again_evenly_and_in_another_order(
    texts: dict[str, dict[str, list[str]]],
) -> None:
    lines = texts["mini_open"]["train"]
    one_round = len(set(lines))
    first, second = lines[:one_round], lines[one_round : 2 * one_round]
    assert sorted(first) == sorted(second) == sorted(set(lines))
    assert first != second


def test_the_same_corpus_has_the_same_sentences(texts: dict[str, dict[str, list[str]]]) -> None:
    assert mini.texts_of(mini.mini_open()) == texts["mini_open"]
    assert mini.texts_of(mini.debug()) == texts["debug"]


@pytest.mark.parametrize("corpus", list(SIZES))
def test_a_plan_gives_each_utterance_an_id_that_begins_with_its_speaker(
    texts: dict[str, dict[str, list[str]]], tmp_path: Path, corpus: str
) -> None:
    for name, parts in mini.CORPORA[corpus]().parts.items():
        plan = mini._plan(f"{corpus}_{name}", parts, texts[corpus][name], tmp_path)
        assert len({planned.utt_id for planned in plan}) == SIZES[corpus][name]
        assert [planned.job.text for planned in plan] == texts[corpus][name]
        for planned in plan:
            assert planned.utt_id.startswith(f"{planned.job.voice.speaker}-{corpus}_{name}-")
            assert planned.job.path.name.startswith(f"{planned.utt_id}.")
            assert planned.job.voice in _voices(corpus, name, planned.group)


def test_another_sentence_under_the_same_id_is_another_sound(tmp_path: Path) -> None:
    part = (mini.Part(1, mini.KOKORO_DEV),)
    first, same, other = (mini._plan("x", part, [text], tmp_path)[0] for text in ("はい。", "はい。", "いいえ。"))
    assert first.utt_id == other.utt_id
    assert first.job.path == same.job.path != other.job.path


def test_every_voice_of_the_mini_corpus_speaks(texts: dict[str, dict[str, list[str]]], tmp_path: Path) -> None:
    plan = mini._plan("mini_train", mini.mini().parts["train"], texts["mini"]["train"], tmp_path)
    assert {planned.job.voice for planned in plan} == _voices("mini", "train")
    assert list(tmp_path.iterdir()) == []

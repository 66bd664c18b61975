"""Hotwords in the search: what is added adds up, and only where a word was heard."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
import torch

from speechllm.config.schema import ConvMlpProjector, DecodeConfig
from speechllm.decode.batched import Aids, Decoder
from speechllm.decode.bias import ROOT, Bias, BiasSettings, State, token_bytes
from speechllm.decode.hotwords import parse_hotwords
from speechllm.model.ctc import BLANK, KANA
from speechllm.model.speechllm import pad_frames

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from speechllm.decode.bias import UtteranceBias
    from speechllm.decode.hearing import Floats

WORDS = ("東京\tトウキョウ", "東京駅\tトウキョウエキ", "京都\tキョウト", "鷲尾\tワシオ", "天\tテン")
SETTINGS = BiasSettings(per_kana=2.0, most=8.0, limit=2.0, short=0.0, misplaced=0.4, unheard=3.0)
TOKENIZERS = {"pieces": tiny.tokenizer, "byte level": tiny.byte_level_tokenizer}


def heard(kana: str) -> Floats:
    """Return log posteriors of a recogniser that is sure of `kana`."""
    rows = []
    for char in kana:
        for symbol in (KANA.index(char) + 1, BLANK):
            row = np.full(len(KANA) + 1, 1e-6)
            row[symbol] = 1.0
            rows.append(np.log(row / row.sum()))
    return np.array(rows, dtype=np.float32)


def bias_of(
    words: Sequence[str] = WORDS, tokenizer: PreTrainedTokenizerFast | None = None, settings: BiasSettings = SETTINGS
) -> Bias:
    return Bias(parse_hotwords(words), tokenizer or tiny.tokenizer(), settings)


def after(bias: Bias, utterance: UtteranceBias, text: str, tokens: Sequence[int] | None = None) -> State:
    """Return where a text stands, written in these tokens or one byte at a time."""
    single = {piece: token for token, piece in enumerate(bias.bytes_of) if len(piece) == 1}
    state = utterance.start
    for token in [single[bytes([byte])] for byte in text.encode()] if tokens is None else tokens:
        state = utterance.next(state, token)
    return state


def pieces_after(bias: Bias, utterance: UtteranceBias, text: str) -> dict[bytes, float]:
    boosts = utterance.boosts(after(bias, utterance, text))
    return {bias.bytes_of[token]: gain for token, gain in boosts.items()}


def given_after(bias: Bias, utterance: UtteranceBias, text: str) -> float:
    return utterance.given(after(bias, utterance, text))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("kana", [None, "キョーワトーキョーエキカラキョートエイク", "ワシオトーキョートーキョー"])
def test_what_is_added_step_by_step_is_the_bonus_of_the_text(kind: str, kana: str | None) -> None:
    bias = bias_of(tokenizer=TOKENIZERS[kind]())
    utterance = bias.for_utterance(None if kana is None else heard(kana))
    vocabulary = range(len(bias.bytes_of) + 1)  # one more: heads have rows that no token has
    draw = random.Random(5)  # noqa: S311 - no secret
    most = 0.0
    for _ in range(6):
        state, total = utterance.start, 0.0
        for _ in range(12):
            boosts, back = utterance.boosts(state), utterance.taken_back(state)
            assert back <= 0
            for token in vocabulary:
                gain = utterance.given(utterance.next(state, token)) - utterance.given(state)
                assert gain == pytest.approx(back + boosts.get(token, 0.0))
            token = draw.choice(list(boosts) or vocabulary) if draw.random() < 0.95 else draw.choice(vocabulary)
            total += back + boosts.get(token, 0.0)
            state = utterance.next(state, token)
            assert utterance.given(state) == pytest.approx(total)
            most = max(most, total)
    assert most > 0


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_bonus_does_not_depend_on_the_tokens(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    bias = bias_of(tokenizer=tokenizer)
    utterance = bias.for_utterance(heard("トーキョーカラキョートエ"))
    text = "東京から京都へ"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert after(bias, utterance, text, whole).settled == after(bias, utterance, text).settled == 16.0


def test_a_word_that_breaks_off_loses_what_it_was_given() -> None:
    bias = bias_of()
    utterance = bias.for_utterance(heard("トーキョーエキ"))
    begun, left = (after(bias, utterance, text) for text in ("東", "東西"))
    assert (utterance.given(begun), utterance.given(left)) == (8.0, 0.0)
    assert utterance.taken_back(begun) == -8.0


def test_a_word_that_breaks_off_is_not_begun_again_where_it_was_heard_once() -> None:
    bias = bias_of(("東京\tトウキョウ",), settings=BiasSettings(misplaced=0.0))
    once, twice = (bias.for_utterance(heard(kana)) for kana in ("トーキョー", "トーキョートトーキョー"))
    assert pieces_after(bias, once, "東西") == {}
    assert given_after(bias, once, "東東") == 0.0
    assert given_after(bias, twice, "東東京") == 45.0
    assert given_after(bias, twice, "東東京東") == 45.0


def test_the_better_a_word_was_heard_and_the_longer_it_is_the_more_it_is_worth() -> None:
    def worth(word: str, kana: str) -> float:
        utterance = bias_of((word,)).for_utterance(heard(kana))
        return max(utterance.boosts(utterance.start).values(), default=0.0)

    assert worth("鷲尾\tワシオ", "ワシオサン") == pytest.approx(2.0 * 3)
    assert worth("冷泉\tレイゼイ", "レーゼーサン") == pytest.approx(2.0 * 4)
    assert worth("勅使河原\tテシガワラ", "テシガワラサン") == pytest.approx(8.0)  # the most
    assert worth("勅使河原\tテシガワラ", "テシガアラサン") == pytest.approx(2.0 * 5 * (1 - 1 / 2))
    assert worth("鷲尾\tワシオ", "ワキモト") == 0.0


def test_a_short_word_weighs_less_and_must_be_heard_better() -> None:
    def worth(word: str, kana: str, short: float) -> float:
        settings = dataclasses.replace(SETTINGS, short=short)
        utterance = bias_of((word,), settings=settings).for_utterance(heard(kana))
        return max(utterance.boosts(utterance.start).values(), default=0.0)

    assert worth("久我\tクガ", "クガツ", short=0.0) == pytest.approx(2.0 * 2)
    assert worth("久我\tクガ", "クガツ", short=0.2) == pytest.approx(2.0 * 2 * 0.6)
    assert worth("鷲尾\tワシオ", "ワシオ", short=0.2) == pytest.approx(2.0 * 3 * 0.8)
    assert worth("冷泉\tレイゼイ", "レーゼー", short=0.2) == pytest.approx(2.0 * 4)
    # one kana of three is wrong: 5/3 nats a kana, under a limit of 2 and over one of 2 * 0.8
    assert worth("七尾\tナナオ", "ナナオ", short=0.2) > worth("七尾\tナナオ", "ナラオ", short=0.0) > 0.0
    assert worth("七尾\tナナオ", "ナラオ", short=0.2) == 0.0
    assert worth("久我\tクガ", "クガツ", short=0.5) == 0.0


def test_short_words_lose_nothing_where_no_kana_are_heard() -> None:
    utterance = bias_of(("久我\tクガ",), settings=BiasSettings()).for_utterance(None)
    assert set(utterance.boosts(utterance.start).values()) == {3.0}


def test_a_word_that_was_not_heard_is_not_there() -> None:
    bias = bias_of()
    utterance = bias.for_utterance(heard("アシタワアメデス"))
    assert utterance.places == {}
    assert utterance.boosts(utterance.start) == {}
    assert bias.if_heard(heard("アシタワアメデス")) is None


def test_a_word_that_was_heard_is_there() -> None:
    bias = bias_of()
    there = [bias.if_heard(heard("ワシオサンデス")), bias.if_heard(None)]
    assert [len(one.places) for one in there if one is not None] == [1, len(WORDS)]


def test_a_word_has_its_weight_where_it_was_heard() -> None:
    bias = bias_of(("鷲尾\tワシオ",))
    utterance = bias.for_utterance(heard("アシタワワシオサンデス"))
    begins = "鷲".encode()[:1]  # no token of its own
    worths = [pieces_after(bias, utterance, text).get(begins, 0.0) for text in ("", "あし", "あした", "あしたは")]
    assert worths == pytest.approx([0.0, 6.0 * (1 - 0.8), 6.0 * (1 - 0.4), 6.0])


def test_a_word_is_not_written_more_often_than_it_was_heard() -> None:
    bias = bias_of(("鷲尾\tワシオ",))
    once, twice = (bias.for_utterance(heard(kana)) for kana in ("ワシオ", "ワシオトワシオ"))
    assert after(bias, once, "鷲尾鷲尾").settled == 6.0
    assert pieces_after(bias, once, "鷲尾") == {}
    assert after(bias, twice, "鷲尾と鷲尾").settled == 12.0


def test_a_word_inside_a_better_one_goes_but_one_that_sounds_alike_stays() -> None:
    words = ("二階堂\tニカイドウ", "海堂\tカイドウ", "仁開堂\tニカイドウ")
    bias = bias_of(words)
    utterance = bias.for_utterance(heard("ニカイドーサン"))
    assert {bias.trie.surfaces[word].decode() for word in utterance.places} == {"二階堂", "仁開堂"}
    alone = bias.for_utterance(heard("サンカイドーサン"))
    assert {bias.trie.surfaces[word].decode() for word in alone.places} >= {"海堂"}


def test_without_a_recogniser_every_word_is_worth_a_little_at_every_place() -> None:
    bias = bias_of()
    utterance = bias.for_utterance(None)
    for text in ("", "明日は"):
        assert set(pieces_after(bias, utterance, text).values()) == {3.0}


def test_tokens_that_begin_before_a_word_or_end_after_it_count() -> None:
    pieces = ["東", "京", "の", "は", "の東", "京は", "東京", "の東京は"]
    merges = [("の", "東"), ("京", "は"), ("東", "京"), ("の東", "京は")]
    bias = bias_of(("東京\tトウキョウ",), tiny.byte_pair_tokenizer([*pieces, "\n"], merges))
    utterance = bias.for_utterance(heard("トーキョーワ"))
    assert pieces_after(bias, utterance, "").keys() == {
        "東".encode(),
        "東京".encode(),
        "の東".encode(),
        "の東京は".encode(),
    }
    assert pieces_after(bias, utterance, "東").keys() >= {"京".encode(), "京は".encode()}
    assert utterance.next(after(bias, utterance, "東"), bias.bytes_of.index("京は".encode())).settled == 8.0


def test_a_character_that_is_a_token_is_not_begun_byte_by_byte() -> None:
    bias = bias_of()
    opening = pieces_after(bias, bias.for_utterance(heard("トーキョー")), "")
    assert opening.keys() == {"東".encode()} | {piece for piece in opening if piece.startswith("東".encode())}
    assert pieces_after(bias, bias.for_utterance(heard("ワシオ")), "") == {"鷲".encode()[:1]: 6.0}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_bytes_of_tokens_are_those_of_the_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    texts = token_bytes(tokenizer)
    for text in (*tiny.TEXTS, "𠮷野家で Café ☃"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(texts[token] for token in ids).decode() == text
    assert all(texts[token] == b"" for token in tokenizer.all_special_ids)


def test_a_special_token_breaks_a_word_off() -> None:
    bias = bias_of()
    utterance = bias.for_utterance(heard("トーキョー"))
    state = utterance.next(after(bias, utterance, "東"), 1)
    assert (state.node, utterance.given(state)) == (ROOT, 0.0)


@pytest.mark.parametrize("beam", [1, 3])
def test_the_search_writes_a_word_that_was_heard_and_no_other_text_changes(tmp_path: Path, beam: int) -> None:
    model = tiny.speech_llm(tiny.llama(tmp_path), "llama", ConvMlpProjector(stride=3, hidden=8)).eval()
    torch.manual_seed(3)
    frames = {str(number): 3 * torch.randn(count, tiny.WIDTH_H) for number, count in enumerate((12, 24, 18, 15))}
    durations = {key: len(one) / 50 for key, one in frames.items()}
    bias = bias_of(("今日\tキョウ",), model.lm.tokenizer, BiasSettings(per_kana=100.0, most=500.0))

    def fetch(keys: Sequence[str]) -> tuple[Tensor, list[int]]:
        return pad_frames([frames[key] for key in keys], tiny.CPU)

    def texts(kana: Sequence[str]) -> dict[str, str]:
        """Decode; the first of `kana` is heard in utterance 1, the second in all others."""

        def hear(_: Tensor, frames_b: Sequence[int]) -> list[Floats]:
            return [heard(kana[0] if count == len(frames["1"]) else kana[1]) for count in frames_b]

        aids = Aids(hear=hear, bias=bias.for_utterance)
        decoder = Decoder(model, DecodeConfig(beam=beam, extra_tokens=8, batch_size=3), aids)
        return {one.key: one.nbest[0].text for one in decoder.texts(durations, fetch)}

    plain = texts(("アメ", "アメ"))
    found = texts(("キョー", "アメ"))
    assert found["1"].startswith("今日")
    assert found["1"].count("今日") == 1
    assert not any(text.startswith("今日") for text in plain.values())
    assert {key: text for key, text in found.items() if key != "1"} == {k: t for k, t in plain.items() if k != "1"}


def test_a_list_of_which_nothing_was_heard_keeps_drafts_on(tmp_path: Path) -> None:
    model = tiny.speech_llm(tiny.llama(tmp_path), "llama", ConvMlpProjector(stride=3, hidden=8)).eval()
    torch.manual_seed(3)
    frames_eh = 3 * torch.randn(24, tiny.WIDTH_H)
    bias = bias_of(("今日\tキョウ",), model.lm.tokenizer)

    def run(aids: Aids) -> tuple[str, int, int]:
        """Return the text, its tokens, and the forwards that it took."""
        decoder = Decoder(model, DecodeConfig(extra_tokens=8), aids)
        (found,) = decoder.texts({"a": 0.48}, lambda _: pad_frames([frames_eh], tiny.CPU))
        return found.nbest[0].text, found.nbest[0].num_tokens, decoder.spent.forwards

    def hear(_: Tensor, frames_b: Sequence[int]) -> list[Floats]:
        return [heard("アメ") for _ in frames_b]

    text, _, forwards = run(Aids())
    ids = tuple(model.lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    helped = run(Aids(hear=hear, draft=lambda *_: [ids]))
    assert (helped[0], helped[2] < forwards) == (text, True)
    assert run(Aids(hear=hear, bias=bias.if_heard, draft=lambda *_: [ids])) == helped


def test_the_blank_of_a_tokenizer_is_a_blank() -> None:
    tokenizer = tiny.tokenizer()
    assert token_bytes(tokenizer)[tokenizer.get_vocab()["▁"]] == b" "

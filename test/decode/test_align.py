"""When words were said, and which were not heard: small posteriors whose right answer is plain, and tiny models."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
import torch

from speechllm.config.schema import ConvMlpProjector, CtcProjector, HeadsConfig
from speechllm.decode import align as aligning
from speechllm.decode.align import (
    DOUBTFUL_SUPPORT,
    align,
    fits,
    hear,
    is_doubtful,
    kana_log_probs,
    spoken,
    time_characters,
    time_words,
    words_of,
)
from speechllm.model.ctc import KANA, targets_of
from speechllm.model.heads import new_heads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

FRAME_S = 0.04
TEXT = "今日は11時です。"
KANA_OF_TEXT = "キョーワジューイチジデス"


def posteriors(marks: Mapping[int, str], num_frames: int) -> NDArray[np.float32]:
    """Return log probabilities [q k] that are sure: a kana on each marked frame, blanks on all others."""
    probs_qk = np.full((num_frames, len(KANA) + 1), 1e-6)
    for frame in range(num_frames):
        probs_qk[frame, targets_of(marks[frame])[0] if frame in marks else 0] = 1.0
    made: NDArray[np.float32] = np.log(probs_qk / probs_qk.sum(axis=1, keepdims=True)).astype(np.float32)
    return made


def every(kana: str, step: int, first: int = 2) -> dict[int, str]:
    return {first + step * index: char for index, char in enumerate(kana)}


def best_by_trying(log_probs_qk: NDArray[np.float32], symbols: Sequence[int]) -> float:
    """Return the score of the best path of all that spell `symbols`."""
    best = -math.inf
    for path in itertools.product(range(log_probs_qk.shape[1]), repeat=len(log_probs_qk)):
        runs = [symbol for symbol, _ in itertools.groupby(path)]
        if [symbol for symbol in runs if symbol] == list(symbols):
            best = max(best, sum(float(log_probs_qk[frame, symbol]) for frame, symbol in enumerate(path)))
    return best


@pytest.mark.parametrize("symbols", [[1], [1, 2], [1, 1], [2, 1, 2], [1, 1, 2], [2, 2, 2]])
def test_no_path_is_better_than_that_of_the_alignment(symbols: list[int]) -> None:
    for seed in range(5):
        log_probs_qk = np.log(np.random.default_rng(seed).dirichlet(np.ones(3), size=6)).astype(np.float32)
        path = [0] * 6
        for symbol, (first, end) in zip(symbols, align(log_probs_qk, symbols), strict=True):
            assert first < end
            path[first:end] = [symbol] * (end - first)
        runs = [symbol for symbol, _ in itertools.groupby(path) if symbol]
        assert runs == symbols
        score = sum(float(log_probs_qk[frame, symbol]) for frame, symbol in enumerate(path))
        assert score == pytest.approx(best_by_trying(log_probs_qk, symbols), abs=1e-5)


def test_two_kana_that_are_alike_have_a_blank_between_them() -> None:
    log_probs_qk = posteriors(dict.fromkeys(range(5), "マ"), 5)
    (first, end), (second, last) = align(log_probs_qk, targets_of("ママ"))
    assert (first, last) == (0, 5)
    assert second == end + 1


def test_a_text_too_long_for_its_sound_is_spread_evenly_and_doubtful() -> None:
    log_probs_qk = posteriors({}, 3)
    assert not fits(3, targets_of("ママ" * 2))
    assert align(log_probs_qk, targets_of("アイウエオカ")) == [(0, 0), (0, 1), (1, 2), (2, 2), (2, 2), (2, 3)]
    heard = hear(TEXT, log_probs_qk, 0.12)
    assert "".join(word.surface for word in heard) == TEXT
    assert all(0 <= word.start_s <= word.end_s <= 0.12 for word in heard)
    assert all(word.doubtful == bool(word.kana) for word in heard)


def test_a_sound_without_a_frame_and_a_text_without_a_word_give_plain_answers() -> None:
    none_qk = posteriors({}, 0)
    assert [(word.start_s, word.end_s) for word in hear("ああ", none_qk, 0.0)] == [(0.0, 0.0)]
    assert hear("", posteriors({}, 9), 0.36) == []
    assert align(none_qk, []) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("11月14日", [("11", "ジューイチ"), ("月", "ガツ"), ("14", "ジューヨッ"), ("日", "カ")]),
        ("16日へ", [("16", "ジューロク"), ("日", "ニチ"), ("へ", "エ")]),
        ("1,234円", [("1,234", "センニヒャクサンジューヨ"), ("円", "エン")]),
        ("ABC社は、", [("ABC", "エイビーシー"), ("社", "シャ"), ("は", "ワ"), ("、", "")]),
        ("東京 から", [("東京", "トーキョー"), (" ", ""), ("から", "カラ")]),
        ("!? 😀", [("!", ""), ("?", ""), (" ", ""), ("😀", "")]),
        ("", []),
    ],
)
def test_a_text_is_cut_into_words_that_are_read_as_the_whole_is(text: str, words: list[tuple[str, str]]) -> None:
    assert words_of(text) == words


def test_words_begin_where_their_kana_are_marked() -> None:
    marks = every(KANA_OF_TEXT, 4)
    words = time_words(TEXT, posteriors(marks, 60), 60 * FRAME_S, spoken_s=(0.0, 2.4))
    frames = sorted(marks)
    begins = {"今日": frames[0], "は": frames[3], "11": frames[4], "時": frames[9], "です": frames[10]}
    for word in words[:-1]:
        assert word.start_s == pytest.approx(begins[word.text] * FRAME_S)
        assert word.confidence > 0.99
    assert [word.text for word in words] == [*begins, "。"]
    assert words[-1].start_s == words[-1].end_s == words[-2].end_s


def test_a_pause_belongs_to_no_word() -> None:
    marks = {2: "キ", 4: "ョ", 6: "ー", 40: "ワ"}
    first, second = hear("今日は", posteriors(marks, 60), 2.4)
    assert first.end_s == pytest.approx(6 * FRAME_S + aligning.LONGEST_KANA_S)
    assert second.start_s > first.end_s + 1.0


def test_what_was_marked_in_the_silence_behind_the_speech_is_put_back_into_it() -> None:
    marks = every(KANA_OF_TEXT[:-2], 4) | {56: "デ", 58: "ス"}
    log_probs_qk = posteriors(marks, 60)
    log_probs_qk[46, targets_of("デ")[0]] = log_probs_qk[48, targets_of("ス")[0]] = -5.0
    late, right = (hear(TEXT, log_probs_qk, 2.4, spoken_s)[-2] for spoken_s in ((0.0, 2.4), (0.0, 2.0)))
    assert late.start_s == pytest.approx(56 * FRAME_S)
    assert right.start_s == pytest.approx(46 * FRAME_S)
    assert not right.doubtful  # it was heard, only marked late


def test_a_word_that_was_not_said_is_doubtful_and_its_neighbours_are_not() -> None:
    log_probs_qk = posteriors(every(KANA_OF_TEXT, 8), 110)
    assert not is_doubtful(hear(TEXT, log_probs_qk, 4.4))
    heard = hear("今日は東京11時です。", log_probs_qk, 4.4)
    assert [word.surface for word in heard if word.doubtful] == ["東京"]
    assert is_doubtful(heard)
    invented = next(word for word in heard if word.doubtful)
    assert invented.support < DOUBTFUL_SUPPORT
    by_text = {word.text: word.confidence for word in time_words("今日は東京11時です。", log_probs_qk, 4.4)}
    assert by_text["東京"] < 0.01
    assert by_text["今日"] > 0.9


def test_the_language_models_confidence_and_the_heads_are_averaged() -> None:
    log_probs_qk = posteriors(every(KANA_OF_TEXT, 4), 60)
    words = time_words(TEXT, log_probs_qk, 2.4, confidences=[0.25, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.09])
    assert words[0].confidence == pytest.approx(0.5, abs=0.01)
    assert words[1].confidence == pytest.approx(1.0, abs=0.01)
    assert words[-1].confidence == pytest.approx(0.09)  # a sign is not heard: the language model alone knows


def test_characters_of_a_kana_word_have_their_own_times_and_others_share_theirs() -> None:
    log_probs_qk = posteriors({2: "キ", 4: "ョ", 6: "ー", 8: "デ", 18: "ス"}, 30)
    timed = time_characters(hear("今日です", log_probs_qk, 1.2, (0.0, 1.2)))
    assert [char for char, _, _ in timed] == list("今日です")
    begins = [start_s for _, start_s, _ in timed]
    assert begins == pytest.approx([2 * FRAME_S, 5 * FRAME_S, 8 * FRAME_S, 18 * FRAME_S])
    assert all(one[2] <= other[1] for one, other in itertools.pairwise(timed))


def test_the_loud_part_of_a_sound_is_found() -> None:
    wave_s = np.zeros(32_000, dtype=np.float32)
    wave_s[8_000:24_000] = tiny.wave(16_000)
    first_s, last_s = spoken(wave_s)
    assert first_s == pytest.approx(0.5, abs=0.05)
    assert last_s == pytest.approx(1.5, abs=0.05)
    assert spoken(np.zeros(16_000, dtype=np.float32)) == (0.0, 1.0)
    assert spoken(np.zeros(5, dtype=np.float32))[0] == 0.0


def test_the_bridges_own_head_is_taken_or_the_one_beside_the_model(tmp_path: Path) -> None:
    lm = tiny.llama(tmp_path / "lm")
    frames_beh = torch.randn(2, 11, tiny.WIDTH_H, generator=torch.Generator().manual_seed(1))
    with_bridge = tiny.speech_llm(lm, "llama", CtcProjector(hidden=8)).eval()
    without = tiny.speech_llm(lm, "llama", ConvMlpProjector(hidden=8)).eval()
    torch.manual_seed(2)
    heads = new_heads(HeadsConfig(hidden=8), tiny.WIDTH_H, [], kana=True)
    assert heads.kana is not None
    heads.kana.eval()
    assert kana_log_probs(without, frames_beh, [11, 6]) is None
    own, other = (kana_log_probs(model, frames_beh, [11, 6], heads) for model in (with_bridge, without))
    assert own is not None
    assert other is not None
    for found in (own, other):
        assert [len(row) for row in found] == [6, 3]
        assert np.exp(found[1]).sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    alone = kana_log_probs(without, frames_beh[1:, :6], [6], heads)
    assert alone is not None
    assert other[1] == pytest.approx(alone[0], abs=1e-5)
    assert abs(own[0] - other[0]).max() > 0.01

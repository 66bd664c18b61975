"""The search: Hugging Face's greedy text, a beam that finds the best, and neighbours that do not matter."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch

from speechllm.config.schema import ConvMlpProjector, DecodeConfig
from speechllm.decode.batched import decode, max_tokens, to_text
from speechllm.decode.engine import search
from speechllm.decode.search import Hypothesis, Search
from speechllm.model.speechllm import SpeechLlm, Spliced, pad_frames

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from speechllm.model.lm import LanguageModel

FRAMES = (31, 6, 17, 24)
GREEDY = DecodeConfig(beam=1)
BEAM = DecodeConfig(beam=3)
END = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("lms")
    return {name: make(base / name) for name, make in tiny.LMS.items()}


@pytest.fixture(scope="module", params=tiny.LMS)
def model(folders: dict[str, Path], request: pytest.FixtureRequest) -> SpeechLlm:
    return speech_llm(folders, request.param)


def speech_llm(folders: dict[str, Path], name: str) -> SpeechLlm:
    """Return a model that ends some of its texts early and others late."""
    made = tiny.speech_llm(folders[name], name, ConvMlpProjector(stride=3, hidden=8)).eval()
    with torch.no_grad():
        head = made.lm.model.get_output_embeddings()
        head.weight[END] += 0.8 * head.weight[END].sign()
    return made


def rows() -> list[torch.Tensor]:
    torch.manual_seed(12)
    return [3 * torch.randn(count, tiny.WIDTH_H) for count in FRAMES]


def spliced(model: SpeechLlm, frames: Sequence[torch.Tensor]) -> Spliced:
    with torch.no_grad():
        return model.splice(*pad_frames(frames, tiny.CPU), None, pad_left=True)


def found(
    model: SpeechLlm, frames: Sequence[torch.Tensor], limits: Sequence[int], config: DecodeConfig, lm: Any = None
) -> list[list[Hypothesis]]:
    """Return the n-best of frames, with `lm` in the place of the model's own where given."""
    with torch.no_grad():
        own = model.questions(*pad_frames(frames, tiny.CPU))
        return search(lm or model.lm, model.question_start(), own, limits, config)


def assert_same(one: Hypothesis, other: Hypothesis) -> None:
    assert (one.tokens, one.ended) == (other.tokens, other.ended)
    assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@pytest.mark.parametrize(("fewest", "limit"), [(0, 1), (0, 12), (5, 12)])
def test_a_beam_of_one_is_hugging_faces_greedy_text(model: SpeechLlm, fewest: int, limit: int) -> None:
    start = spliced(model, rows())
    ours = found(model, rows(), [limit] * len(FRAMES), DecodeConfig(min_tokens=fewest))
    with torch.inference_mode():
        theirs = model.lm.model.generate(
            inputs_embeds=start.embeds_bld,
            attention_mask=start.mask_bl.long(),
            min_new_tokens=fewest or None,
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=0,
        )
    for (best,), ids in zip(ours, theirs.tolist(), strict=True):
        wanted = ids[: ids.index(END)] if END in ids else ids
        assert list(best.tokens) == wanted
        assert best.ended is (END in ids)


def test_the_tiny_models_end_some_texts_and_are_cut_in_others(folders: dict[str, Path]) -> None:
    ended = set()
    for name in tiny.LMS:
        model = speech_llm(folders, name)
        texts = found(model, rows(), [12] * len(FRAMES), GREEDY)
        ended |= {(len(best.tokens), best.ended) for (best,) in texts}
    assert {flag for _, flag in ended} == {True, False}
    assert len(ended) > 3


@pytest.mark.parametrize("at_once", [2, 3, 4])
@pytest.mark.parametrize("config", [GREEDY, BEAM], ids=["greedy", "beam"])
def test_a_batch_of_mixed_lengths_gives_each_utterance_the_texts_it_has_alone(
    model: SpeechLlm, config: DecodeConfig, at_once: int
) -> None:
    limits = [9, 12, 5, 7]
    together = found(model, rows(), limits, config.model_copy(update={"batch_size": at_once}))
    for frames_eh, limit, nbest in zip(rows(), limits, together, strict=True):
        (alone,) = found(model, [frames_eh], [limit], config)
        assert len(nbest) == len(alone) == config.beam
        for one, other in zip(nbest, alone, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("config", [GREEDY, BEAM], ids=["greedy", "beam"])
def test_other_neighbours_on_either_side_change_no_text(model: SpeechLlm, config: DecodeConfig) -> None:
    torch.manual_seed(13)
    others = [5 * torch.randn(count, tiny.WIDTH_H) for count in (9, 40)]
    mine = rows()[0]
    (alone,) = found(model, [mine], [8], config)
    for place, frames in enumerate(([mine, *others], [others[0], mine, others[1]], [*others, mine])):
        assert_same(found(model, frames, [8, 8, 8], config)[place][0], alone[0])


@pytest.mark.parametrize("config", [GREEDY, BEAM], ids=["greedy", "beam"])
def test_no_text_is_longer_than_its_bound(model: SpeechLlm, config: DecodeConfig) -> None:
    limits = [1, 2, 3, 4]
    for limit, nbest in zip(limits, found(model, rows(), limits, config), strict=True):
        for hypothesis in nbest:
            assert len(hypothesis.tokens) <= limit
            assert len(hypothesis.log_probs) == len(hypothesis.tokens) + hypothesis.ended


def test_log_probabilities_are_the_models_own(model: SpeechLlm) -> None:
    start = spliced(model, rows()[:1])
    ((best, *_),) = found(model, rows()[:1], [6], BEAM)
    assert best.log_probs == pytest.approx(scores_of(model.lm, start, (*best.tokens, *([END] * best.ended))), abs=1e-4)
    assert best.log_prob == pytest.approx(sum(best.log_probs))


def scores_of(lm: LanguageModel, start: Spliced, tokens: tuple[int, ...]) -> list[float]:
    """Return the log probability of each token after one start, from a forward pass over the whole."""
    embeds_bld = torch.cat([start.embeds_bld, lm.embed(tokens)[None]], dim=1)
    mask_bl = torch.ones(embeds_bld.shape[:2], dtype=torch.bool)
    with torch.inference_mode():
        log_probs_lv = lm.logits(lm.hidden(embeds_bld, mask_bl)[0]).log_softmax(dim=-1)
    first = start.embeds_bld.shape[1] - 1
    return [float(log_probs_lv[first + place, token]) for place, token in enumerate(tokens)]


def test_the_best_come_first(model: SpeechLlm) -> None:
    for penalty in (0.0, 1.0, -1.0):
        config = DecodeConfig(beam=3, length_penalty=penalty)
        for nbest in found(model, rows(), [6] * len(FRAMES), config):
            order = [(hypothesis.ended, hypothesis.rank(penalty)) for hypothesis in nbest]
            assert order == sorted(order, reverse=True)
            assert len({hypothesis.tokens for hypothesis in nbest if hypothesis.ended}) == sum(
                hypothesis.ended for hypothesis in nbest
            )


class TinyVocabulary:
    """A language model of four tokens whose end is token 2, cut out of a tiny Llama."""

    ids = (5, 6, END, 7)

    def __init__(self, lm: LanguageModel, sharpness: float) -> None:
        self.model, self.tokenizer, self.lm, self.sharpness = lm.model, lm.tokenizer, lm, sharpness
        self.embed = lm.embed

    def logits(self, hidden_xd: torch.Tensor) -> torch.Tensor:
        scores_xv = self.lm.logits(hidden_xd)
        allowed = torch.full_like(scores_xv, -1e4)
        allowed[..., list(self.ids)] = self.sharpness * scores_xv[..., list(self.ids)]
        return allowed


def brute_force(lm: TinyVocabulary, start: Spliced, limit: int, penalty: float) -> tuple[int, ...]:
    """Return the best of all texts: those that end before the bound, and those that the bound cuts."""
    words = [token for token in lm.ids if token != END]
    ended = [(*text, END) for size in range(limit) for text in itertools.product(words, repeat=size)]
    cut = list(itertools.product(words, repeat=limit))
    sizes = {len(text) for text in (*ended, *cut)}
    ranks: dict[tuple[int, ...], float] = {}
    for size in sizes:
        texts = [text for text in (*ended, *cut) if len(text) == size]
        embeds_bld = torch.cat(
            [start.embeds_bld.expand(len(texts), -1, -1), torch.stack([lm.lm.embed(text) for text in texts])], dim=1
        )
        with torch.inference_mode():
            hidden_bld = lm.lm.hidden(embeds_bld, torch.ones(embeds_bld.shape[:2], dtype=torch.bool))
            log_probs_btv = lm.logits(hidden_bld[:, -size - 1 : -1]).log_softmax(dim=-1)
        chosen = log_probs_btv.gather(2, torch.tensor(texts)[..., None])[..., 0].sum(dim=1)
        ranks |= {text: float(score) / size**penalty for text, score in zip(texts, chosen, strict=True)}
    return max(ranks, key=ranks.__getitem__)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("sharpness", [0.05, 0.3, 1.0])
def test_a_beam_of_three_finds_the_best_of_all_short_texts(
    folders: dict[str, Path], sharpness: float, penalty: float
) -> None:
    model = speech_llm(folders, "llama")
    lm = TinyVocabulary(model.lm, sharpness)
    config = DecodeConfig(beam=3, length_penalty=penalty)
    for frames_eh in rows():
        start = spliced(model, [frames_eh])
        ((best, *_),) = found(model, [frames_eh], [3], config, lm)
        assert (*best.tokens, *([END] * best.ended)) == brute_force(lm, start, 3, penalty)


@pytest.mark.parametrize(
    ("live", "penalty", "done"),
    [
        ([-1.0], 0.0, False),  # may still end better than all three
        ([-6.5, -9.0], 0.0, False),  # may still be the third
        ([-7.0], 0.0, True),  # a longer text only loses
        ([-30.0], 1.0, False),  # ten tokens at -30 rank above -7 / 2
        ([-35.0], 1.0, True),
        ([], 0.0, True),
    ],
)
def test_a_search_ends_when_no_live_text_can_come_among_the_best(
    live: list[float], penalty: float, *, done: bool
) -> None:
    config = DecodeConfig(beam=3, length_penalty=penalty)
    utterance = Search(
        max_tokens=10,
        config=config,
        end=END,
        live=[Hypothesis((5,), (score,), ended=False) for score in live],
        finished=[Hypothesis((6,), (score / 2, score / 2), ended=True) for score in (-5.0, -7.0, -6.0)],
    )
    assert utterance.done() is done
    wider = replace(utterance, config=config.model_copy(update={"beam": 4}))
    assert wider.done() is (not live)


def test_a_finished_text_is_ranked_by_its_tokens_to_the_power_of_the_penalty() -> None:
    hypothesis = Hypothesis((5, 6), (-1.0, -2.0, -3.0), ended=True)
    assert [hypothesis.rank(penalty) for penalty in (0.0, 1.0, 2.0)] == pytest.approx([-6.0, -2.0, -6 / 9])


@pytest.mark.parametrize(("duration_s", "bound"), [(0.0, 20), (0.14, 21), (0.15, 22), (3.0, 50)])
def test_the_bound_grows_with_the_sound(duration_s: float, bound: int) -> None:
    assert max_tokens(DecodeConfig(tokens_per_s=10, extra_tokens=20), duration_s) == bound


def test_a_text_is_one_line_without_special_tokens(folders: dict[str, Path]) -> None:
    model = speech_llm(folders, "llama")
    ids = model.lm.tokenizer(" 今日は\n\n 雨　です ", add_special_tokens=False)["input_ids"]
    text = to_text(model, Hypothesis((*ids, 1), tuple([-0.5] * (len(ids) + 2)), ended=True))
    assert (text.text, text.log_prob, text.num_tokens) == ("今日は 雨 です", -0.5 * (len(ids) + 2), len(ids) + 2)
    assert text.ended
    assert text.confidence == pytest.approx(math.exp(-0.5))
    assert "".join(text.pieces) == " 今日は\n\n 雨　です "
    assert text.probs == pytest.approx([math.exp(-0.5)] * (len(ids) + 1), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 9])
def test_utterances_are_decoded_the_long_ones_first_whatever_the_batch(
    folders: dict[str, Path], batch_size: int
) -> None:
    model = speech_llm(folders, "llama")
    frames = dict(zip("dbca", rows(), strict=True))
    durations = {key: len(matrix) / 50 for key, matrix in frames.items()}
    asked: list[list[str]] = []

    def fetch(utt_ids: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
        asked.append(list(utt_ids))
        return pad_frames([frames[key] for key in utt_ids], tiny.CPU)

    config = DecodeConfig(batch_size=batch_size, extra_tokens=6)
    texts = decode(model, durations, fetch, config)
    assert list(itertools.chain(*asked)) == ["d", "a", "c", "b"]
    for key, matrix in frames.items():
        limit = max_tokens(config, durations[key])
        ((alone,),) = found(model, [matrix], [limit], config)
        assert texts[key][0].text == to_text(model, alone).text
        assert math.isclose(texts[key][0].log_prob, alone.log_prob, abs_tol=1e-3)

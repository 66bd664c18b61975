"""The decoder's rows: refilled, halved when the memory is full, mended when a text loops, sped up by drafts."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch

from speechllm.config.schema import ConvMlpProjector, DecodeConfig
from speechllm.decode.engine import Engine, Found, Job, _Listed
from speechllm.decode.guard import Repeats
from speechllm.decode.search import Candidate, Search
from speechllm.errors import ModelError
from speechllm.model.slots import Slots
from speechllm.model.speechllm import pad_frames

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from speechllm.model.speechllm import SpeechLlm

LENGTHS = (31, 6, 17, 24, 12, 40, 9)
LIMITS = (9, 3, 14, 5, 11, 2, 7)
END = 2
NEVER = -1


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SpeechLlm:
    folder = tiny.LMS[request.param](tmp_path_factory.mktemp(request.param))
    return tiny.speech_llm(folder, request.param, ConvMlpProjector(stride=3, hidden=8)).eval()


@torch.no_grad()
def jobs(model: SpeechLlm, drafts: Sequence[tuple[int, ...]] | None = None) -> list[Job]:
    torch.manual_seed(12)
    frames = [3 * torch.randn(count, tiny.WIDTH_H) for count in LENGTHS]
    own = model.questions(*pad_frames(frames, tiny.CPU))
    drafted = drafts or [()] * len(own)
    return [Job(str(n), *parts) for n, parts in enumerate(zip(own, LIMITS, [None] * len(own), drafted, strict=True))]


def engine(model: SpeechLlm, *, end: int = END, **fields: Any) -> Engine:
    with torch.no_grad():
        made = Engine(model.lm, model.question_start(), DecodeConfig(**{"mend_loops": False, **fields}))
    made.end = end
    return made


def run(made: Engine, given: Sequence[Job]) -> dict[str, Found]:
    return {found.key: found for found in made.run(_Listed(deque(given)))}


def tokens(found: dict[str, Found]) -> dict[str, tuple[int, ...]]:
    return {key: one.nbest[0].tokens for key, one in sorted(found.items())}


@pytest.mark.parametrize("at_once", [1, 3, 7, 32])
def test_no_row_is_computed_that_no_text_needs(model: SpeechLlm, at_once: int) -> None:
    made = engine(model, end=NEVER, batch_size=at_once)
    found = run(made, jobs(model))
    assert {key: len(text) for key, text in tokens(found).items()} == {str(n): limit for n, limit in enumerate(LIMITS)}
    assert made.spent.rows == made.spent.needed == sum(LIMITS)
    assert made.spent.forwards >= -(-sum(LIMITS) // at_once)


def test_rows_are_filled_again_as_soon_as_an_utterance_ends(model: SpeechLlm) -> None:
    made = engine(model, end=NEVER, batch_size=3)
    run(made, jobs(model))
    waves = [LIMITS[start : start + 3] for start in range(0, len(LIMITS), 3)]
    assert made.spent.forwards < sum(map(max, waves))  # what whole batches one after another take


def full_memory(monkeypatch: pytest.MonkeyPatch, most: int, kind: type[RuntimeError] = RuntimeError) -> list[int]:
    """Let a forward of more than `most` rows run out of memory; return the rows of those that did not."""
    whole, fitted = Slots.read, list[int]()

    def read(self: Slots, embeds_nd: torch.Tensor, more: Sequence[int], new: Sequence[int]) -> torch.Tensor:
        if len(more) + len(new) > most:
            raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 68719476736 bytes")
        fitted.append(len(more) + len(new))
        return whole(self, embeds_nd, more, new)

    monkeypatch.setattr(Slots, "read", read)
    return fitted


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_where_the_memory_is_full_half_as_many_go_on_and_no_text_changes(
    model: SpeechLlm, monkeypatch: pytest.MonkeyPatch, kind: type[RuntimeError]
) -> None:
    wanted = tokens(run(engine(model, batch_size=7), jobs(model)))
    fitted = full_memory(monkeypatch, 2, kind)
    made = engine(model, batch_size=7)
    assert tokens(run(made, jobs(model))) == wanted
    assert made.spent.halved == 2
    assert max(fitted[2:]) == 1  # 7, 3, 1


def test_no_utterance_is_lost_where_the_memory_is_full_while_others_are_prepared(model: SpeechLlm) -> None:
    class Feed(_Listed):
        taken = 0
        shrunk = 0

        def take(self) -> Job | None:
            self.taken += 1
            if self.taken in {3, 9}:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().take()

        def shrink(self) -> None:
            self.shrunk += 1

    feed, made = Feed(deque(jobs(model))), engine(model, batch_size=7)
    found = {one.key: one for one in made.run(feed)}
    assert tokens(found) == tokens(run(engine(model), jobs(model)))
    assert feed.shrunk == made.spent.halved == 2


def test_a_memory_that_holds_no_utterance_ends_in_one_line(model: SpeechLlm, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(model, batch_size=7)
    slots = made._begin()
    monkeypatch.setattr(made, "_begin", lambda: slots)  # what all share still fits
    full_memory(monkeypatch, 0)
    with pytest.raises(ModelError, match=r"^decode: the memory does not hold one utterance; set decode\.beam lower"):
        run(made, jobs(model))


def test_other_faults_of_torch_are_not_taken_for_a_full_memory(
    model: SpeechLlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_given: object) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    made = engine(model)
    monkeypatch.setattr(Slots, "read", broken)
    monkeypatch.setattr(made, "_begin", lambda: Slots(model.lm))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(made, jobs(model))


def drafts_of(texts: dict[str, tuple[int, ...]], how: str) -> list[tuple[int, ...]]:
    made = []
    for text in texts.values():
        wrong = tuple((token + 1) % 40 for token in text)
        half = len(text) // 2
        kinds = {"right": text, "wrong": wrong, "half": (*text[:half], *wrong[half:]), "long": (*text, *text, *text)}
        kinds |= {
            "one more": (*text[:half], 7, *text[half:]),
            "one less": (*text[:half], *text[half + 1 :]),
            "none": (),
        }
        made.append(kinds[how])
    return made


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("how", ["right", "wrong", "half", "long", "one more", "one less"])
def test_a_draft_changes_no_text_and_saves_forwards_where_it_is_right(model: SpeechLlm, how: str, at_once: int) -> None:
    plain = engine(model, batch_size=at_once)
    texts = tokens(run(plain, jobs(model)))
    assert sum(map(len, texts.values())) > 20
    helped = engine(model, batch_size=at_once)
    found = run(helped, jobs(model, drafts_of(texts, how)))
    assert tokens(found) == texts
    if how in {"right", "long"}:
        assert helped.spent.forwards < plain.spent.forwards / 2
    for key, one in run(engine(model, batch_size=at_once), jobs(model)).items():
        assert found[key].nbest[0].log_probs == pytest.approx(one.nbest[0].log_probs, abs=1e-4)


@pytest.mark.parametrize("beam", [1, 3])
def test_a_model_that_is_not_finite_any_more_gives_empty_texts(
    model: SpeechLlm, monkeypatch: pytest.MonkeyPatch, beam: int
) -> None:
    whole = type(model.lm).logits
    monkeypatch.setattr(type(model.lm), "logits", lambda lm, hidden_xd: whole(lm, hidden_xd) * torch.nan)
    found = run(engine(model, beam=beam), jobs(model))
    assert set(tokens(found).values()) == {()}
    assert not any(one.nbest[0].ended for one in found.values())


def test_a_beam_takes_no_draft(model: SpeechLlm) -> None:
    texts = tokens(run(engine(model, beam=3), jobs(model)))
    assert tokens(run(engine(model, beam=3), jobs(model, drafts_of(texts, "wrong")))) == texts


LOOPING = ((5, 6, 7) * 5, (9,) * 13, (4, *((8, 8, 3, 2) * 5)), tuple(range(20, 44)) * 5)
HONEST = ((5, 6, 7) * 4, (9,) * 12, (), (1, 2, 3), tuple(range(40)), (*((5, 6) * 9), 7))


@pytest.mark.parametrize("text", LOOPING)
def test_what_repeats_itself_is_seen(text: tuple[int, ...]) -> None:
    assert Repeats(text).too_many()
    assert not Repeats(text[:-1]).too_many()
    assert Repeats(text[:-1]).next_ones() == [text[-1]]


@pytest.mark.parametrize("text", HONEST)
def test_what_people_say_is_no_loop(text: tuple[int, ...]) -> None:
    assert not Repeats(text).too_many()


def test_a_text_that_loops_is_decoded_again_and_flagged(model: SpeechLlm, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = (5, 6, 7)

    def stuck(self: Engine, work: Sequence[Any], log_probs_xv: torch.Tensor) -> Iterator[list[Candidate]]:
        """Propose the next token of the loop, then one that leaves it, whatever the model says."""
        del log_probs_xv
        for entry in work:
            (hypothesis,) = entry.search.live
            wanted = [loop[len(hypothesis.tokens) % 3], 11, self.end]
            banned = entry.search.changes(hypothesis)
            yield [Candidate(0, token, -1.0 - place) for place, token in enumerate(wanted) if token not in banned]

    monkeypatch.setattr(Engine, "_candidates", stuck)
    given = [Job("a", jobs(model)[0].embeds_ld, 60)]
    found = run(engine(model, mend_loops=True), given)["a"]
    assert found.looped
    assert found.nbest[0].tokens[:15] == (*(loop * 4), 5, 6, 11)
    unmended = run(engine(model, mend_loops=False), given)["a"]
    assert not unmended.looped
    assert unmended.nbest[0].tokens == loop * 20


def test_hotwords_count_in_the_search_and_not_in_the_log_probability() -> None:
    class Word:
        """One word of one token, worth 3 nats, taken back when the text does not go on with 8."""

        start = "nowhere"

        def boosts(self, state: str) -> dict[int, float]:
            return {"nowhere": {7: 3.0}, "begun": {8: 3.0}}.get(state, {})

        def taken_back(self, state: str) -> float:
            return -3.0 if state == "begun" else 0.0

        def next(self, state: str, token: int) -> str:
            return {("nowhere", 7): "begun", ("begun", 8): "whole"}.get((state, token), "nowhere")

    def of(log_probs: dict[int, float]) -> list[Candidate]:
        boosts = search.changes(search.live[0])
        return [Candidate(0, token, value, boosts.get(token, 0.0)) for token, value in log_probs.items()]

    search = Search(10, DecodeConfig(), END, Word())  # type: ignore[arg-type] # stands in for hotwords
    search.advance(of({7: -4.0, 5: -2.0}))
    assert (search.live[0].tokens, search.live[0].bonus, search.live[0].log_prob) == ((7,), 3.0, -4.0)
    search.advance(of({8: -4.5, 5: -2.0}))
    assert (search.live[0].tokens, search.live[0].bonus) == ((7, 8), 3.0)
    search.live[0] = search.live[0].__class__((7,), (-4.0,), ended=False, bonus=3.0, state="begun")  # type: ignore[arg-type]
    search.advance(of({8: -9.0, 5: -2.0}))
    assert (search.live[0].tokens, search.live[0].bonus) == ((7, 5), 0.0)

"""Steps with fixed sizes, as a CUDA graph records them; here they are run instead of recorded."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import pytest
import tiny
import torch

from speechllm.config.schema import ConvMlpProjector, DecodeConfig
from speechllm.decode.engine import Engine, Job, _Listed
from speechllm.model.graphs import Graphs
from speechllm.model.speechllm import pad_frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from speechllm.decode.engine import Found
    from speechllm.model.slots import Slots
    from speechllm.model.speechllm import SpeechLlm

LENGTHS = (31, 6, 17, 24, 12, 40, 9)


@pytest.fixture(scope="module", params=tiny.LMS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SpeechLlm:
    folder = tiny.LMS[request.param](tmp_path_factory.mktemp(request.param))
    return tiny.speech_llm(folder, request.param, ConvMlpProjector(stride=3, hidden=8)).eval()


def texts(model: SpeechLlm, record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None) -> dict[str, Found]:
    """Return what is found with steps that `record` has made; None decodes the plain way."""
    torch.manual_seed(12)
    with torch.no_grad():
        own = model.questions(*pad_frames([3 * torch.randn(n, tiny.WIDTH_H) for n in LENGTHS], tiny.CPU))
        engine = Engine(model.lm, model.question_start(), DecodeConfig(batch_size=4, mend_loops=False))
    engine.end = -1
    begin = engine._begin
    if record is not None:

        def begun() -> Slots:
            slots = begin()
            slots.graphs = Graphs(slots, record)
            return slots

        engine._begin = begun  # type: ignore[method-assign]
    jobs = [Job(str(number), vectors_ld, 5 + 11 * number) for number, vectors_ld in enumerate(own)]
    return {found.key: found for found in engine.run(_Listed(deque(jobs)))}


def test_steps_of_fixed_sizes_give_the_same_texts(model: SpeechLlm) -> None:
    sizes, runs = list[int](), list[int]()

    def record(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def again() -> Tensor:
            states_rd = work()
            runs.append(len(states_rd))
            return states_rd

        sizes.append(len(work()))
        return again

    plain, recorded = texts(model, None), texts(model, record)
    for key, one in plain.items():
        assert recorded[key].nbest[0].tokens == one.nbest[0].tokens
        assert recorded[key].nbest[0].log_probs == pytest.approx(one.nbest[0].log_probs, abs=1e-4)
    assert set(sizes) == {1, 2, 4}  # three rows use the graph of four
    assert len(runs) > 60
    assert len(sizes) < 10  # a graph is recorded anew only when the store has moved


@pytest.mark.parametrize("fault", ["off", "refused"])
def test_a_graph_that_is_off_or_cannot_be_recorded_is_never_used(
    model: SpeechLlm, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    calls = []

    def record(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        calls.append(fault)
        if fault == "refused":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: work() + 1

    found = texts(model, record)
    assert {key: one.nbest[0].tokens for key, one in found.items()} == {
        key: one.nbest[0].tokens for key, one in texts(model, None).items()
    }
    assert calls == [fault]
    assert "decode without CUDA graphs" in caplog.text

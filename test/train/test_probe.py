"""Memory is tried before the first step; blocks that are computed twice or compiled train the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiny
import torch

from speechllm.data.dataset import FeatureSet
from speechllm.errors import ConfigError, is_out_of_memory
from speechllm.model.assemble import assemble, origin_of
from speechllm.train.distributed import ALONE, World
from speechllm.train.probe import check_memory
from speechllm.train.run import _prepared
from speechllm.train.tasks import Features, SpeechTask

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from speechllm.train.task import Outcome
    from speechllm.train.tasks import Ready

IDS = [f"u{number}" for number in range(9)]
ROOM = 70  # positions


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("probe")
    texts = {key: tiny.TEXTS[number % len(tiny.TEXTS)] for number, key in enumerate(IDS)}
    return tiny.llama(base / "lm"), tiny.feature_folder(base / "set", texts, dict.fromkeys(IDS, 20))


def made(folders: tuple[Path, Path], dropout: float = 0.3, **train: object) -> SpeechTask:
    lm, data = folders
    config = tiny.config(lm, lm, train={"packing": True, **train}, lora={"rank": 4, "dropout": dropout})
    model = _prepared(config, assemble(config, origin_of(config, tiny.WIDTH_H, "fp", tiny.TEXTS), "float32"))
    features = Features(config, FeatureSet(data), FeatureSet(data), tiny.CPU)
    return SpeechTask(features, model, lambda ids: dict.fromkeys(ids, ""), lambda _refs, _hyps: 0.0)


class Small(SpeechTask):
    """A task on a machine that holds `ROOM` positions."""

    error: type[Exception] = torch.OutOfMemoryError

    def loss(self, ready: Ready) -> Outcome:
        if self.positions(ready.utt_ids) > ROOM:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().loss(ready)


def test_what_fits_is_let_through_and_leaves_no_gradient(folders: tuple[Path, Path]) -> None:
    task = made(folders, batch_tokens=500)
    check_memory(task, ALONE)
    assert all(value.grad is None for value in task.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_what_does_not_fit_is_refused_with_a_budget_that_does(
    folders: tuple[Path, Path], error: type[Exception]
) -> None:
    task = made(folders, batch_tokens=500)
    task.__class__ = Small
    task.error = error  # type: ignore[attr-defined]
    batch = max(task.batches(0), key=task.positions)
    fitting = max(count for count in range(1, len(batch)) if task.positions(batch[:count]) <= ROOM)
    with pytest.raises(ConfigError) as refused:
        check_memory(task, ALONE)
    assert str(refused.value) == (
        f"train.batch_tokens: is 500, and a batch of {task.positions(batch)} positions does not fit the memory; "
        f"set it to {task.positions(batch[: int(0.9 * fitting)])}, which does, "
        "or train.checkpointing to true, or take a larger card"
    )


def test_in_lockstep_nothing_smaller_is_tried(folders: tuple[Path, Path]) -> None:
    task = made(folders, batch_tokens=500)
    task.__class__ = Small
    with pytest.raises(ConfigError, match="does not fit the memory; lower it, or"):
        check_memory(task, World(0, 2, lockstep=True))


def test_other_errors_are_not_taken_for_a_lack_of_memory(folders: tuple[Path, Path]) -> None:
    task = made(folders)
    task.__class__ = Small
    task.error = ValueError  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="out of memory"):
        check_memory(task, ALONE) if max(map(task.positions, task.batches(0))) > ROOM else pytest.fail("too small")
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def gradients(task: SpeechTask, seed: int = 3) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(seed)
    outcome = task.loss(task.prepare(IDS, 0))
    outcome.nll.backward()  # type: ignore[no-untyped-call]
    found = {name: value.grad for name, value in task.model.named_parameters() if value.grad is not None}
    return float(outcome.nll.detach()), found


def test_blocks_that_are_computed_twice_have_the_same_gradients_to_the_bit(folders: tuple[Path, Path]) -> None:
    plain, twice = gradients(made(folders)), gradients(made(folders, checkpointing=True))
    assert plain[0] == twice[0]
    assert plain[1].keys() == twice[1].keys()
    assert all(torch.equal(value, twice[1][name]) for name, value in plain[1].items())


def test_blocks_that_are_computed_twice_keep_less(folders: tuple[Path, Path]) -> None:
    kept = []
    for checkpointing in (False, True):
        task = made(folders, checkpointing=checkpointing)
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, seen: dict[int, int] = storages) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outcome = task.loss(task.prepare(IDS, 0))
        kept.append(sum(storages.values()))
        del outcome
    assert kept[1] < 0.6 * kept[0]


# torch's compiler hides its own warnings while it looks at tensors, but not from a filter that makes them errors
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradients(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # the graphs are what is ours to get right; making machine code of them takes minutes on a CPU
    whole = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, *, dynamic: whole(self, dynamic=dynamic, backend="aot_eager")
    )
    plain, compiled = gradients(made(folders, 0.0)), gradients(made(folders, 0.0, compile=True))
    assert compiled[0] == pytest.approx(plain[0], rel=1e-5)
    assert plain[1].keys() == compiled[1].keys()  # names too: saved states fit
    for name, value in plain[1].items():
        torch.testing.assert_close(compiled[1][name], value, rtol=1e-3, atol=1e-4)

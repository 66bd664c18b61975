"""Two processes that hold half of every block each train and decode as one that holds all of them."""

from __future__ import annotations

import gc
import json
import os
import time
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from speechllm.config.schema import ConvMlpProjector, DecodeConfig
from speechllm.decode.batched import decode
from speechllm.errors import ConfigError
from speechllm.model.speechllm import pad_frames
from speechllm.train import distributed
from speechllm.train.distributed import ALONE, Gradients, World
from speechllm.train.launch import _free_port
from speechllm.train.sharded import blocks_of, shard_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from speechllm.model.speechllm import SpeechLlm

pytestmark = pytest.mark.slow

TIME_LIMIT_S = 300
SIZE = 2
FRAMES = (40, 7, 61, 23, 12)  # of each utterance; the tiny sliding windows are of 8 positions
BATCHES = ((0, 1), (2,), (3, 4))
# batches, and whether their rows are packed; one step has fewer batches than there are processes
STEPS = {"padded": (BATCHES[:2], False), "single": (BATCHES[2:], True), "checkpointed": (BATCHES[1:], True)}
LR = 1e-3
BFLOAT16 = "-bfloat16"  # behind the name of a family: its frozen weights are rounded, the adapter stays float32
CASES = ("gemma3", "gpt_neox", "qwen3", "llama" + BFLOAT16)
SEARCH = DecodeConfig(beam=2, batch_size=3, extra_tokens=6, tokens_per_s=1.0)


@dataclass
class Life:
    """What a short training leaves behind."""

    tensors: dict[str, Tensor]
    """Losses, gradients of each step, and what was trained in the end."""
    texts: dict[str, dict[str, str]]
    held_bytes: int
    """Of the frozen weights of the blocks, those in this process's memory."""
    whole_copies: int
    """Weights of the feed-forward layers that are in memory as a whole between two steps."""
    names: list[str]
    recomputed: int
    """Feed-forward layers of the first block that were begun in a step with activation checkpointing."""


def model_of(folder: Path, case: str) -> SpeechLlm:
    """Return a model that ends some texts early."""
    name = case.removesuffix(BFLOAT16)
    made: SpeechLlm = tiny.speech_llm(folder / name, name, ConvMlpProjector(stride=3, hidden=8))
    with torch.no_grad():
        end = made.lm.tokenizer.eos_token_id
        head = made.lm.model.get_output_embeddings()
        head.weight[end] += 0.8 * head.weight[end].sign()
    if case != name:
        for parameter in made.lm.model.parameters():
            parameter.data = parameter.data.bfloat16() if not parameter.requires_grad else parameter.data
    return made


def frames_of(utterances: Sequence[int]) -> tuple[Tensor, list[int]]:
    drawn = [
        3 * torch.randn(FRAMES[one], tiny.WIDTH_H, generator=torch.Generator().manual_seed(one)) for one in utterances
    ]
    return pad_frames(drawn, tiny.CPU)


def texts_of(model: SpeechLlm, shift: float = 0.0) -> dict[str, str]:
    def fetch(utt_ids: Sequence[str]) -> tuple[Tensor, list[int]]:
        frames_beh, frames_b = frames_of([int(utt_id) for utt_id in utt_ids])
        return frames_beh + shift, frames_b

    durations = {str(index): count / 10 for index, count in enumerate(FRAMES)}
    return {key: best[0].text for key, best in decode(model, durations, fetch, SEARCH).items()}


def step(model: SpeechLlm, batches: Sequence[Sequence[int]], world: World, *, packing: bool) -> Tensor:
    """Leave the gradients of `batches` in the parameters, as the loop does; return summed loss and tokens."""
    model.train()
    nll, tokens = 0.0, 0.0
    for number, weight in replace(world, lockstep=True).share(batches):
        batch = batches[number]
        compute = model.packed_loss if packing else model.loss
        loss, count = compute(*frames_of(batch), [tiny.TEXTS[one] for one in batch])
        (weight * loss).backward()  # type: ignore[no-untyped-call]
        nll += weight * float(loss.detach())
        tokens += weight * count
    Gradients(world, [parameter for parameter in model.parameters() if parameter.requires_grad]).add_up()
    return world.add_up(torch.tensor([nll, tokens], dtype=torch.float64))


def live(model: SpeechLlm, world: World) -> Life:
    """Return what is left of a model that decodes, trains a little, and decodes again."""
    blocks: list[Any] = blocks_of(model.lm.model.base_model)
    calls: list[str] = []
    kind = "before"
    blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(kind))
    model.load_trainable({name: 1.1 * value for name, value in model.trainable_state().items()})
    texts = {"before": texts_of(model)}
    seen: dict[str, Tensor] = {}
    for kind, (batches, packing) in STEPS.items():
        if kind == "checkpointed":
            model.lm.model.activation_checkpointing_enable()
        seen |= gradients(model, batches, world, kind, packing=packing)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= LR * parameter.grad
        model.zero_grad(set_to_none=True)
    seen |= {f"state {name}": value.clone() for name, value in model.trainable_state().items()}
    recomputed = calls.count("checkpointed")
    texts["after"] = texts_of(model)
    texts["led astray"] = texts_of(model, shift=3.0 * world.rank)
    seen |= gradients(model, BATCHES, world, "uneven", packing=True)
    model.zero_grad(set_to_none=True)
    frozen = [value for block in blocks for value in block.parameters() if not value.requires_grad]
    held = sum(local_of(value).untyped_storage().nbytes() for value in frozen)
    return Life(seen, texts, held, whole_copies(), [name for name, _ in model.named_parameters()], recomputed)


def gradients(
    model: SpeechLlm, batches: Sequence[Sequence[int]], world: World, kind: str, *, packing: bool
) -> dict[str, Tensor]:
    loss_and_tokens = step(model, batches, world, packing=packing)
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return {f"{kind} loss": loss_and_tokens} | {f"{kind} {name}": grad for name, grad in found.items()}


def local_of(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def whole_copies() -> int:
    """Return how many tensors of a feed-forward layer's shape have memory; nothing else here has that shape."""
    gc.collect()
    sizes = {(tiny.LM_SIZES["intermediate_size"], tiny.LM_WIDTH), (tiny.LM_WIDTH, tiny.LM_SIZES["intermediate_size"])}
    tensors = [one for one in gc.get_objects() if type(one) in {Tensor, nn.Parameter}]
    return sum(tuple(one.shape) in sizes and one.untyped_storage().nbytes() > 0 for one in tensors)


def work(rank: int, folder: Path, port: int) -> None:
    """Live each case as one of two processes, and write down what is seen."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    world = distributed.join()
    for case in CASES:
        model = model_of(folder, case)
        shard_blocks(model.lm, tiny.CPU, world)
        life = live(model, world)
        assert all(type(value) in {Tensor, nn.Parameter} for value in model.trainable_state().values())
        save_file(life.tensors, folder / f"{case}.{rank}.safetensors")
        rest = {name: value for name, value in vars(life).items() if name != "tensors"}
        (folder / f"{case}.{rank}.json").write_text(json.dumps(rest), encoding="utf-8")
        del model
    distributed.leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where both processes wrote down their lives."""
    made = tmp_path_factory.mktemp("sharded")
    for name in {case.removesuffix(BFLOAT16) for case in CASES}:
        tiny.LMS[name](made / name)
    both: Any = spawn(work, (made, _free_port()), nprocs=SIZE, join=False)  # type: ignore[no-untyped-call]
    deadline = time.monotonic() + TIME_LIMIT_S
    while not both.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in both.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    return made


@dataclass(frozen=True)
class Case:
    """One process's life, and those of two."""

    name: str
    model: SpeechLlm
    alone: Life
    halves: list[Life]


@pytest.fixture(scope="module", params=CASES)
def case(folder: Path, request: pytest.FixtureRequest) -> Iterator[Case]:
    name = request.param
    model = model_of(folder, name)
    halves = []
    for rank in range(SIZE):
        rest = json.loads((folder / f"{name}.{rank}.json").read_text(encoding="utf-8"))
        halves.append(Life(load_file(folder / f"{name}.{rank}.safetensors"), **rest))
    yield Case(name, model, live(model, ALONE), halves)
    gc.collect()


def test_losses_gradients_and_what_was_trained_have_the_bits_of_one_process(case: Case) -> None:
    for half in case.halves:
        assert half.tensors.keys() == case.alone.tensors.keys()
        for name, wanted in case.alone.tensors.items():
            if name.startswith("uneven"):  # three gradients are summed in another order
                assert float((half.tensors[name] - wanted).norm()) <= 1e-5 * float(wanted.norm()), name
            else:
                assert torch.equal(half.tensors[name], wanted), name


def test_something_was_trained_in_every_part(case: Case) -> None:
    gradients_seen = {name: value for name, value in case.alone.tensors.items() if "lora_" in name}
    assert {name.split()[0] for name in gradients_seen} == {*STEPS, "state", "uneven"}
    assert all(float(value.norm()) > 0 for value in gradients_seen.values())


def test_each_process_holds_half_of_the_blocks_and_no_whole_weight(case: Case) -> None:
    assert [2 * half.held_bytes for half in case.halves] == [case.alone.held_bytes] * SIZE
    assert case.alone.whole_copies > 0
    assert [half.whole_copies for half in case.halves] == [0] * SIZE


def test_checkpointing_computes_a_block_twice(case: Case) -> None:
    assert case.alone.recomputed == 2 * len(STEPS["checkpointed"][0])
    assert [half.recomputed for half in case.halves] == [case.alone.recomputed // SIZE] * SIZE


def test_texts_are_those_of_one_process(case: Case) -> None:
    for half in case.halves:
        assert half.texts == case.alone.texts
    assert case.alone.texts["before"] != case.alone.texts["after"]


def test_names_are_those_of_a_whole_model(case: Case) -> None:
    assert [half.names for half in case.halves] == [case.alone.names] * SIZE


def test_every_process_has_as_many_batches_and_none_counts_twice() -> None:
    for count in range(1, 8):
        shares = [World(rank, 3, lockstep=True).share(["batch"] * count) for rank in range(3)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(at for share in shares for at, weight in share if weight) == list(range(count))
        assert {at for share in shares for at, weight in share if not weight} <= {0}


def test_a_process_alone_keeps_the_whole_model(tmp_path: Path) -> None:
    model = tiny.load(tiny.llama(tmp_path / "lm"))
    shard_blocks(model, tiny.CPU, ALONE)
    assert not any(isinstance(value, DTensor) for value in model.model.parameters())


def test_a_model_without_blocks_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError) as refused:
        blocks_of(nn.Linear(2, 2))
    wanted = "train.shard: finds no blocks in the language model (Linear); set it to false, or take another model"
    assert str(refused.value) == wanted

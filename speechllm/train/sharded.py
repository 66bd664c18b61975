"""A frozen language model that no card holds whole: each process keeps a part of every block.

A block is put together from all processes when it is computed and taken apart again behind it, by torch's FSDP2 (fully
sharded data parallel: Zhao 2023, sec. 3). Frozen weights have no gradients, so nothing else of it is needed. What is
trained, the embeddings, the last norm and the head stay whole on every process, and the gradients of what is trained
travel as they do without this (`distributed`).

**A forward is then a thing of all processes.** Each must run as many of them, in the same order, as every other one.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from speechllm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from speechllm.model.lm import LanguageModel
    from speechllm.train.distributed import World


def shard_blocks(lm: LanguageModel, device: torch.device, world: World) -> None:
    """Spread the frozen weights of the blocks over all processes and put the rest whole on `device`.

    To be called with everything on the CPU and the adapter in place: then the device never holds more than one block
    beside its parts. Every process must have the same weights.

    Raises:
        ConfigError: the language model has no list of blocks.
    """
    if world.size == 1:
        lm.model.to(device)
        return
    body: nn.Module = lm.model.base_model
    blocks = blocks_of(body)
    mesh = init_device_mesh(device.type, (world.size,))
    for block in blocks:
        trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    whole = {parameter for parameter in body.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(body, mesh=mesh, reshard_after_forward=True, ignored_params=whole)  # the root: it fetches ahead
    _move_whole(lm.model, device)
    _make_buffers(blocks)
    lm.model.get_output_embeddings().register_forward_hook(_as_the_first)


def blocks_of(body: nn.Module) -> list[nn.Module]:
    """Return the blocks of a language model's body: the largest of its lists of modules.

    Raises:
        ConfigError: it has none.
    """
    lists: list[nn.Module] = [part for part in body.modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        what = f"finds no blocks in the language model ({type(body).__name__})"
        raise ConfigError("train.shard", what, "set it to false, or take another model")
    # of a list and a list inside it (experts) the first is the larger, or as large and seen first
    return list(max(lists, key=lambda part: sum(parameter.numel() for parameter in part.parameters())).children())


def _move_whole(model: nn.Module, device: torch.device) -> None:
    """Put what is not sharded on `device`; parameters stay the objects that they are, so tied ones stay tied."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def _make_buffers(blocks: Sequence[nn.Module]) -> None:
    """Put each block together once: torch keeps the tensors that it makes for that, empty, for all later times.

    Made first in a validation, under inference mode, they could not be trained through afterwards.
    """
    for block in blocks:
        sharded: Any = block
        sharded.unshard()
        sharded.reshard()


def _as_the_first(head: nn.Module, _inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
    """Return the first process's logits outside of training.

    The number of forwards of a search hangs on its tokens. Where two cards round one logit in two ways, one process
    would end its search before the other and leave it waiting.
    """
    if not (head.training or torch.is_grad_enabled()):
        dist.broadcast(logits, src=0)
    return logits

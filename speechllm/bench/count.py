"""What a system computes in one pass over the data, counted exactly, and the gradients that it ends with.

Shapes: b batch, l LM sequence, d LM width.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

aten = torch.ops.aten
FORMULAS: Mapping[Any, Any] = flop_registry
"""torch's own, by operator."""


class System(Protocol):
    """One way to train: what it computes can be counted, and its passes can be timed."""

    name: str
    lm: Any
    """The causal language model inside, adapter and all."""

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by the same names in every system."""
        ...

    def batches(self) -> Iterator[Any]:
        """Return the batches of a pass, always the same."""
        ...

    def loss(self, batch: Any) -> Tensor:
        """Return the summed loss of a batch."""
        ...

    def prepare(self, folder: Path) -> Callable[[], object]:
        """Return what trains for one pass; it may write into `folder`."""
        ...


@dataclass
class Counts:
    """Sums over one pass."""

    steps: int = 0
    positions: int = 0
    """That the language model's blocks computed."""
    padded: int = 0
    """Of them, those that nothing is learnt from and nothing looks at."""
    logit_rows: int = 0
    """Positions at which all logits were computed."""
    flops: int = 0
    """Of the matrix products, forward and backward, attention counted as if it were not causal."""
    saved_bytes: int = 0
    """Kept between forward and backward, each storage once, weights left out; summed over the batches."""
    peak_saved_bytes: int = 0
    """The same of the largest batch."""

    def shown(self, utterance_positions: int) -> dict[str, float]:
        """Return what is reported; bytes and operations by the positions that the utterances have one by one."""
        return {
            "steps": self.steps,
            "positions": self.positions,
            "padded": self.padded,
            "padding": round(self.padded / self.positions, 4),
            "logit_rows": self.logit_rows,
            "gflop": round(self.flops / 1e9, 3),
            "saved_kb_per_position": round(self.saved_bytes / utterance_positions / 1e3, 2),
            "saved_mb_largest_batch": round(self.peak_saved_bytes / 1e6, 2),
        }


@dataclass
class Pass:
    """What one pass without any update gave."""

    counts: Counts
    nll: float
    """Summed loss, in nats."""
    gradients: dict[str, Tensor]


def one_pass(system: System) -> Pass:
    """Return counts, loss and gradients of a pass; the parameters stay as they are."""
    counts = Counts()
    trained = system.trained()
    for value in trained.values():
        value.grad = None
    weights = {value.untyped_storage().data_ptr() for value in system.lm.parameters()}
    weights |= {value.untyped_storage().data_ptr() for value in trained.values()}
    nll = 0.0
    with _positions(system.lm, counts):
        for batch in system.batches():
            nll += _step(system, batch, counts, weights)
    gradients = {name: value.grad.clone() for name, value in trained.items() if value.grad is not None}
    assert gradients.keys() == trained.keys()
    for value in trained.values():
        value.grad = None
    return Pass(counts, nll, gradients)


def _step(system: System, batch: Any, counts: Counts, weights: set[int]) -> float:
    flops, saved = Flops(), Saved(weights)
    with flops:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            loss = system.loss(batch)
        kept = saved.num_bytes()
        loss.backward()  # type: ignore[no-untyped-call]
    counts.steps += 1
    counts.flops += flops.total
    counts.saved_bytes += kept
    counts.peak_saved_bytes = max(counts.peak_saved_bytes, kept)
    return float(loss.detach())


class _Held:
    """A saved tensor, and a thing that can be watched for whether it is still there."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


@dataclass
class Saved:
    """What autograd has saved and not yet let go."""

    weights: set[int]
    """Addresses that are not counted."""
    held: weakref.WeakSet[_Held] = field(default_factory=weakref.WeakSet)

    def pack(self, tensor: Tensor) -> _Held:
        """Keep a tensor."""
        held = _Held(tensor)
        self.held.add(held)
        return held

    def unpack(self, held: _Held) -> Tensor:
        """Return it."""
        return held.tensor

    def num_bytes(self) -> int:
        """Return the size of all storages that are still held."""
        storages = [held.tensor.untyped_storage() for held in self.held]
        sizes = {one.data_ptr(): one.nbytes() for one in storages}
        return sum(size for address, size in sizes.items() if address not in self.weights)


@contextmanager
def _positions(lm: Any, counts: Counts) -> Iterator[None]:
    """Count what goes into the language model's blocks, and into its head."""

    def body(_module: nn.Module, _inputs: object, named: dict[str, Any]) -> None:
        embeds_bld: Tensor = named["inputs_embeds"]
        mask = named["attention_mask"]
        padded = ~mask.bool() if mask.ndim == 2 else (embeds_bld == 0).all(dim=-1)  # noqa: PLR2004 - a padding mask
        counts.positions += embeds_bld.shape[0] * embeds_bld.shape[1]
        counts.padded += int(padded.sum())

    def head(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts.logit_rows += inputs[0].numel() // inputs[0].shape[-1]

    hooks = [
        lm.base_model.register_forward_pre_hook(body, with_kwargs=True),
        lm.get_output_embeddings().register_forward_pre_hook(head),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's has no types
    """Adds up the operations of matrix products by torch's own formulas.

    torch's FlopCounterMode does it module by module, and cannot be where a gradient is made within a forward pass.
    """

    def __init__(self) -> None:
        """Begin at none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        named = kwargs or {}
        found = func(*args, **named)
        packet = func._overloadpacket  # noqa: SLF001 - the key of torch's own table
        if packet in CPU_ATTENTION:
            self.total += CPU_ATTENTION[packet](*args)
        elif packet in FORMULAS:
            self.total += FORMULAS[packet](*args, **named, out_val=found)
        return found


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Return the operations of the forward pass."""
    flops: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return flops


def _attention_backward(_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Return the operations of the backward pass: five products where the forward pass has two."""
    return _attention(query, key, value) * 5 // 2


# torch has formulas for the kernels of a GPU and none for that of the CPU
CPU_ATTENTION: Mapping[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # noqa: SLF001 - torch's names of its operators
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,  # noqa: SLF001
}

"""AdamW and its schedule, with a state that is saved by parameter name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from speechllm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

BETAS = (0.9, 0.98)
EPS = 1e-8
FINAL_LR = 0.02  # of the peak, at the end of the cosine
JOINING = 0.03  # of the run: over which the rate of a group that begins late rises
CLIP_EPS = 1e-6  # torch's own, in the denominator
SLOTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Group:
    """Parameters that share a peak learning rate."""

    named: Mapping[str, nn.Parameter]
    peak_lr: float
    begins: float = 0.0
    """Part of the steps that pass before these are trained."""


def schedule(step: int, total: int, warmup: float) -> float:
    """Return the factor on the peak learning rate at `step` (the first is 0) of `total`.

    Linear from near zero over the first `warmup` of the steps, then a cosine down to `FINAL_LR`.
    """
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def joining(done: float, begins: float) -> float:
    """Return the factor on the rate of a group that begins late, where `done` of the run is over: 0, a rise, 1."""
    return 1.0 if begins == 0 else min(1.0, max(0.0, (done - begins) / JOINING))


@dataclass(frozen=True)
class Sums:
    """What a step has added up, on the device."""

    nll: Tensor
    """Summed loss, in nats."""
    tokens: Tensor
    """Tokens that it is summed over, 1 at least."""


class Optimizer:
    """AdamW over named parameters, clipped by the norm of the whole gradient."""

    def __init__(self, groups: Sequence[Group], weight_decay: float, clip_norm: float) -> None:
        """Prepare the groups; vectors (biases, norms) are never decayed."""
        self.named = {name: parameter for group in groups for name, parameter in group.named.items()}
        self.begins = {name: group.begins for group in groups for name in group.named}
        self.clip_norm = clip_norm
        settings = []
        for group in groups:
            for decayed in (True, False):
                chosen = [p for p in group.named.values() if (p.ndim > 1) == decayed]
                decay = weight_decay if decayed else 0.0
                settings.append(
                    {"params": chosen, "weight_decay": decay, "peak_lr": group.peak_lr, "begins": group.begins}
                )
        self.adam = torch.optim.AdamW([s for s in settings if s["params"]], lr=0.0, betas=BETAS, eps=EPS, fused=True)

    def step(self, factor: float, sums: Sums, done: float = 1.0) -> Tensor:
        """Apply gradients of a summed loss; return their norm per token before clipping, on their device.

        A loss or a norm that is not finite changes nothing: the device itself decides, and the host need not wait to
        know. A group that begins after `done` of the run is as if it were frozen.
        """
        for name, parameter in self.named.items():
            if not joining(done, self.begins[name]):
                parameter.grad = None
        norm = nn.utils.get_total_norm([p.grad for p in self.named.values() if p.grad is not None]) / sums.tokens
        for group in self.adam.param_groups:
            group["lr"] = factor * joining(done, group["begins"]) * group["peak_lr"]
        # torch's own way of telling a fused optimizer what to divide by and when to skip (torch.amp.GradScaler's)
        adam: Any = self.adam
        adam.grad_scale = (sums.tokens / (self.clip_norm / (norm + CLIP_EPS)).clamp(max=1.0)).float()
        adam.found_inf = (~(norm.isfinite() & sums.nll.isfinite())).float()
        adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Return the moments by parameter name."""
        return {
            f"{name}.{slot}": self.adam.state[parameter][slot]
            for name, parameter in self.named.items()
            if parameter in self.adam.state
            for slot in SLOTS
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the moments from `state`: those of all parameters, or none before a group's first step.

        Raises:
            ModelError: some are missing, or belong to other parameters.
        """
        waiting = {begins for begins in self.begins.values() if not any(self._has(tensors, begins))}
        due = [name for name in self.named if tensors and not (self.begins[name] and self.begins[name] in waiting)]
        wanted = {f"{name}.{slot}" for name in due for slot in SLOTS}
        if differing := wanted ^ tensors.keys():
            raise ModelError("optimizer state", f"does not fit at {min(differing)}", "remove the saved states")
        for name in due:
            parameter = self.named[name]
            self.adam.state[parameter] = {slot: tensors[f"{name}.{slot}"].to(parameter.device) for slot in SLOTS}

    def _has(self, tensors: Mapping[str, Tensor], begins: float) -> Iterator[bool]:
        """Return of each parameter that begins there whether it has moments."""
        return (f"{name}.step" in tensors for name, start in self.begins.items() if start == begins)

"""AdamW and its schedule, with a state that is saved by parameter name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from speechllm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BETAS = (0.9, 0.98)
EPS = 1e-8
FINAL_LR = 0.02  # of the peak, at the end of the cosine
SLOTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Group:
    """Parameters that share a peak learning rate."""

    named: Mapping[str, nn.Parameter]
    peak_lr: float


def schedule(step: int, total: int, warmup: float) -> float:
    """Return the factor on the peak learning rate at `step` (the first is 0) of `total`.

    Linear from near zero over the first `warmup` of the steps, then a cosine down to `FINAL_LR`.
    """
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Optimizer:
    """AdamW over named parameters, clipped by the norm of the whole gradient."""

    def __init__(self, groups: Sequence[Group], weight_decay: float, clip_norm: float) -> None:
        """Prepare the groups; vectors (biases, norms) are never decayed."""
        self.named = {name: parameter for group in groups for name, parameter in group.named.items()}
        self.clip_norm = clip_norm
        settings = []
        for group in groups:
            for decayed in (True, False):
                chosen = [p for p in group.named.values() if (p.ndim > 1) == decayed]
                decay = weight_decay if decayed else 0.0
                settings.append({"params": chosen, "weight_decay": decay, "peak_lr": group.peak_lr})
        self.adam = torch.optim.AdamW([s for s in settings if s["params"]], lr=0.0, betas=BETAS, eps=EPS, foreach=True)

    def step(self, factor: float, num_tokens: int) -> float:
        """Apply gradients of a summed loss over `num_tokens`; return their norm per token before clipping.

        A norm that is not finite changes nothing.
        """
        parameters = [parameter for parameter in self.named.values() if parameter.grad is not None]
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.div_(num_tokens)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.clip_norm))
        if math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = factor * group["peak_lr"]
            self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm

    def skip(self) -> float:
        """Drop the gradients and return a norm that is not a number."""
        self.adam.zero_grad(set_to_none=True)
        return math.nan

    def state(self) -> dict[str, Tensor]:
        """Return the moments by parameter name."""
        return {
            f"{name}.{slot}": self.adam.state[parameter][slot]
            for name, parameter in self.named.items()
            if parameter in self.adam.state
            for slot in SLOTS
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the moments from `state`; they must be those of all parameters, or none before the first step.

        Raises:
            ModelError: some are missing, or belong to other parameters.
        """
        wanted = {f"{name}.{slot}" for name in self.named for slot in SLOTS}
        if tensors and (differing := wanted ^ tensors.keys()):
            raise ModelError("optimizer state", f"does not fit at {min(differing)}", "remove the saved states")
        for name, parameter in self.named.items() if tensors else ():
            self.adam.state[parameter] = {
                slot: tensors[f"{name}.{slot}"].to(parameter.device if slot != "step" else "cpu") for slot in SLOTS
            }

"""LoRA beside a frozen linear layer, in as few operations and saved tensors as it takes (Hu 2021, sec. 4).

peft casts the input to the adapter's float32 and keeps that copy for the backward pass, at every layer: 5.3 MB instead
of 4.5 MB a token of a 7B model. Here the two small factors are cast to the precision of the input instead; they and
their gradients stay float32.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class LeanLinear(Linear):  # type: ignore[misc] # peft has no types
    """peft's adapted layer, with the same parameters and names, computed in the precision of its input."""

    def forward(self, input_xd: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with the adapter's added."""
        if self.disable_adapters or self.merged or args or kwargs or list(self.active_adapters) != ["default"]:
            merged: Tensor = super().forward(input_xd, *args, **kwargs)
            return merged
        base: Tensor = self.base_layer(input_xd)
        down, up = (part["default"].weight.to(base.dtype) for part in (self.lora_A, self.lora_B))
        low_xr = nn.functional.linear(self.lora_dropout["default"](input_xd.to(base.dtype)), down)
        flat_xd = torch.addmm(base.flatten(0, -2), low_xr.flatten(0, -2), up.T, alpha=self.scaling["default"])
        return flat_xd.view(base.shape)

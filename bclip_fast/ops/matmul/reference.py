"""The definition: torch's own linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b. Autocast casts by its own rules; without autocast, weight and bias are cast to x's dtype."""
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

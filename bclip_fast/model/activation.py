"""The activations of an MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast.ops import gelu


def quick_gelu_activation(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), OpenAI's "quick" GELU. It differs from the exact GELU by up to 0.02."""
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu_activation(x: Tensor) -> Tensor:
    """SigLIP's GELU, whose error function is approximated by tanh. It differs from the exact GELU by up to 0.0005."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": tanh_gelu_activation,
    "quick_gelu": quick_gelu_activation,
}
"""The activations of an MLP by their name in a configuration."""

"""Small terms of the losses, O(B * D) and O(B), that the backends and the losses over ranks share."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def siglip_gradient_dtype(features: Tensor) -> torch.dtype:
    """What gradients that are known with the loss are kept in until the upstream gradient comes.

    float16 has no room for them: 1 / B at B = 32768 is subnormal in it, and a GradScaler's factor comes upstream.
    """
    return torch.float32 if features.dtype == torch.float16 else features.dtype


def log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    """logits.logsumexp(dim) in float64, of exponentials in the logits' precision; -inf over nothing but -inf."""
    # The bound keeps -inf - -inf away.
    highest = logits.amax(dim, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
    return (logits - highest).exp_().sum(dim, dtype=torch.float64).log_() + highest.squeeze(dim)


def positive_logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """scale * the dot product of each row of image (b, D) with its row of text (b, D), in float64.

    At a scale of 100 a sum in float32 would show in the fifth digit of the gradient; of half-precision features it is
    the same sum that every tile has.
    """
    dtype = torch.float64 if image.element_size() > 2 else torch.float32
    pairs = zip(image.split(256), text.split(256), strict=True)
    return scale.double() * torch.cat([(row.to(dtype) * other.to(dtype)).sum(1).double() for row, other in pairs])


def positive_gradient(rows_lse: Tensor, columns_lse: Tensor, positive: Tensor) -> Tensor:
    """dL/dS at the positives, before the weight: minus the probabilities that go astray in row and column."""
    return -((rows_lse - positive).sigmoid() + (columns_lse - positive).sigmoid())

"""Terms of the losses that cost O(B * D) or O(B). The backends and the losses over ranks share them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast.ops import processor

# The most products image @ text.T that the C++ kernels keep for the backward: 64 MiB in float32. Multiplying them again
# takes a quarter of the time.
_MAX_KEPT = 4096 * 4096

# On a GPU, `positive_logits` takes this many numbers of a tensor at once, or more if there would be too many slices.
# Copies of this many fill 512 MiB, half as much as a chunk of G in the backward pass.
_SLICE = 1 << 25
_MOST_SLICES = 4


def siglip_gradient_dtype(features: Tensor) -> torch.dtype:
    """The dtype of gradients that are computed with the loss and wait for the upstream gradient.

    float16 cannot hold them: 1 / B at B = 32768 is subnormal in float16, and a GradScaler's factor comes upstream.
    """
    return torch.float32 if features.dtype == torch.float16 else features.dtype


def log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    """logits.logsumexp(dim) in float64, from exponentials in the logits' precision."""
    # The bound avoids -inf - -inf.
    highest = logits.amax(dim, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
    return (logits - highest).exp_().sum(dim, dtype=torch.float64).log_() + highest.squeeze(dim)


def positive_logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """scale * the dot product of each row of image (b, D) with its row of text (b, D), in float64.

    At a scale of 100, a float32 sum would change the fifth digit of the gradient. Half-precision features take the
    float32 sum that every tile has.
    """
    dtype = torch.float64 if text.element_size() > 2 else torch.float32
    # The copies of a slice stay in a CPU's caches. Elsewhere each slice costs three kernels, so slices are few.
    rows = 64 if text.device.type == "cpu" else max(_SLICE // text.shape[1], -(-len(text) // _MOST_SLICES))
    slices = zip(image.split(rows), text.split(rows), strict=True)
    sums = [(row * other.to(dtype)).sum(1) for row, other in slices]
    return scale.double() * (torch.cat(sums) if len(sums) > 1 else sums[0]).double()


def pair_losses(rows_lse: Tensor, columns_lse: Tensor, positive: Tensor) -> Tensor:
    """(2, n): the losses of each positive's row and of its column."""
    # Above its threshold, torch takes softplus(x) as x. At the default of 20, float64 shows the difference.
    return F.softplus(torch.stack([rows_lse, columns_lse]) - positive, threshold=50)


def positive_gradient(rows_lse: Tensor, columns_lse: Tensor, positive: Tensor) -> Tensor:
    """(n,): G / w at the positives, which is minus the probabilities of the negatives in row and column."""
    return (torch.stack([rows_lse, columns_lse]) - positive).sigmoid().sum(0).neg_()


def keeps_products(image: Tensor, text: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether the C++ softmax loss keeps the products of these features, multiplied in `dtype`, for the backward."""
    # The matrix unit's tiles of S never leave the caches, so it has no products to keep.
    if processor.HAS_AMX and dtype == torch.bfloat16:
        return False
    needs_grad = image.requires_grad or text.requires_grad or scale.requires_grad
    return needs_grad and torch.is_grad_enabled() and len(image) * len(text) <= _MAX_KEPT

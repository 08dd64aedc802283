"""Cases of the contrastive losses, and their truth for batches too large for a matrix of similarities."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast import ops
from bclip_fast.ops.contrastive import LIMITS, loss_terms, reference
from bclip_fast.ops.contrastive.call import ContrastiveCall, SoftmaxGradient
from bclip_fast.ops.contrastive.reference import dense as dense_clip_loss
from bclip_fast.ops.contrastive.reference import dense_siglip as dense_siglip_loss

from .case import DEVICE, Case, Contender, Inputs, Unavailable, cuda_peer, dtype_name, open_clip, ours, with_gradients

# The largest batch whose truth is computed with a float64 matrix of similarities.
LARGEST_DENSE = 8192


def contrastive_case(batch: int, width: int, dtype: torch.dtype, scale: float = 14.3) -> Case:
    """Return a case of CLIP's softmax loss."""
    dense = functools.partial(dense_contender, batch, dtype)

    def two_linear_cross_entropies() -> Contender:
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
        labels = torch.arange(batch, device=DEVICE)

        def loss(image: Tensor, text: Tensor, factor: Tensor) -> Tensor:
            # Without options, torch stores the whole matrix. Its chunks bound the memory.
            options = torch.nn.LinearCrossEntropyOptions()
            one = F.linear_cross_entropy(factor.to(dtype) * image, text, labels, options=options)
            return (one + F.linear_cross_entropy(factor.to(dtype) * text, image, labels, options=options)) / 2

        return with_gradients(loss)

    def two_inf_cls() -> Contender:
        # A call computes one direction. inf-cl's other functions reduce the scale's gradient over ranks, so this one is
        # right for a single process.
        one = cuda_peer("inf_cl").cal_flash_loss
        return with_gradients(lambda i, t, s: (one(i, t, scale=s).mean() + one(t, i, scale=s).mean()) / 2)

    def memeff() -> Contender:
        # memeff's temperature is a constant. Its defaults would rescale the gradients and normalise the features.
        loss = cuda_peer("memeff").MemoryEfficientCLIPLoss(1 / scale, normalized_inputs=True, stable=False)
        return with_gradients(lambda i, t, s: loss(i, t), num_constants=1)

    return Case(
        **pairs(batch, width, dtype, "clip", [scale]),
        truth=clip_truth(num_copies(batch)),
        contenders={
            **ours(
                LIMITS,
                lambda backend: with_gradients(lambda i, t, s: ops.clip_loss(i, t, s, backend=backend)),
                *make_tiny_features(dtype),
            ),
            "torch dense": lambda: dense(4, lambda i, t, s: dense_clip_loss(i, t, s.to(i.dtype))),
            "open_clip": lambda: dense(4, open_clip().loss.ClipLoss()),
            "open_clip compiled": lambda: dense(2.5, torch.compile(open_clip().loss.ClipLoss())),
            "torch linear_cross_entropy x2": two_linear_cross_entropies,
            "inf-cl x2": two_inf_cls,
            "memeff": memeff,
        },
        flops=4 * 2 * batch**2 * width,  # S, S again in the backward pass, and the two products with its gradient
    )


def siglip_case(batch: int, width: int, dtype: torch.dtype, scale: float = 10.0, bias: float = -10.0) -> Case:
    """Return a case of SigLIP's sigmoid loss, at its initial scale and bias."""
    dense = functools.partial(dense_contender, batch, dtype)

    def chunked_open_clip() -> Contender:
        module = open_clip()
        if "chunk_size" not in inspect.signature(module.loss.SigLipLoss).parameters:
            raise Unavailable(f"SigLipLoss of open_clip {module.__version__} has no chunk_size")
        return dense(2, module.loss.SigLipLoss(chunk_size=1024))

    def siglip_kernel() -> Contender:
        loss = cuda_peer("siglip_kernel").fused_siglip_loss
        return with_gradients(lambda i, t, s, b: loss(i, t, s.log(), b))

    return Case(
        **pairs(batch, width, dtype, "siglip", [scale, bias]),
        truth=siglip_truth(num_copies(batch)),
        contenders={
            **ours(
                LIMITS,
                lambda backend: with_gradients(lambda i, t, s, b: ops.siglip_loss(i, t, s, b, backend=backend)),
                *make_tiny_features(dtype),
            ),
            "torch dense": lambda: dense(5, lambda i, t, s, b: dense_siglip_loss(i, t, s.to(i.dtype), b.to(i.dtype))),
            "open_clip": lambda: dense(5, open_clip().loss.SigLipLoss()),
            "open_clip chunked": chunked_open_clip,
            "open_clip compiled": lambda: dense(1.25, torch.compile(open_clip().loss.SigLipLoss())),
            "siglip-kernel": siglip_kernel,
        },
        flops=3 * 2 * batch**2 * width,  # S, which gives its gradient together with the loss, and the two products
    )


def pairs(batch: int, width: int, dtype: torch.dtype, loss: str, scalars: Sequence[float]) -> dict[str, Any]:
    """Return the fields that all contrastive cases share."""
    copies, name = num_copies(batch), dtype_name(dtype)

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        pair = F.normalize(torch.randn(2, batch // copies, width, generator=generator), dim=-1).to(DEVICE, dtype)
        image, text = ((rows * signs(copies, rows)[:, None]).flatten(0, 1).requires_grad_() for rows in pair)
        return [image, text, *(torch.tensor(value, device=DEVICE).requires_grad_() for value in scalars)]

    return dict(
        operator="contrastive",
        name=f"{loss}-{batch}-{name}",
        curve=f"{loss}, {name}",
        batch=batch,
        large=copies > 1 and DEVICE.type == "cpu",
        make_inputs=make_inputs,
        bytes=4 * batch * width * torch.finfo(dtype).bits / 8,
        dtype=dtype,
    )


def num_copies(batch: int) -> int:
    """Return the number of sign-flipped copies of a small problem that make up the batch (see `clip_truth`)."""
    copies = -(-batch // LARGEST_DENSE)
    assert batch % copies == 0 and copies.bit_count() == 1, (
        f"batch={batch} must be a power of two times a small problem"
    )
    return copies


def signs(copies: int, features: Tensor) -> Tensor:
    """Return Walsh functions, (copies, D) of 1 and -1: d_a[x] = (-1)^(number of bits that a and x share)."""
    counts = [[(a & x).bit_count() for x in range(features.shape[1])] for a in range(copies)]
    return 1 - 2 * (torch.tensor(counts, device=features.device) % 2).to(features.dtype)


def clip_truth(copies: int, chunk_size: int = 256) -> Contender:
    """Return the loss and its gradients for pairs (d_a I_i, d_a T_i), in 1 / copies of the work. d is `signs`.

    Because d_a d_b = d_(a xor b), the product of image (a, i) and text (b, j) depends only on i, j and a xor b.
    So the images of every copy meet the same numbers in another order, and copy 0 determines all results:

    - Row sums are equal in every copy.
    - The column sum of a text adds up copy 0's images against all copies of that text.
    - dI_(a, i) = d_a dI_(0, i), and dT_(0, j) = sum_a d_a g_(a, j).
      g_(a, j) is the gradient that copy 0's images give to text (a, j).

    All pairs are nevertheless different.
    """
    if copies == 1:
        return with_gradients(dense_clip_loss)

    @torch.no_grad()
    def run(image: Tensor, text: Tensor, scale: Tensor) -> list[Tensor]:
        num = len(image) // copies
        first_copy = image[:num]
        call = ContrastiveCall(first_copy, text, scale, 0, chunk_size)
        rows, columns = reference.forward(call)
        columns = columns.view(copies, num).logsumexp(0)
        positive = loss_terms.positive_logits(first_copy, text[:num], scale)
        loss = loss_terms.pair_losses(rows, columns, positive).mean()
        columns_lse = torch.logaddexp(columns, positive).repeat(copies)
        weight = torch.full_like(loss, 1 / (2 * len(image)))
        positive_grad = loss_terms.positive_gradient(rows, columns, positive)
        rows_lse = torch.logaddexp(rows, positive)
        upstream = SoftmaxGradient(rows_lse, columns_lse, weight, positive_grad)
        gradients = reference.backward(call, upstream, image.dtype)
        return [loss, *gradients_of_all_copies(copies, *gradients)]

    return run


def siglip_truth(copies: int, chunk_size: int = 256) -> Contender:
    """Return the loss and its gradients as `clip_truth` does. Copy 0's images have 1 / copies of the loss."""
    if copies == 1:
        return with_gradients(dense_siglip_loss)

    @torch.no_grad()
    def run(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> list[Tensor]:
        first_copy = image[: len(image) // copies]
        call = ContrastiveCall(first_copy, text, scale, 0, chunk_size, bias=bias)
        loss, *gradients = reference.siglip(call, 1 / len(image), image.dtype, with_gradients=True)
        return [copies * loss, *gradients_of_all_copies(copies, *gradients)]

    return run


def gradients_of_all_copies(copies: int, image_grad: Tensor, text_grad: Tensor, *scalars: Tensor) -> list[Tensor]:
    """Return the gradients of the whole problem.

    image_grad: gradients of copy 0's images, (b, D).
    text_grad: the part of the texts' gradients (B, D) that comes from copy 0's images.
    scalars: the part of the scalars' gradients that comes from copy 0's images.
    """
    flips = signs(copies, image_grad)[:, None]
    image_grad = (flips * image_grad).flatten(0, 1)
    text_grad = (flips * text_grad.unflatten(0, (copies, -1))).sum(0)
    return [image_grad, (flips * text_grad).flatten(0, 1), *(copies * scalar for scalar in scalars)]


def make_tiny_features(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return an image and a text embedding, to ask a backend's limits about."""
    return torch.zeros(1, 8, dtype=dtype, device=DEVICE), torch.zeros(1, 8, dtype=dtype, device=DEVICE)


def dense_contender(batch: int, dtype: torch.dtype, num_matrices: float, loss: Callable[..., Tensor]) -> Contender:
    """Return a contender for a loss that stores (B, B) matrices. Raises Unavailable if they exceed the free memory.

    num_matrices: matrices at the peak, measured in float32 at B = 6144. CLIP has logits and softmax in two directions.
    """
    needed, free = num_matrices * batch**2 * torch.finfo(dtype).bits / 8, free_bytes()
    if needed > free:
        raise Unavailable(
            f"{num_matrices} matrices of {batch} x {batch} {dtype_name(dtype)} are about "
            f"{needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
        )
    return with_gradients(loss)


def free_bytes() -> float:
    """Return the free memory of the device in bytes, or infinity if the system does not report it."""
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info(DEVICE)[0]
    if not Path("/proc/meminfo").exists():
        return math.inf
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])

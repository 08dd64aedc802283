"""The definition (`dense`), and the same in chunks of rows with O(chunk * B) memory.

With S = s * I @ T.T + c, r_i = logsumexp_j S_ij and q_j = logsumexp_i S_ij, the loss is
    L = 1/(2B) * sum_i (r_i - S_ii + q_i - S_ii),
and G = dL/dS = 1/(2B) * (exp(S - r) + exp(S - q) - 2 * identity), from which
    dI = s * G @ T,   dT = s * G.T @ I,   ds = sum(G * (I @ T.T)),   dc = sum(G).
`lse` and `gradients` compute tiles: b rows of images against B rows of text, where image i belongs to text first + i.
They know no ranks; `bclip_fast.loss` merges their results.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import accumulation_dtype


def dense(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = scale * image @ text.T
    if bias is not None:
        logits = logits + bias
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def lse(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the (b, B) tile: over its columns (b,), and over its rows (B,)."""
    dtype = accumulation_dtype(image)
    columns = text.to(dtype).T
    row_lse = torch.empty(len(image), dtype=dtype, device=image.device)
    column_lse = torch.full((len(text),), float("-inf"), dtype=dtype, device=image.device)
    for start in range(0, len(image), chunk_size):
        logits = _logits(image[start : start + chunk_size].to(dtype), columns, scale, bias)
        row_lse[start : start + chunk_size] = logits.logsumexp(1)
        column_lse = torch.logaddexp(column_lse, logits.logsumexp(0))
    return row_lse, column_lse


def gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_lse: Tensor,
    column_lse: Tensor,
    weight: Tensor,
    first: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of image (b, D), text (B, D), scale and bias for G = weight * (exp(S-r) + exp(S-q) - 2*identity)."""
    dtype = accumulation_dtype(image)
    text_full = text.to(dtype)
    image_grad = torch.empty(image.shape, dtype=image.dtype, device=image.device)
    text_grad = torch.zeros(text.shape, dtype=dtype, device=image.device)
    scale_grad = torch.zeros((), dtype=dtype, device=image.device)
    bias_grad = torch.zeros((), dtype=dtype, device=image.device)
    for start in range(0, len(image), chunk_size):
        rows = image[start : start + chunk_size].to(dtype)
        logits = _logits(rows, text_full.T, scale, bias)
        grad = (logits - row_lse[start : start + chunk_size, None]).exp_()
        grad += (logits - column_lse).exp_()
        grad.diagonal(first + start).sub_(2.0)
        grad *= weight
        bias_grad += grad.sum()
        unscaled = grad @ text_full
        # sum(G * (I @ T.T)) = sum((G @ T) * I): no second look at S.
        scale_grad += (unscaled * rows).sum()
        image_grad[start : start + chunk_size] = scale * unscaled
        text_grad.addmm_(grad.T, rows)
    return image_grad, (scale * text_grad).to(text.dtype), scale_grad, bias_grad


def _logits(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = (scale * rows) @ columns
    return logits if bias is None else logits + bias

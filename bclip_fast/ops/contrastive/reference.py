"""The definitions (`dense`, `dense_siglip`), and the same in chunks of rows with O(chunk * B) memory.

Softmax. With S = s * I @ T.T + c, and image i belonging to text p = first + i, the positive logit is kept apart from
the sums: r_i = logsumexp_{j != p} S_ij, q_j = logsumexp_{i: first + i != j} S_ij. The loss of a row is then
softplus(r_i - S_ip), and the probability that goes astray is sigmoid(r_i - S_ip): both stay exact where the softmax
itself rounds to 1. With R and Q the full log-sum-exps and w the weight of a row,
    G_ij = w * (exp(S_ij - R_i) + exp(S_ij - Q_j)) off the positives,
    G_ip = -w * (sigmoid(r_i - S_ip) + sigmoid(q_p - S_ip)),
    dI = s * G @ T,   dT = s * G.T @ I,   ds = sum(G * (I @ T.T)),   dc = sum(G).

Sigmoid (Zhai et al. 2023, arXiv 2303.15343). L = w * sum_ij softplus(-y_ij * S_ij) with y = 1 on the positives and -1
elsewhere; G_ij = -w * y_ij * sigmoid(-y_ij * S_ij) is known with the loss, so one pass gives both.

The functions compute tiles, b rows of images against B rows of text. They know no ranks; `bclip_fast.loss` merges.
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


def dense_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = scale * image @ text.T
    if bias is not None:
        logits = logits + bias
    sign = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


def forward(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, first: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(r (b,), q (B,), positive logits (b,)) of the tile, as defined above, in the accumulation dtype.

    q covers the tile's rows alone; sums over nothing are -inf.
    """
    dtype = accumulation_dtype(image)
    columns = text.to(dtype).T
    rows_lse = torch.empty(len(image), dtype=dtype, device=image.device)
    positive = torch.empty(len(image), dtype=dtype, device=image.device)
    columns_lse = torch.full((len(text),), float("-inf"), dtype=dtype, device=image.device)
    for start in range(0, len(image), chunk_size):
        logits = _logits(image[start : start + chunk_size].to(dtype), columns, scale, bias)
        diagonal = logits.diagonal(first + start)
        positive[start : start + chunk_size] = diagonal
        diagonal.fill_(float("-inf"))
        rows_lse[start : start + chunk_size] = logits.logsumexp(1)
        columns_lse = torch.logaddexp(columns_lse, logits.logsumexp(0))
    return rows_lse, columns_lse, positive


def backward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    first: int,
    rows_lse: Tensor,
    columns_lse: Tensor,
    weight: Tensor,
    positive_grad: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dI (b, D), dT (B, D), ds, dc) for G as above, with R (b,), Q (B,), w (), and G_ip = positive_grad (b,)."""
    dtype = accumulation_dtype(image)
    texts = text.to(dtype)
    image_grad = torch.empty(image.shape, dtype=image.dtype, device=image.device)
    text_grad = torch.zeros(text.shape, dtype=dtype, device=image.device)
    scale_grad = torch.zeros((), dtype=dtype, device=image.device)
    bias_grad = torch.zeros((), dtype=dtype, device=image.device)
    for start in range(0, len(image), chunk_size):
        rows = image[start : start + chunk_size].to(dtype)
        logits = _logits(rows, texts.T, scale, bias)
        grad = (logits - rows_lse[start : start + chunk_size, None]).exp_()
        grad += (logits - columns_lse).exp_()
        grad *= weight
        grad.diagonal(first + start).copy_(positive_grad[start : start + chunk_size])
        bias_grad += grad.sum()
        unscaled = grad @ texts
        # sum(G * (I @ T.T)) = sum((G @ T) * I): no second look at S.
        scale_grad += (unscaled * rows).sum()
        image_grad[start : start + chunk_size] = scale * unscaled
        text_grad.addmm_(grad.T, rows)
    return image_grad, (scale * text_grad).to(text.dtype), scale_grad, bias_grad


def siglip(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    first: int | None,
    weight: float,
    chunk_size: int,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), dI (b, D), dT (B, D), ds, dc) of the tile; `first` None where it holds no positive at all.

    Gradients are empty tensors without `with_gradients`.
    """
    dtype = accumulation_dtype(image)
    texts = text.to(dtype)
    loss = torch.zeros((), dtype=dtype, device=image.device)
    scale_grad, bias_grad = torch.zeros_like(loss), torch.zeros_like(loss)
    image_grad = torch.empty(image.shape if with_gradients else 0, dtype=image.dtype, device=image.device)
    text_grad = torch.zeros(text.shape if with_gradients else 0, dtype=dtype, device=image.device)
    for start in range(0, len(image), chunk_size):
        rows = image[start : start + chunk_size].to(dtype)
        logits = _logits(rows, texts.T, scale, bias)
        if first is not None:
            logits.diagonal(first + start).neg_()  # now S is -y * S everywhere
        loss += weight * F.softplus(logits).sum()
        if not with_gradients:
            continue
        grad = logits.sigmoid_().mul_(weight)
        if first is not None:
            grad.diagonal(first + start).neg_()
        bias_grad += grad.sum()
        unscaled = grad @ texts
        scale_grad += (unscaled * rows).sum()
        image_grad[start : start + chunk_size] = scale * unscaled
        text_grad.addmm_(grad.T, rows)
    return loss, image_grad, (scale * text_grad).to(text.dtype), scale_grad, bias_grad


def _logits(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = (scale * rows) @ columns
    return logits if bias is None else logits + bias

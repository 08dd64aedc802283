"""The definitions (`dense`, `dense_siglip`), and the same in chunks of rows with O(chunk * B) memory.

Softmax. With S = s * I @ T.T, and image i belonging to text p = first + i, the positive logit is kept apart from the
sums: r_i = logsumexp_{j != p} S_ij, q_j = logsumexp_{i: first + i != j} S_ij. The loss of a row is then
softplus(r_i - S_ip), and the probability that goes astray is sigmoid(r_i - S_ip): both stay exact where the softmax
itself rounds to 1. With R and Q the full log-sum-exps and w the weight of a row,
    G_ij = w * (exp(S_ij - R_i) + exp(S_ij - Q_j)) off the positives,
    G_ip = -w * (sigmoid(r_i - S_ip) + sigmoid(q_p - S_ip)),
    dI = s * G @ T,   dT = s * G.T @ I,   ds = sum(G * (I @ T.T)).
A bias common to all logits cancels. A row or column without a loss has an infinite R or Q. With hardness h the
exponentials have s + h in place of s, also in r and q, which the caller gets by passing s + h as the scale: that is S
plus h times the cosine as a constant, and all other factors remain s.

Groups (soft targets, uniform over the n pairs of a row, or of a column, that share an id; Yang et al. 2022, arXiv
2204.03610, equations 1 to 3). There, R and Q hold all pairs and first is None; row i has the loss R_i - mean of its
positives' S, and from G_ij of a positive its shares a_i + b_j are taken, w / n each. In the sigmoid y = 1 for them all.

Sigmoid (Zhai et al. 2023, arXiv 2303.15343). With S = s * I @ T.T + c, L = w * sum_ij softplus(-y_ij * S_ij), y = 1 on
the positives and -1 elsewhere; G_ij = -w * y_ij * sigmoid(-y_ij * S_ij) is known with the loss, so one pass gives both;
dc = sum(G).

The functions compute tiles, b rows of images against B rows of text; `first` None says that a tile holds no positive.
Log-sum-exps are float64 throughout: their rounding would be that of every gradient in their row. They know no ranks;
`bclip_fast.loss` merges.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulation_dtype
from .loss_terms import Groups, log_sum_exp


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


def forward(image: Tensor, text: Tensor, scale: Tensor, first: int | None, chunk_size: int) -> tuple[Tensor, Tensor]:
    """(r (b,), q (B,)) of the tile, as defined above, in float64.

    q covers the tile's rows alone; sums over nothing are -inf.
    """
    dtype = accumulation_dtype(image)
    columns = text.to(dtype).T
    rows_lse = torch.empty(len(image), dtype=torch.float64, device=image.device)
    columns_lse = torch.full((len(text),), float("-inf"), dtype=torch.float64, device=image.device)
    for start in range(0, len(image), chunk_size):
        logits = (scale * image[start : start + chunk_size].to(dtype)) @ columns
        if first is not None:
            logits.diagonal(first + start).fill_(float("-inf"))
        rows_lse[start : start + chunk_size] = log_sum_exp(logits, 1)
        columns_lse = torch.logaddexp(columns_lse, log_sum_exp(logits, 0))
    return rows_lse, columns_lse


def backward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    first: int | None,
    rows_lse: Tensor,
    columns_lse: Tensor,
    weight: Tensor,
    positive_grad: Tensor,
    chunk_size: int,
    dtype: torch.dtype,
    *,
    hardness: float = 0.0,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dI (b, D), dT (B, D), ds) for G as above, with R (b,), Q (B,), w (), and G_ip = positive_grad (b,).

    dI and dT come in `dtype`, ds in the accumulation dtype. `positive_grad` isn't looked at where `first` is None. The
    groups' shares are those of G / w.
    """
    wide = accumulation_dtype(image)
    texts = text.to(wide)
    (rows_near, rows_rest), (columns_near, columns_rest) = (_nearest(part, wide) for part in (rows_lse, columns_lse))
    image_grad = torch.empty(image.shape, dtype=dtype, device=image.device)
    text_grad = torch.zeros(text.shape, dtype=wide, device=image.device)
    scale_grad = torch.zeros((), dtype=wide, device=image.device)
    for start in range(0, len(image), chunk_size):
        own = slice(start, start + chunk_size)
        rows = image[own].to(wide)
        logits = ((scale + hardness) * rows) @ texts.T
        grad = (logits - rows_near[own, None]).exp_().mul_(weight * rows_rest[own, None])
        grad += logits.sub_(columns_near).exp_().mul_(weight * columns_rest)
        if first is not None:
            grad.diagonal(first + start).copy_(positive_grad[own])
        if groups is not None:
            shares = weight * (groups.row_shares[own, None] + groups.column_shares)
            grad -= shares.to(wide).where(groups.rows[own, None] == groups.columns, 0.0)
        unscaled = grad @ texts
        # sum(G * (I @ T.T)) = sum((G @ T) * I): no second look at S.
        scale_grad += (unscaled * rows).sum()
        image_grad[own] = scale * unscaled
        text_grad.addmm_(grad.T, rows)
    return image_grad, (scale * text_grad).to(dtype), scale_grad


def _nearest(lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(near, rest) in `dtype` with exp(-lse) = exp(-near) * rest, exact though `near` is rounded."""
    near = lse.to(dtype)
    return near, torch.where(near.isinf(), 1.0, (near - lse).exp()).to(dtype)


def siglip(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    first: int | None,
    weight: float,
    chunk_size: int,
    dtype: torch.dtype,
    with_gradients: bool,
    *,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), dI (b, D), dT (B, D), ds, dc) of the tile, dI and dT in `dtype`.

    Gradients are empty tensors without `with_gradients`.
    """
    wide = accumulation_dtype(image)
    texts = text.to(wide)
    loss = torch.zeros((), dtype=wide, device=image.device)
    scale_grad, bias_grad = torch.zeros_like(loss), torch.zeros_like(loss)
    image_grad = torch.empty(image.shape if with_gradients else 0, dtype=dtype, device=image.device)
    text_grad = torch.zeros(text.shape if with_gradients else 0, dtype=wide, device=image.device)
    for start in range(0, len(image), chunk_size):
        rows = image[start : start + chunk_size].to(wide)
        logits = (scale * rows) @ texts.T
        if bias is not None:
            logits += bias
        # From here on S is -y * S everywhere.
        if groups is not None:
            sign = 1 - 2 * (groups.rows[start : start + chunk_size, None] == groups.columns).to(wide)
            logits *= sign
        if first is not None:
            logits.diagonal(first + start).neg_()
        loss += weight * F.softplus(logits, threshold=50).sum()
        if not with_gradients:
            continue
        grad = logits.sigmoid_().mul_(weight)
        if first is not None:
            grad.diagonal(first + start).neg_()
        if groups is not None:
            grad *= sign
        bias_grad += grad.sum()
        unscaled = grad @ texts
        scale_grad += (unscaled * rows).sum()
        image_grad[start : start + chunk_size] = scale * unscaled
        text_grad.addmm_(grad.T, rows)
    return loss, image_grad, (scale * text_grad).to(dtype), scale_grad, bias_grad

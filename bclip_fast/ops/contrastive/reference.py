"""The definitions (`dense`, `dense_siglip`), and the same losses in chunks of rows with O(chunk * B) memory.

Softmax. Let S = s * I @ T.T, and let image i belong to text p = positive_offset + i. The sums exclude the positive
logit: r_i = logsumexp_{j != p} S_ij and q_j = logsumexp_{i: p(i) != j} S_ij. The loss of a row is then softplus(r_i -
S_ip), and the probability of its negatives is sigmoid(r_i - S_ip). Both stay exact when the softmax itself rounds to 1.
With the full log-sum-exps R and Q and the weight w of a row,
    G_ij = w * (exp(S_ij - R_i) + exp(S_ij - Q_j)) off the positives,
    G_ip = -w * (sigmoid(r_i - S_ip) + sigmoid(q_p - S_ip)),
    dI = s * G @ T,   dT = s * G.T @ I,   ds = sum(G * (I @ T.T)).
A bias common to all logits cancels. A row or column without a loss has an infinite R or Q. With hardness h, the
exponentials in r, q and the gradient take s + h instead of s. This adds h times the cosine, as a constant, to S. The
caller passes s + h as the scale to `forward`. All other factors remain s.

Groups: soft targets, uniform over the n pairs of a row, or of a column, that share an id (Yang et al. 2022, arXiv
2204.03610, equations 1 to 3). R and Q include all pairs, and positive_offset is None. Row i has the loss R_i - mean of
its positives' S. A positive's shares a_i + b_j, w / n each, are subtracted from its G_ij. In the sigmoid loss y = 1 for
all positives.

Sigmoid (Zhai et al. 2023, arXiv 2303.15343). Let S = s * I @ T.T + c and L = w * sum_ij softplus(-y_ij * S_ij), with y
= 1 on the positives and -1 elsewhere. G_ij = -w * y_ij * sigmoid(-y_ij * S_ij) follows from the same numbers as the
loss, so one pass computes both. dc = sum(G).

A library may choose another matmul, with other rounding, for operands at other addresses. So the features are aligned.

The functions compute tiles (`call.ContrastiveCall`). Log-sum-exps are always float64, because their rounding error
would enter every gradient of their row. The functions don't know about ranks. `bclip_fast.loss` merges tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast.ops.dtypes import accumulation_dtype
from bclip_fast.ops.pointers import aligned

from .call import ContrastiveCall, SoftmaxGradient
from .loss_terms import log_sum_exp


def dense(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The softmax loss by its definition."""
    logits = _dense_logits(image, text, scale, bias)
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def dense_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sigmoid loss by its definition."""
    logits = _dense_logits(image, text, scale, bias)
    sign = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


def _dense_logits(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = scale * image @ text.T
    return logits if bias is None else logits + bias


def forward(call: ContrastiveCall) -> tuple[Tensor, Tensor]:
    """(r (b,), q (B,)) of the tile in float64.

    q covers only the tile's rows. An empty sum is -inf.
    """
    image, text, scale = aligned(call.image), aligned(call.text), call.scale
    dtype = accumulation_dtype(image)
    columns = text.to(dtype).T
    rows_lse = torch.empty(len(image), dtype=torch.float64, device=image.device)
    columns_lse = torch.full((len(text),), float("-inf"), dtype=torch.float64, device=image.device)
    for start in range(0, len(image), call.chunk_size):
        chunk = slice(start, start + call.chunk_size)
        logits = (scale * image[chunk].to(dtype)) @ columns
        if call.positive_offset is not None:
            logits.diagonal(call.positive_offset + start).fill_(float("-inf"))
        rows_lse[chunk] = log_sum_exp(logits, 1)
        columns_lse = torch.logaddexp(columns_lse, log_sum_exp(logits, 0))
    return rows_lse, columns_lse


def backward(call: ContrastiveCall, upstream: SoftmaxGradient, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(dI (b, D), dT (B, D), ds) for G as above. dI and dT are in `dtype`, ds in the accumulation dtype.

    The positives' gradients and the groups' shares are those of G / w.
    """
    image, text, scale = aligned(call.image), aligned(call.text), call.scale
    groups, weight = call.groups, upstream.weight
    wide = accumulation_dtype(image)
    texts = text.to(wide)
    rows_near, rows_rest = _nearest(upstream.rows_lse, wide)
    columns_near, columns_rest = _nearest(upstream.columns_lse, wide)
    image_grad = torch.empty(image.shape, dtype=dtype, device=image.device)
    text_grad = torch.zeros(text.shape, dtype=wide, device=image.device)
    scale_grad = torch.zeros((), dtype=wide, device=image.device)
    for start in range(0, len(image), call.chunk_size):
        chunk = slice(start, start + call.chunk_size)
        rows = image[chunk].to(wide)
        logits = ((scale + upstream.hardness) * rows) @ texts.T
        grad = (logits - rows_near[chunk, None]).exp_().mul_(weight * rows_rest[chunk, None])
        grad += logits.sub_(columns_near).exp_().mul_(weight * columns_rest)
        if call.positive_offset is not None:
            grad.diagonal(call.positive_offset + start).copy_(weight * upstream.positive_grad[chunk])
        if groups is not None:
            shares = weight * (groups.row_shares[chunk, None] + groups.column_shares)
            grad -= shares.to(wide).where(groups.rows[chunk, None] == groups.columns, 0.0)
        unscaled = grad @ texts
        # sum(G * (I @ T.T)) = sum((G @ T) * I), which needs no second pass over S.
        scale_grad += (unscaled * rows).sum()
        image_grad[chunk] = scale * unscaled
        text_grad.addmm_(grad.T, rows)
    return image_grad, (scale * text_grad).to(dtype), scale_grad


def _nearest(lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(near, rest) in `dtype` with exp(-lse) = exp(-near) * rest, which is exact although `near` is rounded."""
    near = lse.to(dtype)
    return near, torch.where(near.isinf(), 1.0, (near - lse).exp()).to(dtype)


def siglip(
    call: ContrastiveCall, weight: float, dtype: torch.dtype, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), dI (b, D), dT (B, D), ds, dc) of the tile, dI and dT in `dtype`.

    Without `with_gradients` the gradients are empty tensors.
    """
    image, text, scale, groups = aligned(call.image), aligned(call.text), call.scale, call.groups
    wide = accumulation_dtype(image)
    texts = text.to(wide)
    loss = torch.zeros((), dtype=wide, device=image.device)
    scale_grad, bias_grad = torch.zeros_like(loss), torch.zeros_like(loss)
    image_grad = torch.empty(image.shape if with_gradients else 0, dtype=dtype, device=image.device)
    text_grad = torch.zeros(text.shape if with_gradients else 0, dtype=wide, device=image.device)
    for start in range(0, len(image), call.chunk_size):
        chunk = slice(start, start + call.chunk_size)
        rows = image[chunk].to(wide)
        logits = (scale * rows) @ texts.T
        if call.bias is not None:
            logits += call.bias
        # The logits become -y * S here.
        if groups is not None:
            sign = 1 - 2 * (groups.rows[chunk, None] == groups.columns).to(wide)
            logits *= sign
        if call.positive_offset is not None:
            logits.diagonal(call.positive_offset + start).neg_()
        loss += weight * F.softplus(logits, threshold=50).sum()
        if not with_gradients:
            continue
        grad = logits.sigmoid_().mul_(weight)
        if call.positive_offset is not None:
            grad.diagonal(call.positive_offset + start).neg_()
        if groups is not None:
            grad *= sign
        bias_grad += grad.sum()
        unscaled = grad @ texts
        scale_grad += (unscaled * rows).sum()
        image_grad[chunk] = scale * unscaled
        text_grad.addmm_(grad.T, rows)
    return loss, image_grad, (scale * text_grad).to(dtype), scale_grad, bias_grad

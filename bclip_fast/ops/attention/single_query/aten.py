"""One query per sequence by torch's own operations on all rows at once, for devices without our kernels.

No number depends on the host: nothing waits for a GPU, and the sequences may have any lengths. The sums over the rows
of a sequence are torch's segmented reductions, which use no atomics. Memory grows with T, not with n * T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bclip_fast.ops.attention.call import SingleQueryCall
from bclip_fast.ops.dtypes import accumulation_dtype
from bclip_fast.ops.philox import gpu_arguments, key_of, philox, threshold_of


class _Rows(NamedTuple):
    """The rows (T,) of a call.

    owner: index of the row's sequence.
    visible: whether the sequence's query sees the row, (T, 1).
    """

    owner: Tensor
    visible: Tensor


def forward(call: SingleQueryCall) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.forward`."""
    rows, value = _rows(call), call.key_value[:, 1]
    scores = _scores(call, rows)
    highest = _by_sequence(call, scores, "max")
    weights = (scores - highest[rows.owner]).exp_()
    total = _by_sequence(call, weights, "sum")
    if call.seed is not None:
        weights *= _dropout_factors(call, rows, weights.dtype)
    out = _by_sequence(call, weights[..., None] * value, "sum") / total[..., None]
    return out.to(call.query.dtype), highest + total.log()


def backward(call: SingleQueryCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.backward`."""
    rows, (key, value) = _rows(call), call.key_value.unbind(1)
    wide = accumulation_dtype(call.query)
    out_grad = grad_out.to(wide)
    weights = (_scores(call, rows) - lse[rows.owner]).exp_()
    delta = (out_grad * out.to(wide)).sum(-1)
    row_grad = out_grad[rows.owner]
    weights_grad = (value * row_grad).sum(-1)
    kept = weights
    if call.seed is not None:
        factors = _dropout_factors(call, rows, wide)
        kept, weights_grad = weights * factors, weights_grad * factors
    scores_grad = call.scale * weights * (weights_grad - delta[rows.owner])
    query_grad = _by_sequence(call, scores_grad[..., None] * key, "sum")
    grad = torch.empty(call.key_value.shape, dtype=call.key_value.dtype, device=call.query.device)
    grad[:, 0] = scores_grad[..., None] * call.query[rows.owner]
    grad[:, 1] = kept[..., None] * row_grad
    return query_grad.to(call.query.dtype), grad


def _rows(call: SingleQueryCall) -> _Rows:
    row = torch.arange(len(call.key_value), device=call.query.device)
    owner = torch.searchsorted(call.cu_seqlens[1:].long(), row, right=True)
    # An index outside would stop a GPU's context, and only the GPU knows whether the sequences own all rows.
    owner = owner.clamp(max=max(len(call.query) - 1, 0))
    return _Rows(owner, (row < call.visible_stops()[owner])[:, None])


def _scores(call: SingleQueryCall, rows: _Rows) -> Tensor:
    """(T, H): the scores of each row, -inf if invisible. Both passes compute the same ones."""
    query = call.query.to(accumulation_dtype(call.query))
    scores = (call.key_value[:, 0] * query[rows.owner]).sum(-1) * call.scale
    return scores.masked_fill_(~rows.visible, float("-inf"))


def _by_sequence(call: SingleQueryCall, values: Tensor, reduce: str) -> Tensor:
    """(n, ...): the sum or maximum over the rows (T, ...) of each sequence."""
    if not len(call.query):
        return values[:0]
    # `unsafe` leaves out a check of the bounds, for which torch would wait for the device.
    return torch.segment_reduce(values, reduce, offsets=call.cu_seqlens.long(), axis=0, unsafe=True)


def _dropout_factors(call: SingleQueryCall, rows: _Rows, dtype: torch.dtype) -> Tensor:
    """(T, H): 0 or 1/(1 - p), for the weight of each row."""
    device = call.query.device
    seed, _, keep_scale = gpu_arguments(device, call.dropout_p, call.seed)
    assert seed is not None
    key = torch.arange(len(rows.owner), device=device) - call.cu_seqlens[:-1].long()[rows.owner]
    head = torch.arange(call.query.shape[1], device=device)
    counter = (key // 4)[:, None], call.rows[rows.owner][:, None], head, head.new_zeros(())
    words = torch.stack(philox(counter, key_of(seed, device)), -1)
    word = words.gather(-1, (key % 4)[:, None, None].expand(*words.shape[:-1], 1))[..., 0]
    return (word >= threshold_of(call.dropout_p)).to(dtype) * keep_scale

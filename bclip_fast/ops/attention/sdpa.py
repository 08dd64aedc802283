"""torch's own scaled_dot_product_attention on our layouts.

The backend "torch" leaves the choice of the kernel to torch. The backends of `backend_names.SDPA` name one kernel each
(sdpa_kernels.py). They have no dropout: reference.py defines which weights are dropped, and torch draws others. Unlike
the other backends they are ordinary torch code, so autograd gives their gradient.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from bclip_fast.ops.custom_op import without_autocast

from . import sdpa_kernels
from .call import AttentionCall, SingleQueryCall
from .checks import has_values


def refusal(operand: Tensor, dropout_p: float = 0.0, packed: bool = False, *_: object) -> str | None:
    """The reason why the backend "torch" cannot take an operand (..., d), or None."""
    if dropout_p > 0.0:
        return "torch's dropout cannot drop the weights that `seed` selects"
    if packed and operand.device.type == "cpu" and torch.compiler.is_compiling():
        return "it loops over the sequences, whose lengths a graph cannot hold"
    return None


@without_autocast
def dense(qkv: Tensor, key_mask: Tensor | None, causal: bool, scale: float, backend: str = "torch") -> Tensor:
    """(B, N, H, d) for qkv (B, N, 3, H, d) and key_mask (B, N) bool or None. A row without visible keys is zero."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if key_mask is None:
        return sdpa_kernels.attend(query, key, value, None, causal, scale, backend).transpose(1, 2)
    visible = key_mask[:, None, None, :]
    if causal:
        visible = visible & visible.new_ones(qkv.shape[1], qkv.shape[1]).tril()
    return _masked(query, key, value, visible, scale, backend).transpose(1, 2)


def packed(call: AttentionCall, backend: str = "torch") -> Tensor:
    """(T, H, d). The CPU takes one sequence after another. Other devices take padded ones, so nothing waits.

    Without the values of cu_seqlens, the CPU takes padded sequences too. The flash kernel has no mask, but it takes
    sequences without padding.
    """
    assert call.cu_seqlens is not None
    if backend == "sdpa_flash":
        return packed_nested(call, backend)
    if backend != "torch":
        return packed_padded(call, backend)
    one_by_one = call.qkv.device.type == "cpu" and has_values(call.cu_seqlens)
    return (packed_one_by_one if one_by_one else packed_padded)(call)


def packed_one_by_one(call: AttentionCall) -> Tensor:
    """`packed` by one product per sequence."""
    parts = [dense(sequence[None], None, call.causal, call.scale)[0] for sequence in _sequences(call)]
    return torch.cat(parts) if parts else call.qkv[:, 0].clone()


def _sequences(call: AttentionCall) -> list[Tensor]:
    """The rows of each non-empty sequence."""
    assert call.cu_seqlens is not None
    bounds = call.cu_seqlens.tolist()
    return [call.qkv[start:stop] for start, stop in itertools.pairwise(bounds) if stop > start]


def packed_nested(call: AttentionCall, backend: str) -> Tensor:
    """`packed` by one product over a nested tensor, which has no padding."""
    qkv, cu_seqlens = call.qkv, call.cu_seqlens
    assert cu_seqlens is not None
    if len(qkv) == 0:
        return qkv[:, 0].clone()
    # Without these bounds of the lengths, torch waits for the device to read them. The kernel skips empty sequences,
    # so they may exist in spite of a least length of 1.
    longest = call.max_seqlen
    # torch takes lengths for equal only if they come from the same tensor.
    offsets = cu_seqlens.long()
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(each, offsets, min_seqlen=min(1, longest), max_seqlen=longest).transpose(
            1, 2
        )
        for each in qkv.unbind(1)
    )
    out = sdpa_kernels.attend(query, key, value, None, call.causal, call.scale, backend)
    return out.transpose(1, 2).values()


def packed_padded(call: AttentionCall, backend: str = "torch") -> Tensor:
    """`packed` by one masked product over sequences that are padded to `max_seqlen`."""
    qkv, cu_seqlens, max_seqlen = call.qkv, call.cu_seqlens, call.max_seqlen
    assert cu_seqlens is not None
    if len(qkv) == 0:
        return qkv[:, 0].clone()
    starts, stops = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    rows = starts + torch.arange(max_seqlen, device=qkv.device)
    visible = (rows < stops)[:, None, None, :]
    if call.causal:
        visible = visible & visible.new_ones(max_seqlen, max_seqlen).tril()
    query, key, value = qkv[rows.clamp(max=len(qkv) - 1)].permute(2, 0, 3, 1, 4).unbind(0)
    out = _masked(query, key, value, visible, call.scale, backend).transpose(1, 2)
    tokens = torch.arange(len(qkv), device=qkv.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    # An index outside would stop the GPU's context. Only the GPU knows whether a sequence is longer than max_seqlen.
    return out[sequence, (tokens - cu_seqlens[sequence]).clamp(max=max_seqlen - 1)]


def packed_masked(call: AttentionCall) -> Tensor:
    """`packed` by one product of all rows with all rows, most of them masked: one graph for any lengths."""
    assert call.cu_seqlens is not None
    row = torch.arange(call.qkv.shape[0], device=call.qkv.device)
    sequence = owners(row, call.cu_seqlens)
    visible = sequence[:, None] == sequence
    if call.causal:
        visible = visible & (row <= row[:, None])
    query, key, value = call.qkv[None].permute(2, 0, 3, 1, 4).unbind(0)
    return _attend(query, key, value, visible, call.scale)[0].transpose(0, 1)


def owners(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sequence of each row (T,), by comparison with all bounds: an exported graph has no `repeat_interleave`."""
    return (rows[:, None] >= cu_seqlens[1:]).sum(1)


def single_query_masked(call: SingleQueryCall) -> Tensor:
    """One query per sequence, (n, H, d), by one product of every query with all rows, most of them masked.

    Only the device knows the length of the longest sequence, and reading it would wait.
    """
    row = torch.arange(call.key_value.shape[0], device=call.query.device)
    visible = (row >= call.cu_seqlens[:-1, None]) & (row < call.visible_stops()[:, None])
    key, value = call.key_value[None].permute(2, 0, 3, 1, 4).unbind(0)
    return _masked(call.query.transpose(0, 1)[None], key, value, visible, call.scale)[0].transpose(0, 1)


def single_query_dense(query: Tensor, key_value: Tensor, visible: Tensor | None) -> Tensor:
    """(n, H, d): one query of each sequence, (n, H, d), for sequences of one length N.

    key_value: (n, N, 2, H, d). visible: (n, N) bool with at least one key a row, or None for all keys.
    """
    key, value = key_value.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if visible is None else visible[:, None, None]
    return _attend(query[:, :, None], key, value, mask, query.shape[-1] ** -0.5)[:, :, 0]


def _masked(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, backend: str = "torch") -> Tensor:
    # torch releases disagree about rows without visible keys. Such a row sees all keys here and is then set to zero.
    empty = ~visible.any(-1, keepdim=True)
    return _attend(query, key, value, visible | empty, scale, backend).masked_fill(empty, 0.0)


@without_autocast
def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, backend: str = "torch"
) -> Tensor:
    return sdpa_kernels.attend(query, key, value, mask, False, scale, backend)

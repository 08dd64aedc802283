"""Triton kernels of `reference.py`, for NVIDIA GPUs from sm_80 on. No atomics, and nothing waits for the GPU.

Sequences of at most 256 tokens, which is every image and caption of BiomedCLIP, take the row kernels: one program for a
sequence and a head loads its K and V once and goes through blocks of queries. The scores of a query stand in registers
as a whole, so the softmax needs no running maximum. The backward does the same, sums dK and dV in registers and writes
each dQ once: five products of matrices where two kernels would need seven, and nothing is read twice. Sequences in a
batch differ in length: a program takes the least of 64, 128 and 256 keys that hold its own.

The rest takes the block kernels: longer sequences, masks, backwards of another d than 64, and float32, as without
tensor cores a tile must be small. The forward has a program for each block of queries and a running maximum (Milakov
and Gimelshein 2018, arXiv 1805.02867); the backward two kernels, by queries for dQ and by keys for dK and dV, each
computing the scores again (Dao 2023, arXiv 2307.08691).

Scores, softmax and sums are float32; float32 inputs are multiplied in float32, never TF32. P and dS are rounded to the
inputs' dtype for the products that follow. Exponentials are powers of two, log2(e) being part of the scale. One call of
Philox decides on four weights. The row of a tile past a sequence's end is read as zeros, so it adds nothing, whatever
its memory holds.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The longest row of scores that registers hold.
LONGEST_ROW = 256

# Two for a multiprocessor of an H100, nearly: fewer leave a GPU idle.
FEW_PROGRAMS = 256

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _bounds(cu_seqlens, max_seqlen, sequence):  # type: ignore[no-untyped-def]
    """(first row as int64, number of rows) of a sequence."""
    if cu_seqlens is None:
        start = sequence.to(tl.int64) * max_seqlen
        length = max_seqlen
    else:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    return start, length


@triton.jit
def _inside(rows, length, DIM: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    inside = (rows < length)[:, None]
    if DIM < WIDTH:
        inside = inside & (tl.arange(0, WIDTH) < DIM)[None, :]
    return inside


@triton.jit
def load_rows(base, rows, length, stride, DIM: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, WIDTH), zeros past the sequence's end and past DIM."""
    places = base + (rows * stride)[:, None] + tl.arange(0, WIDTH)[None, :]
    return tl.load(places, mask=_inside(rows, length, DIM, WIDTH), other=0.0)


@triton.jit
def store_rows(base, rows, length, stride, values, DIM: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    places = base + (rows * stride)[:, None] + tl.arange(0, WIDTH)[None, :]
    tl.store(places, values.to(base.dtype.element_ty), mask=_inside(rows, length, DIM, WIDTH))


@triton.jit
def _scores(products, queries, keys, length, key_mask, scale, CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """scale * log2(e) * products, -inf where the key isn't seen; queries and keys broadcast to the tile."""
    visible = keys < length
    if key_mask is not None:
        visible = visible & (tl.load(key_mask + keys, mask=visible, other=0) != 0)
    if CAUSAL:
        visible = visible & (keys <= queries)
    return tl.where(visible, products * (scale * LOG2_E), float("-inf"))


@triton.jit
def kept_weights(seed, threshold, rows, head, first_key, KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, KEYS) bool, False where dropout takes the weight; rows count over all sequences, keys within one."""
    quads = (first_key // 4 + tl.arange(0, KEYS // 4)).to(tl.uint32)
    head = head.to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), quads[None, :], rows.to(tl.uint32)[:, None], head, head * 0)
    least = threshold.to(tl.uint32)
    # The last dimension of a join counts fastest: a, b, c, d.
    kept = tl.join(tl.join(a >= least, c >= least), tl.join(b >= least, d >= least))
    return tl.reshape(kept, (rows.shape[0], KEYS))


# Signatures by the line, not by the argument.
# fmt: off
@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    out, lse, queries, length, result, highest, sums, keep_scale, HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Stores a block of queries; of a row with nothing to attend to, zeros and -inf."""
    tl.store(lse + queries, (highest + tl.log2(sums)) * LN_2, mask=queries < length)
    factor = keep_scale / tl.where(sums == 0.0, 1.0, sums)
    store_rows(out, queries, length, HEADS * DIM, result * factor[:, None], DIM, WIDTH)


@triton.jit
def _row_forward(  # type: ignore[no-untyped-def]
    qkv, out, lse, seed, threshold, keep_scale, scale, start, length, head, first, step, stride_token, stride_part,
    DROPOUT: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    keys = tl.arange(0, KEYS)
    key = load_rows(qkv + stride_part, keys, length, stride_token, DIM, WIDTH)
    value = load_rows(qkv + 2 * stride_part, keys, length, stride_token, DIM, WIDTH)
    for block in range(first, tl.cdiv(length, QUERIES), step):
        queries = block * QUERIES + tl.arange(0, QUERIES)
        query = load_rows(qkv, queries, length, stride_token, DIM, WIDTH)
        products = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = _scores(products, queries[:, None], keys[None, :], length, None, scale, False)
        # The bound keeps -inf - -inf away where nothing is seen.
        highest = tl.maximum(tl.max(scores, 1), -1e30)
        weights = tl.exp2(scores - highest[:, None])
        sums = tl.sum(weights, 1)
        if DROPOUT:
            weights = tl.where(kept_weights(seed, threshold, start + queries, head, 0, KEYS), weights, 0.0)
        result = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        _finish(out, lse, queries, length, result, highest, sums, keep_scale, HEADS, DIM, WIDTH)


@triton.jit(do_not_specialize=["threshold", "max_seqlen", "num_tokens", "num_splits"])
def _row_forward_kernel(  # type: ignore[no-untyped-def]
    qkv, cu_seqlens, out, lse, seed, threshold, keep_scale, scale, max_seqlen, num_tokens, num_splits, stride_token,
    stride_part, stride_head, DROPOUT: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """A program for a sequence, a head and each num_splits-th block of queries; no sequence longer than KEYS."""
    program = tl.program_id(0)
    first = program % num_splits
    head = program // num_splits % HEADS
    start, length = _bounds(cu_seqlens, max_seqlen, program // num_splits // HEADS)
    qkv += start * stride_token + head * stride_head
    out += start * (HEADS * DIM) + head * DIM
    lse += head.to(tl.int64) * num_tokens + start
    if cu_seqlens is not None and KEYS > 64 and length <= 64:
        _row_forward(qkv, out, lse, seed, threshold, keep_scale, scale, start, length, head, first, num_splits,
                     stride_token, stride_part, DROPOUT, HEADS, DIM, WIDTH, QUERIES, 64)
    elif cu_seqlens is not None and KEYS > 128 and length <= 128:
        _row_forward(qkv, out, lse, seed, threshold, keep_scale, scale, start, length, head, first, num_splits,
                     stride_token, stride_part, DROPOUT, HEADS, DIM, WIDTH, QUERIES, 128)
    else:
        _row_forward(qkv, out, lse, seed, threshold, keep_scale, scale, start, length, head, first, num_splits,
                     stride_token, stride_part, DROPOUT, HEADS, DIM, WIDTH, QUERIES, KEYS)


@triton.jit(do_not_specialize=["threshold", "max_seqlen", "num_tokens", "num_blocks"])
def _block_forward_kernel(  # type: ignore[no-untyped-def]
    qkv, cu_seqlens, key_mask, out, lse, seed, threshold, keep_scale, scale, max_seqlen, num_tokens, num_blocks,
    stride_token, stride_part, stride_head, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """A program for a sequence, a head and a block of queries, of which max_seqlen needs num_blocks."""
    program = tl.program_id(0)
    first_query = program % num_blocks * QUERIES
    head = program // num_blocks % HEADS
    start, length = _bounds(cu_seqlens, max_seqlen, program // num_blocks // HEADS)
    if first_query >= length:
        return
    qkv += start * stride_token + head * stride_head
    out += start * (HEADS * DIM) + head * DIM
    lse += head.to(tl.int64) * num_tokens + start
    if key_mask is not None:
        key_mask += start
    queries = first_query + tl.arange(0, QUERIES)
    query = load_rows(qkv, queries, length, stride_token, DIM, WIDTH)
    result = tl.zeros((QUERIES, WIDTH), tl.float32)
    highest = tl.full((QUERIES,), -1e30, tl.float32)
    sums = tl.zeros((QUERIES,), tl.float32)
    for first_key in range(0, tl.minimum(length, first_query + QUERIES) if CAUSAL else length, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        key = load_rows(qkv + stride_part, keys, length, stride_token, DIM, WIDTH)
        products = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = _scores(products, queries[:, None], keys[None, :], length, key_mask, scale, CAUSAL)
        higher = tl.maximum(tl.max(scores, 1), highest)
        weights = tl.exp2(scores - higher[:, None])
        fading = tl.exp2(highest - higher)
        highest = higher
        sums = sums * fading + tl.sum(weights, 1)
        if DROPOUT:
            weights = tl.where(kept_weights(seed, threshold, start + queries, head, first_key, KEYS), weights, 0.0)
        value = load_rows(qkv + 2 * stride_part, keys, length, stride_token, DIM, WIDTH)
        result = tl.dot(weights.to(value.dtype), value, result * fading[:, None], input_precision="ieee")
    _finish(out, lse, queries, length, result, highest, sums, keep_scale, HEADS, DIM, WIDTH)


@triton.jit
def _delta(out, grad_out, queries, length, stride, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(grad_out's rows, rowsum(dO * O))"""
    grad = load_rows(grad_out, queries, length, stride, DIM, WIDTH)
    own = load_rows(out, queries, length, HEADS * DIM, DIM, WIDTH)
    return grad, tl.sum(grad.to(tl.float32) * own.to(tl.float32), 1)


@triton.jit
def _row_lse(lse, queries, length):  # type: ignore[no-untyped-def]
    """In units of log2; anything finite for a row with nothing to attend to, whose scores are -inf."""
    row_lse = tl.load(lse + queries, mask=queries < length, other=0.0) * LOG2_E
    return tl.where(row_lse == float("-inf"), 0.0, row_lse)


@triton.jit
def _row_backward(  # type: ignore[no-untyped-def]
    qkv, out, lse, grad_out, grad_qkv, seed, threshold, keep_scale, scale, start, length, head, stride_token,
    stride_part, stride_grad, DROPOUT: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    keys = tl.arange(0, KEYS)
    key = load_rows(qkv + stride_part, keys, length, stride_token, DIM, WIDTH)
    value = load_rows(qkv + 2 * stride_part, keys, length, stride_token, DIM, WIDTH)
    key_grad = tl.zeros((KEYS, WIDTH), tl.float32)
    value_grad = tl.zeros((KEYS, WIDTH), tl.float32)
    for first in range(0, length, QUERIES):
        queries = first + tl.arange(0, QUERIES)
        grad, delta = _delta(out, grad_out, queries, length, stride_grad, HEADS, DIM, WIDTH)
        query = load_rows(qkv, queries, length, stride_token, DIM, WIDTH)
        products = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = _scores(products, queries[:, None], keys[None, :], length, None, scale, False)
        weights = tl.exp2(scores - _row_lse(lse, queries, length)[:, None])
        dropped = weights
        if DROPOUT:
            kept = kept_weights(seed, threshold, start + queries, head, 0, KEYS)
            dropped = tl.where(kept, weights, 0.0)
        value_grad = tl.dot(tl.trans(dropped.to(grad.dtype)), grad, value_grad, input_precision="ieee")
        weights_grad = tl.dot(grad, tl.trans(value), input_precision="ieee")
        if DROPOUT:
            weights_grad = tl.where(kept, weights_grad * keep_scale, 0.0)
        scores_grad = (weights * (weights_grad - delta[:, None])).to(query.dtype)
        key_grad = tl.dot(tl.trans(scores_grad), query, key_grad, input_precision="ieee")
        query_grad = tl.dot(scores_grad, key, input_precision="ieee")
        store_rows(grad_qkv, queries, length, 3 * HEADS * DIM, query_grad * scale, DIM, WIDTH)
    store_rows(grad_qkv + HEADS * DIM, keys, length, 3 * HEADS * DIM, key_grad * scale, DIM, WIDTH)
    store_rows(grad_qkv + 2 * HEADS * DIM, keys, length, 3 * HEADS * DIM, value_grad * keep_scale, DIM, WIDTH)


@triton.jit(do_not_specialize=["threshold", "max_seqlen", "num_tokens"])
def _row_backward_kernel(  # type: ignore[no-untyped-def]
    qkv, cu_seqlens, out, lse, grad_out, grad_qkv, seed, threshold, keep_scale, scale, max_seqlen, num_tokens,
    stride_token, stride_part, stride_head, stride_grad, stride_grad_head, DROPOUT: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
):
    """A program for a sequence and a head; no sequence longer than KEYS. TILE numbers of a block's scores."""
    program = tl.program_id(0)
    head = program % HEADS
    start, length = _bounds(cu_seqlens, max_seqlen, program // HEADS)
    qkv += start * stride_token + head * stride_head
    out += start * (HEADS * DIM) + head * DIM
    lse += head.to(tl.int64) * num_tokens + start
    grad_out += start * stride_grad + head * stride_grad_head
    grad_qkv += start * (3 * HEADS * DIM) + head * DIM
    if cu_seqlens is not None and KEYS > 64 and length <= 64:
        _row_backward(qkv, out, lse, grad_out, grad_qkv, seed, threshold, keep_scale, scale, start, length, head,
                      stride_token, stride_part, stride_grad, DROPOUT, HEADS, DIM, WIDTH, TILE // 64, 64)
    elif cu_seqlens is not None and KEYS > 128 and length <= 128:
        _row_backward(qkv, out, lse, grad_out, grad_qkv, seed, threshold, keep_scale, scale, start, length, head,
                      stride_token, stride_part, stride_grad, DROPOUT, HEADS, DIM, WIDTH, TILE // 128, 128)
    else:
        _row_backward(qkv, out, lse, grad_out, grad_qkv, seed, threshold, keep_scale, scale, start, length, head,
                      stride_token, stride_part, stride_grad, DROPOUT, HEADS, DIM, WIDTH, TILE // KEYS, KEYS)


@triton.jit(do_not_specialize=["threshold", "max_seqlen", "num_tokens", "num_blocks"])
def _query_backward_kernel(  # type: ignore[no-untyped-def]
    qkv, cu_seqlens, key_mask, out, lse, delta, grad_out, grad_qkv, seed, threshold, keep_scale, scale, max_seqlen,
    num_tokens, num_blocks, stride_token, stride_part, stride_head, stride_grad, stride_grad_head,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """dQ, and delta (HEADS, num_tokens) float32 for `_key_backward_kernel`; programs as in `_block_forward_kernel`."""
    program = tl.program_id(0)
    first_query = program % num_blocks * QUERIES
    head = program // num_blocks % HEADS
    start, length = _bounds(cu_seqlens, max_seqlen, program // num_blocks // HEADS)
    if first_query >= length:
        return
    qkv += start * stride_token + head * stride_head
    out += start * (HEADS * DIM) + head * DIM
    lse += head.to(tl.int64) * num_tokens + start
    delta += head.to(tl.int64) * num_tokens + start
    grad_out += start * stride_grad + head * stride_grad_head
    grad_qkv += start * (3 * HEADS * DIM) + head * DIM
    if key_mask is not None:
        key_mask += start
    queries = first_query + tl.arange(0, QUERIES)
    query = load_rows(qkv, queries, length, stride_token, DIM, WIDTH)
    grad, row_delta = _delta(out, grad_out, queries, length, stride_grad, HEADS, DIM, WIDTH)
    tl.store(delta + queries, row_delta, mask=queries < length)
    row_lse = _row_lse(lse, queries, length)
    query_grad = tl.zeros((QUERIES, WIDTH), tl.float32)
    for first_key in range(0, tl.minimum(length, first_query + QUERIES) if CAUSAL else length, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        key = load_rows(qkv + stride_part, keys, length, stride_token, DIM, WIDTH)
        value = load_rows(qkv + 2 * stride_part, keys, length, stride_token, DIM, WIDTH)
        products = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = _scores(products, queries[:, None], keys[None, :], length, key_mask, scale, CAUSAL)
        weights_grad = tl.dot(grad, tl.trans(value), input_precision="ieee")
        if DROPOUT:
            kept = kept_weights(seed, threshold, start + queries, head, first_key, KEYS)
            weights_grad = tl.where(kept, weights_grad * keep_scale, 0.0)
        scores_grad = tl.exp2(scores - row_lse[:, None]) * (weights_grad - row_delta[:, None])
        query_grad = tl.dot(scores_grad.to(key.dtype), key, query_grad, input_precision="ieee")
    store_rows(grad_qkv, queries, length, 3 * HEADS * DIM, query_grad * scale, DIM, WIDTH)


@triton.jit(do_not_specialize=["threshold", "max_seqlen", "num_tokens", "num_blocks"])
def _key_backward_kernel(  # type: ignore[no-untyped-def]
    qkv, cu_seqlens, key_mask, lse, delta, grad_out, grad_qkv, seed, threshold, keep_scale, scale, max_seqlen,
    num_tokens, num_blocks, stride_token, stride_part, stride_head, stride_grad, stride_grad_head,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """dK and dV; a program for a sequence, a head and a block of keys, of which max_seqlen needs num_blocks."""
    program = tl.program_id(0)
    first_key = program % num_blocks * KEYS
    head = program // num_blocks % HEADS
    start, length = _bounds(cu_seqlens, max_seqlen, program // num_blocks // HEADS)
    if first_key >= length:
        return
    qkv += start * stride_token + head * stride_head
    lse += head.to(tl.int64) * num_tokens + start
    delta += head.to(tl.int64) * num_tokens + start
    grad_out += start * stride_grad + head * stride_grad_head
    grad_qkv += start * (3 * HEADS * DIM) + head * DIM
    if key_mask is not None:
        key_mask += start
    keys = first_key + tl.arange(0, KEYS)
    key = load_rows(qkv + stride_part, keys, length, stride_token, DIM, WIDTH)
    value = load_rows(qkv + 2 * stride_part, keys, length, stride_token, DIM, WIDTH)
    key_grad = tl.zeros((KEYS, WIDTH), tl.float32)
    value_grad = tl.zeros((KEYS, WIDTH), tl.float32)
    # The scores are transposed, so that P and dS are left operands as they come.
    for first_query in range(first_key // QUERIES * QUERIES if CAUSAL else 0, length, QUERIES):
        queries = first_query + tl.arange(0, QUERIES)
        query = load_rows(qkv, queries, length, stride_token, DIM, WIDTH)
        products = tl.dot(key, tl.trans(query), input_precision="ieee")
        scores = _scores(products, queries[None, :], keys[:, None], length, key_mask, scale, CAUSAL)
        weights = tl.exp2(scores - _row_lse(lse, queries, length)[None, :])
        grad = load_rows(grad_out, queries, length, stride_grad, DIM, WIDTH)
        dropped = weights
        if DROPOUT:
            kept = tl.trans(kept_weights(seed, threshold, start + queries, head, first_key, KEYS))
            dropped = tl.where(kept, weights, 0.0)
        value_grad = tl.dot(dropped.to(grad.dtype), grad, value_grad, input_precision="ieee")
        weights_grad = tl.dot(value, tl.trans(grad), input_precision="ieee")
        if DROPOUT:
            weights_grad = tl.where(kept, weights_grad * keep_scale, 0.0)
        row_delta = tl.load(delta + queries, mask=queries < length, other=0.0)
        scores_grad = weights * (weights_grad - row_delta[None, :])
        key_grad = tl.dot(scores_grad.to(query.dtype), query, key_grad, input_precision="ieee")
    store_rows(grad_qkv + HEADS * DIM, keys, length, 3 * HEADS * DIM, key_grad * scale, DIM, WIDTH)
    store_rows(grad_qkv + 2 * HEADS * DIM, keys, length, 3 * HEADS * DIM, value_grad * keep_scale, DIM, WIDTH)
# fmt: on


def configuration(kernel: str, dtype: torch.dtype, dim: int, max_seqlen: int) -> dict[str, Any]:
    """Tile sizes and launch options of a kernel, by its name less "_kernel".

    Fixed, so that results don't depend on what a tuning run found fastest; reasoned, not yet tuned on a GPU: large
    tiles that spill no register for sm_80 and sm_90. A row forward for d = 64 takes 80 KiB of shared memory and, for
    images without dropout and captions with it, at most 128 registers: two programs share a multiprocessor.
    """
    width = max(32, triton.next_power_of_2(dim))
    config = {"DIM": dim, "WIDTH": width, "num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
    if kernel.startswith("_row"):
        keys = min(max(64, triton.next_power_of_2(max_seqlen)), LONGEST_ROW)
        return (
            config | {"KEYS": keys} | ({"QUERIES": 32} if kernel == "_row_forward" else {"TILE": min(32 * keys, 4096)})
        )
    if dtype == torch.float32:
        return (
            config
            | {
                "_block_forward": {"QUERIES": 32, "KEYS": 32, "num_stages": 2},
                "_query_backward": {"QUERIES": 32, "KEYS": 16, "num_stages": 2, "num_warps": 4},
                "_key_backward": {"QUERIES": 16, "KEYS": 64},
            }[kernel]
        )
    larger = 128 if width <= 64 else 64
    return (
        config
        | {
            "_block_forward": {"QUERIES": 64, "KEYS": 64, "num_stages": 3, "num_warps": 4},
            "_query_backward": {"QUERIES": larger, "KEYS": 32, "num_stages": 2},
            "_key_backward": {"QUERIES": 32, "KEYS": larger, "num_stages": 2},
        }[kernel]
    )


def takes_rows(kernel: str, qkv: Tensor, key_mask: Tensor | None, max_seqlen: int, causal: bool) -> bool:
    """Whether "_row_forward" or "_row_backward" takes these inputs, for which it has the registers.

    A causal call rather skips the blocks it can't see. The backward is for the towers' d = 64.
    """
    plain = key_mask is None and not causal and qkv.dtype != torch.float32
    return plain and max_seqlen <= LONGEST_ROW and (kernel == "_row_forward" or qkv.shape[-1] == 64)


def forward(
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    tokens, _, heads, dim = qkv.shape
    out = torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device)
    programs = heads * _num_sequences(qkv, cu_seqlens, max_seqlen)
    if not tokens:
        return out, lse
    qkv = _operand(qkv, max_seqlen)
    last = out, lse, *dropout_arguments(qkv, dropout_p, seed), scale, max_seqlen, tokens
    options = {"DROPOUT": seed is not None, "HEADS": heads}
    with torch.cuda.device_of(qkv):
        if takes_rows("_row_forward", qkv, key_mask, max_seqlen, causal):
            config = configuration("_row_forward", qkv.dtype, dim, max_seqlen)
            # Where there are too few heads to fill a GPU, the blocks of queries are shared out.
            splits = 1 if programs >= FEW_PROGRAMS else triton.cdiv(max_seqlen, config["QUERIES"])
            inputs = qkv, cu_seqlens, *last, splits, *qkv.stride()[:3]
            _row_forward_kernel[(programs * splits,)](*inputs, **options, **config)
        else:
            config = configuration("_block_forward", qkv.dtype, dim, max_seqlen)
            blocks = triton.cdiv(max_seqlen, config["QUERIES"])
            inputs = qkv, cu_seqlens, _bytes(key_mask), *last, blocks, *qkv.stride()[:3]
            _block_forward_kernel[(programs * blocks,)](*inputs, CAUSAL=causal, **options, **config)
    return out, lse


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> Tensor:
    tokens, _, heads, dim = qkv.shape
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    programs = heads * _num_sequences(qkv, cu_seqlens, max_seqlen)
    if not tokens:
        return grad_qkv
    qkv, grad_out = _operand(qkv, max_seqlen), _operand(grad_out, max_seqlen)
    last = *dropout_arguments(qkv, dropout_p, seed), scale, max_seqlen, tokens
    strides = *qkv.stride()[:3], *grad_out.stride()[:2]
    options = {"DROPOUT": seed is not None, "HEADS": heads}
    with torch.cuda.device_of(qkv):
        if takes_rows("_row_backward", qkv, key_mask, max_seqlen, causal):
            config = configuration("_row_backward", qkv.dtype, dim, max_seqlen)
            inputs = qkv, cu_seqlens, out, lse, grad_out, grad_qkv, *last, *strides
            _row_backward_kernel[(programs,)](*inputs, **options, **config)
            return grad_qkv
        mask, delta = _bytes(key_mask), torch.empty_like(lse)
        config = configuration("_query_backward", qkv.dtype, dim, max_seqlen)
        blocks = triton.cdiv(max_seqlen, config["QUERIES"])
        inputs = qkv, cu_seqlens, mask, out, lse, delta, grad_out, grad_qkv, *last, blocks, *strides
        _query_backward_kernel[(programs * blocks,)](*inputs, CAUSAL=causal, **options, **config)
        config = configuration("_key_backward", qkv.dtype, dim, max_seqlen)
        blocks = triton.cdiv(max_seqlen, config["KEYS"])
        inputs = qkv, cu_seqlens, mask, lse, delta, grad_out, grad_qkv, *last, blocks, *strides
        _key_backward_kernel[(programs * blocks,)](*inputs, CAUSAL=causal, **options, **config)
    return grad_qkv


def _num_sequences(qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> int:
    return len(qkv) // max(max_seqlen, 1) if cu_seqlens is None else len(cu_seqlens) - 1


def _operand(tensor: Tensor, max_seqlen: int) -> Tensor:
    """With elements of a head side by side, as the kernels read them."""
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    # Inside a sequence the kernels count in int32.
    if max_seqlen * tensor.stride(0) >= 2**31:
        raise ValueError(f"{max_seqlen} tokens of {tensor.stride(0)} elements each are more than Triton's kernels take")
    return tensor


def _bytes(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def dropout_arguments(qkv: Tensor, dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """(seed, threshold, factor of what is kept). The seed is read on the device, where a graph may replay the call."""
    if seed is None:
        return None, 0, 1.0
    return seed.to(qkv.device, non_blocking=True), int(dropout_p * 2**32), 1 / (1 - dropout_p)

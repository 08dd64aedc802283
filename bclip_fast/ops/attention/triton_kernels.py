"""The Triton kernels that triton.py launches.

Row kernels take sequences of at most 256 tokens, which includes every image and caption of BiomedCLIP. One program per
sequence and head loads its K and V once and loops over blocks of queries. Registers hold all scores of a query, so the
softmax needs no running maximum. The backward also sums dK and dV in registers and writes each dQ once: five matrix
products, while two kernels would need seven. A program takes the least of 64, 128 and 256 keys that holds its sequence.

Block kernels take the other calls: longer sequences, masks, backward passes with d other than 64, and float32. The
tiles of float32 must be small because it has no tensor cores. The forward has one program per block of queries and a
running maximum (Milakov and Gimelshein 2018, arXiv 1805.02867). The backward has one kernel by queries for dQ and one
by keys for dK and dV. Each computes the scores again (Dao 2023, arXiv 2307.08691).

Scores, softmax and sums are float32. float32 inputs are multiplied in float32, never TF32. P and dS are rounded to the
inputs' dtype. Exponentials are powers of two, with log2(e) in the scale. One call of Philox gives the random numbers of
four weights. Rows of a tile past a sequence's end are read as zeros, so they add nothing. The kernels use no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _bounds(cu_seqlens, max_seqlen, sequence):  # type: ignore[no-untyped-def]
    """(first row as int64, number of rows) of a sequence. Tiles lack room for rows after the first max_seqlen."""
    if cu_seqlens is None:
        start = sequence.to(tl.int64) * max_seqlen
        length = max_seqlen
    else:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = tl.minimum((tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32), max_seqlen)
    return start, length


@triton.jit
def _inside(rows, length, DIM: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    inside = (rows < length)[:, None]
    if DIM < WIDTH:
        inside = inside & (tl.arange(0, WIDTH) < DIM)[None, :]
    return inside


@triton.jit
def load_rows(base, rows, length, stride, DIM: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, WIDTH), with zeros past the sequence's end and past DIM."""
    places = base + (rows * stride)[:, None] + tl.arange(0, WIDTH)[None, :]
    return tl.load(places, mask=_inside(rows, length, DIM, WIDTH), other=0.0)


@triton.jit
def store_rows(base, rows, length, stride, values, DIM: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write `values` to the rows below `length` of a matrix at `base`."""
    places = base + (rows * stride)[:, None] + tl.arange(0, WIDTH)[None, :]
    tl.store(places, values.to(base.dtype.element_ty), mask=_inside(rows, length, DIM, WIDTH))


@triton.jit
def _scores(products, queries, keys, length, key_mask, scale, CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """scale * log2(e) * products, and -inf for invisible keys. Queries and keys broadcast to the tile."""
    visible = keys < length
    if key_mask is not None:
        visible = visible & (tl.load(key_mask + keys, mask=visible, other=0) != 0)
    if CAUSAL:
        visible = visible & (keys <= queries)
    return tl.where(visible, products * (scale * LOG2_E), float("-inf"))


@triton.jit
def kept_weights(seed, threshold, rows, head, first_key, KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, KEYS) bool, False for a dropped weight. Rows count over all sequences, keys within one sequence."""
    quads = (first_key // 4 + tl.arange(0, KEYS // 4)).to(tl.uint32)
    head = head.to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), quads[None, :], rows.to(tl.uint32)[:, None], head, head * 0)
    least = threshold.to(tl.uint32)
    # A join's last dimension varies fastest, so the order is a, b, c, d.
    kept = tl.join(tl.join(a >= least, c >= least), tl.join(b >= least, d >= least))
    return tl.reshape(kept, (rows.shape[0], KEYS))


# Signatures fill their lines here: one argument per line would double the file.
# fmt: off
@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    out, lse, queries, length, result, highest, sums, keep_scale, HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store a block of queries. A row without visible keys gets zeros and -inf."""
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
        # The bound avoids -inf - -inf in rows without visible keys.
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
    """One program per sequence, head and every num_splits-th block of queries. No sequence is longer than KEYS."""
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
    """One program per sequence, head and block of queries. max_seqlen queries make num_blocks blocks."""
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
    stored = load_rows(out, queries, length, HEADS * DIM, DIM, WIDTH)
    return grad, tl.sum(grad.to(tl.float32) * stored.to(tl.float32), 1)


@triton.jit
def _row_lse(lse, queries, length):  # type: ignore[no-untyped-def]
    """The log-sum-exps in units of log2. A row without visible keys, whose scores are -inf, gets a finite number."""
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
    """One program per sequence and head. No sequence is longer than KEYS. A block has TILE scores."""
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
    """dQ, and delta (HEADS, num_tokens) float32 for `_key_backward_kernel`. """
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
    """dK and dV. One program per sequence, head and block of keys. max_seqlen keys make num_blocks blocks."""
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
    key_grad, value_grad = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    # The scores are transposed, so that P and dS are left operands without another transpose.
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

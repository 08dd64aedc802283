"""One query per sequence: it equals `out[rows]` of varlen attention, with the same gradients and dropped weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from judged import judge_single_query_attention
from oracle import every_backend, every_backend_and
from pairwise import pairwise

from bclip_fast import ops

CASES = [[5, 1, 17], [256, 1, 33, 78, 64], [197, 197], [700]]
SEED = -(2**40) + 12345


def inputs(lengths, dtype=torch.float32, heads=2, dim=64):
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    # Early rows, last rows and rows in the middle.
    places = [(min(1, length - 1), length - 1, length // 2)[i % 3] for i, length in enumerate(lengths)]
    rows = bounds[:-1].long() + torch.tensor(places)
    query, pairs = torch.randn(len(lengths), heads, dim), torch.randn(sum(lengths), 2, heads, dim)
    return query.to(dtype), pairs.to(dtype), rows, bounds


@pairwise(
    backend_and_dtype=every_backend_and("single-query attention", torch.float32, torch.bfloat16),
    lengths=CASES,
    causal=[False, True],
    dropout_p=[0.0, 0.3],
)
def test_single_query_is_as_accurate_as_eager(backend, dtype, lengths, causal, dropout_p, nan_filled):
    _, _, rows, bounds = inputs(lengths, dtype)
    seed = torch.tensor(SEED) if dropout_p else None
    options = {"causal": causal, "dropout_p": dropout_p, "seed": seed, "scale": 0.2, "backend": backend}
    judge_single_query_attention(
        lambda query, pairs: ops.single_query_attention(query, pairs, rows, bounds, **options),
        (rows, bounds, causal, dropout_p, seed, 0.2),
        sum(lengths),
        (len(lengths), 2, 64),
        dtype,
    )


@pytest.mark.parametrize("dim", [32, 80, 96, 128])
@pytest.mark.parametrize("backend", every_backend("single-query attention"))
def test_head_dimensions_are_as_accurate_as_eager(backend, dim, nan_filled):
    _, _, rows, bounds = inputs([3, 70], dim=dim)
    judge_single_query_attention(
        lambda query, pairs: ops.single_query_attention(query, pairs, rows, bounds, backend=backend),
        (rows, bounds, False, 0.0, None, dim**-0.5),
        73,
        (2, 2, dim),
        torch.float32,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_single_query_equals_rows_of_varlen_attention_with_dropout(causal):
    query, pairs, rows, bounds = inputs([40, 3, 90], torch.float64)
    queries = torch.randn(133, 1, 2, 64, dtype=torch.float64)
    queries[rows, 0] = query
    options = {"causal": causal, "dropout_p": 0.4, "seed": SEED}
    every_row = ops.varlen_attention(torch.cat([queries, pairs], 1), bounds, 90, **options)
    torch.testing.assert_close(ops.single_query_attention(query, pairs, rows, bounds, **options), every_row[rows])


@pytest.mark.parametrize("backend", every_backend("single-query attention"))
def test_strided_inputs_give_the_same_output(backend):
    query, pairs, rows, bounds = inputs([6, 9])
    loose = torch.cat([pairs, pairs], 3)[..., :64].requires_grad_(), query.transpose(1, 2).contiguous().transpose(1, 2)
    out = ops.single_query_attention(loose[1], loose[0], rows, bounds, backend=backend)
    torch.testing.assert_close(out, ops.single_query_attention(query, pairs, rows, bounds, backend="reference"))
    # The gradient of a sum is expanded, with strides of 0.
    out.sum().backward()
    assert loose[0].grad.isfinite().all()


def test_number_of_threads_does_not_change_results():
    query, pairs, rows, bounds = inputs([9, 40, 3, 77])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaves = [query.clone().requires_grad_(), pairs.clone().requires_grad_()]
            out = ops.single_query_attention(*leaves, rows, bounds, dropout_p=0.2, seed=1, backend="cpu")
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_operator_registers_and_compiles():
    query, pairs, rows, bounds = inputs([4, 7])
    leaves = query.requires_grad_(), pairs.requires_grad_()
    for backend in ("cpu", "torch", "reference"):
        arguments = (*leaves, rows, bounds, True, 0.5, torch.tensor(3), 0.1, backend)
        torch.library.opcheck(torch.ops.bclip.pooled_attention.default, arguments)
    for backend in ("auto", "torch"):
        compiled = torch.compile(ops.single_query_attention, fullgraph=True, backend="aot_eager")
        eager = ops.single_query_attention(*leaves, rows, bounds, backend=backend)
        torch.testing.assert_close(compiled(*leaves, rows, bounds, backend=backend), eager)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, kv, r, b: (q, kv[:, :1], r, b), "key_value"),
        (lambda q, kv, r, b: (q, kv.double(), r, b), "must be the same"),
        (lambda q, kv, r, b: (q.long(), kv.long(), r, b), "query must be floating point, got torch.int64"),
        (lambda q, kv, r, b: (q, kv, r.int(), b), r"rows must be \(2,\), torch.int64"),
        (lambda q, kv, r, b: (q, kv, r, b[:-1]), r"cu_seqlens must be \(3,\)"),
        (lambda q, kv, r, b: (q, kv, r, b + 1), "from 0 to T = 11"),
        (lambda q, kv, r, b: (q, kv, r.flip(0), b), r"rows\[0\] is 10, but sequence 0 owns rows 0 to 4"),
    ],
)
def test_bad_argument_raises_an_error_that_names_it(change, words):
    with pytest.raises(ValueError, match=words):
        ops.single_query_attention(*change(*inputs([4, 7])))

"""torch's attention as a backend: the forms that a GPU takes, on the CPU, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from bclip_fast import ops
from bclip_fast.ops.attention import reference, sdpa
from bclip_fast.ops.attention.single_query import reference as pooled_reference


def bounds_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def assert_same_with_gradients(own, definition, leaves):
    outputs = own(*leaves), definition(*leaves)
    torch.testing.assert_close(*outputs)
    upstream = torch.randn_like(outputs[0])
    gradients = (torch.autograd.grad(output, leaves, upstream) for output in outputs)
    for mine, true in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_dense_equals_the_definition_where_rows_have_no_keys_too(masked, causal):
    qkv = torch.randn(3, 11, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 11) < 0.6 if masked else None
    if mask is not None:
        mask[1] = False
        mask[2, :4] = False
    flat = None if mask is None else mask.flatten()
    assert_same_with_gradients(
        lambda qkv: ops.fused_attention(qkv, mask, causal=causal, scale=0.3, backend="torch").flatten(0, 1),
        lambda qkv: reference.attention(qkv.flatten(0, 1), None, flat, 11, causal, 0.0, None, 0.3),
        [qkv],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_one_by_one_equal_the_definition(causal):
    bounds, rows = bounds_of([5, 1, 0, 8]), torch.tensor([2, 5, 9])
    qkv = torch.randn(14, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(
        lambda qkv: ops.varlen_attention(qkv, bounds, 9, causal=causal, scale=0.3, backend="torch"),
        lambda qkv: reference.attention(qkv, bounds, None, 9, causal, 0.0, None, 0.3),
        [qkv],
    )
    query = torch.randn(3, 2, 16, dtype=torch.float64, requires_grad=True)
    pairs = torch.randn(14, 2, 2, 16, dtype=torch.float64, requires_grad=True)
    bounds = bounds_of([5, 1, 8])
    assert_same_with_gradients(
        lambda *leaves: ops.pooled_attention(*leaves, rows, bounds, causal=causal, scale=0.3, backend="torch"),
        lambda query, pairs: pooled_reference.attention(query, pairs, rows, bounds, causal, 0.0, None, 0.3),
        [query, pairs],
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[5, 1, 0, 8], [3], [0, 7, 0]], ids=str)
def test_padded_sequences_equal_the_definition(lengths, causal):
    bounds = bounds_of(lengths)
    qkv = torch.randn(sum(lengths), 3, 2, 16, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(
        lambda qkv: sdpa.packed_padded(qkv, bounds, 9, causal, 0.3),
        lambda qkv: reference.attention(qkv, bounds, None, 9, causal, 0.0, None, 0.3),
        [qkv],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_masked_queries_equal_the_definition(causal):
    bounds, rows = bounds_of([5, 1, 8]), torch.tensor([2, 5, 9])
    query = torch.randn(3, 2, 16, dtype=torch.float64, requires_grad=True)
    pairs = torch.randn(14, 2, 2, 16, dtype=torch.float64, requires_grad=True)
    stops = rows + 1 if causal else bounds[1:].long()
    assert_same_with_gradients(
        lambda query, pairs: sdpa.pooled_masked(query, pairs, bounds[:-1], stops, 0.3),
        lambda query, pairs: pooled_reference.attention(query, pairs, rows, bounds, causal, 0.0, None, 0.3),
        [query, pairs],
    )


def test_no_tokens_give_no_rows_and_a_gradient():
    qkv = torch.randn(0, 3, 2, 16, requires_grad=True)
    for out in (
        sdpa.packed_padded(qkv, bounds_of([0, 0]), 9, False, 1.0),
        sdpa.packed_one_by_one(qkv, bounds_of([0, 0]), False, 1.0),
    ):
        assert out.shape == (0, 2, 16)
        out.sum().backward()


def test_dropout_is_refused_by_name_and_auto_takes_another():
    qkv = torch.randn(1, 7, 3, 2, 16)
    with pytest.raises(ops.BackendError, match="torch: torch's dropout doesn't drop the weights that `seed` names"):
        ops.fused_attention(qkv, dropout_p=0.1, seed=3, backend="torch")
    assert ops.fused_attention(qkv, dropout_p=0.1, seed=3).shape == (1, 7, 2, 16)


def test_bounds_are_checked_as_elsewhere():
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T = 4"):
        ops.varlen_attention(torch.randn(4, 3, 2, 16), bounds_of([3]), 9, backend="torch")
    with pytest.raises(ValueError, match="sequence 0 owns rows 0 to 4"):
        pairs, rows = torch.randn(4, 2, 2, 16), torch.tensor([4])
        ops.pooled_attention(torch.randn(1, 2, 16), pairs, rows, bounds_of([4]), backend="torch")


def test_dense_compiles_without_a_graph_break():
    qkv, mask = torch.randn(2, 7, 3, 2, 16), torch.rand(2, 7) < 0.6

    def attend(qkv):
        return ops.fused_attention(qkv, mask, causal=True, backend="torch")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(qkv), attend(qkv))


def test_packed_sequences_on_the_cpu_are_left_to_others_in_a_graph():
    qkv, bounds = torch.randn(4, 3, 2, 16), bounds_of([3, 1])

    def attend(qkv, backend):
        return ops.varlen_attention(qkv, bounds, 9, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, "auto"), attend(qkv, "torch"))
    with pytest.raises(Exception, match="lengths a graph cannot hold"):
        compiled(qkv, "torch")

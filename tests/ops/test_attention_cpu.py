"""The C++ backend beyond test_attention.py: edges of its tiles, every instruction set, threads, layouts."""

from __future__ import annotations

import pytest
import torch
from judged import bounds_of, judge_attention, judge_single_query_attention
from pairwise import pairwise

from bclip_fast import _cpu, ops
from bclip_fast.ops.attention import LIMITS, cpu, reference
from bclip_fast.ops.attention.call import AttentionCall

DTYPES = [torch.float32, torch.bfloat16]


# The instruction sets of this machine. Only bfloat16 has a matrix unit.
SETS = [(name, dtype) for dtype in DTYPES for name in _cpu.attention_instruction_sets(dtype == torch.bfloat16)]


@pytest.fixture
def instruction_set(request, monkeypatch):
    name, dtype = request.getfixturevalue("name"), request.getfixturevalue("dtype")
    monkeypatch.setitem(cpu.INSTRUCTION_SETS, dtype, name)


# Panels have 32 rows, vectors have 16 elements, and strips of the backward have 256 queries.
@pairwise(
    name_and_dtype=SETS,
    lengths_and_dim=[([1, 15, 16, 17, 31, 32, 33, 0], 32), ([63, 65, 97], 80), ([257], 64)],
    causal_and_dropout_p=[(False, 0.2), (True, 0.2), (True, 0.0)],
)
def test_lengths_around_tile_edges_are_as_accurate_as_eager(
    name, dtype, lengths, dim, causal, dropout_p, instruction_set, nan_filled
):
    bounds = bounds_of(lengths)
    inputs = bounds, None, max(lengths), causal, dropout_p, torch.tensor(2**62 + 3) if dropout_p else None, 0.2
    judge_attention(
        lambda qkv: torch.ops.bclip.attention(qkv, *inputs, "cpu")[0], inputs, (sum(lengths), 2, dim), dtype
    )


@pairwise(name_and_dtype=SETS, causal_and_dropout_p=[(False, 0.2), (True, 0.0)])
def test_single_query_around_tile_edges_is_as_accurate_as_eager(
    name, dtype, causal, dropout_p, instruction_set, nan_filled
):
    lengths = [2, 15, 16, 17, 33, 300]
    bounds = bounds_of(lengths)
    seed, rows = torch.tensor(2**62 + 3) if dropout_p else None, bounds[1:].long() - 1
    inputs = rows, bounds, causal, dropout_p, seed, 0.2
    judge_single_query_attention(
        lambda *tensors: torch.ops.bclip.pooled_attention(*tensors, *inputs, "cpu")[0],
        inputs,
        sum(lengths),
        (len(lengths), 2, 80),
        dtype,
    )


@pairwise(tokens_and_dim=[(1024, 32), (300, 96), (70, 128), (600, 48)], dtype=DTYPES, causal=[False, True])
def test_long_sequences_and_wide_heads_are_as_accurate_as_eager(tokens, dim, dtype, causal, nan_filled):
    mask = torch.arange(tokens) % 7 != 3
    judge_attention(
        lambda qkv: ops.fused_attention(qkv[None], mask[None], causal=causal, backend="cpu")[0],
        (None, mask, tokens, causal, 0.0, None, dim**-0.5),
        (tokens, 1, dim),
        dtype,
    )


@pairwise(name_and_dtype=SETS, scale=[30.0, -3.0, 0.0])
def test_scores_of_any_size_and_sign_give_accurate_results(name, dtype, scale, instruction_set):
    qkv = torch.randn(2, 50, 3, 2, 32).to(dtype)
    # Eager rounds scale * q to bfloat16 first, which changes a softmax of scores in the hundreds completely. So the
    # truth is the reference in float64 instead.
    rows = qkv.flatten(0, 1)
    options = None, None, 50, False, 0.0, None, scale
    truth = reference.forward(AttentionCall(rows.double(), *options))
    out, lse = cpu.forward(AttentionCall(rows, *options))
    torch.testing.assert_close(lse.double(), truth[1], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.double(), truth[0], rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-3)


def test_nan_in_one_sequence_does_not_spread():
    qkv = torch.randn(3, 20, 3, 2, 32)
    qkv[1, 4, 0, 1, 5] = torch.nan
    out = ops.fused_attention(qkv, backend="cpu")
    assert out[1, 4, 1].isnan().all()
    assert out.isnan().sum() == 32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_number_of_threads_does_not_change_results(dtype):
    qkv, bounds = torch.randn(400, 3, 3, 64).to(dtype), bounds_of([3, 197, 50, 0, 150])
    call = AttentionCall(qkv, bounds, None, 197, False, 0.1, torch.tensor(7), 0.125)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out, lse = cpu.forward(call)
        results.append([out, lse, cpu.backward(call, torch.ones_like(out), out, lse)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_strided_inputs_give_the_same_gradients():
    wide = torch.randn(2, 30, 3, 2, 64)
    qkv = wide[:, 3:25, :, :, :32].requires_grad_()
    plain = qkv.detach().clone().requires_grad_()
    assert not qkv.is_contiguous()
    mask = (torch.arange(44) % 2 == 0).view(22, 2).T
    grads = [torch.autograd.grad(ops.fused_attention(x, mask, backend="cpu").sum(), x)[0] for x in (qkv, plain)]
    assert torch.equal(*grads)


def test_unsupported_inputs_are_refused_with_a_reason():
    assert "float64" in LIMITS["cpu"](torch.zeros(1, 3, 1, 32, dtype=torch.float64))
    assert "multiple of 16" in LIMITS["cpu"](torch.zeros(1, 3, 1, 24))
    call = _cpu.Attention("mmx", 0, False, 0, 1, 16, 0, 0, 0, False, 1.0, 0.0, 0)
    with pytest.raises(ValueError, match="no mmx"):
        _cpu.attention_forward(call, 0, 0, 1)

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as_eager, every_backend, skip_if_refused

from bclip_fast import ops
from bclip_fast.ops.attention import LIMITS, reference

SHAPES = [(2, 197, 3, 64), (1, 1, 1, 32), (3, 13, 2, 64)]  # (B, N, H, d): BiomedCLIP's, one token, primes


def sdpa(qkv, key_mask=None, causal=False):
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal).transpose(1, 2)


@pytest.mark.parametrize("backend", every_backend(LIMITS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_matches_reference(backend, shape, dtype, masked, causal, nan_filled):
    batch, tokens, heads, dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, dim).to(dtype)
    skip_if_refused(LIMITS, backend, qkv)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (batch, 1)) if masked else None
    assert_as_accurate_as_eager(
        lambda qkv: ops.fused_attention(qkv, mask, causal=causal, backend=backend),
        lambda qkv: reference.dense(qkv, mask, causal, 0.0, dim**-0.5),
        [qkv],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_scaled_dot_product_attention(causal):
    qkv = torch.randn(2, 11, 3, 2, 16, dtype=torch.float64)
    torch.testing.assert_close(ops.fused_attention(qkv, causal=causal, backend="reference"), sdpa(qkv, None, causal))
    mask = torch.arange(11) < torch.tensor([[4], [11]])
    if not causal:
        torch.testing.assert_close(ops.fused_attention(qkv, mask), sdpa(qkv, mask))


def test_a_row_without_keys_is_zero_and_has_a_finite_gradient():
    qkv = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False] * 5])
    out = ops.fused_attention(qkv, mask)
    out.sum().backward()
    assert (out[1] == 0).all()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("backend", every_backend(LIMITS))
def test_varlen_equals_each_sequence_alone(backend, nan_filled):
    lengths = [5, 1, 0, 17]
    qkv = torch.randn(sum(lengths), 3, 2, 32)
    skip_if_refused(LIMITS, backend, qkv)
    bounds = torch.tensor([0, 5, 6, 6, 23], dtype=torch.int32)
    out = ops.varlen_attention(qkv, bounds, max(lengths), backend=backend)
    for start, stop in [(0, 5), (5, 6), (6, 23)]:
        torch.testing.assert_close(out[start:stop], sdpa(qkv[None, start:stop])[0])


def test_dropout_keeps_the_mean_and_is_seeded():
    qkv = torch.randn(1, 64, 3, 4, 16)
    torch.manual_seed(1)
    first = ops.fused_attention(qkv, dropout_p=0.3)
    torch.manual_seed(1)
    assert torch.equal(first, ops.fused_attention(qkv, dropout_p=0.3))
    mean = torch.stack([ops.fused_attention(qkv, dropout_p=0.3) for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, ops.fused_attention(qkv), atol=0.12, rtol=0)


def test_compiles_without_a_graph_break():
    compiled = torch.compile(lambda qkv: ops.fused_attention(qkv), fullgraph=True, backend="aot_eager")
    qkv = torch.randn(2, 7, 3, 2, 8)
    torch.testing.assert_close(compiled(qkv), ops.fused_attention(qkv))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.fused_attention(torch.zeros(2, 3, 4)), "qkv must be"),
        (lambda: ops.fused_attention(torch.zeros(2, 3, 3, 1, 4, dtype=torch.long)), "floating point"),
        (lambda: ops.fused_attention(torch.zeros(2, 3, 3, 1, 4), torch.ones(2, 4, dtype=torch.bool)), "key_mask"),
        (lambda: ops.fused_attention(torch.zeros(2, 3, 3, 1, 4), torch.ones(2, 3)), "bool"),
        (lambda: ops.fused_attention(torch.zeros(2, 3, 3, 1, 4), dropout_p=1.0), "dropout_p"),
        (lambda: ops.varlen_attention(torch.zeros(4, 3, 1, 4), torch.tensor([0, 3]), 4), "cu_seqlens"),
        (lambda: ops.varlen_attention(torch.zeros(4, 3, 1, 4), torch.tensor([0, 4]), 3), "max_seqlen"),
        (lambda: ops.varlen_attention(torch.zeros(4, 3, 1, 4), torch.tensor([0, 6, 4]), 9), "cu_seqlens"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()

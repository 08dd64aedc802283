"""Attention with the head dimensions and lengths of published towers: `auto` is right in all of them."""

from __future__ import annotations

import pytest
import torch

from bclip_fast.doctor import backends as doctor
from bclip_fast.ops.attention import LIMITS, fused_attention, single_query_attention
from bclip_fast.ops.attention import reference as definition
from bclip_fast.ops.attention.call import AttentionCall

# ViT-L/14: 257 tokens of 64. SigLIP SO400M/14 at 384 and 448 pixels: 729 and 1024 tokens of 72. ViT-H/14: 80.
SHAPES = [(257, 64), (729, 72), (1024, 72), (257, 80)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "dim"), SHAPES)
def test_auto_equals_definition(tokens: int, dim: int, dtype: torch.dtype) -> None:
    qkv = torch.randn(1, tokens, 3, 2, dim).to(dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    expected = definition.attention(AttentionCall(exact.flatten(0, 1), None, None, tokens, False, 0.0, None, dim**-0.5))
    upstream = torch.randn(tokens, 2, dim).to(dtype)
    out = fused_attention(qkv).flatten(0, 1)
    out.backward(upstream)
    expected.backward(upstream.double())
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for actual, truth in ((out, expected), (qkv.grad, exact.grad)):
        assert (actual.double() - truth).norm() <= bound * truth.norm()


@pytest.mark.parametrize("dim", [64, 72])
def test_pooling_query_equals_dense_attention(dim: int) -> None:
    query, key_value = torch.randn(3, 2, dim), torch.randn(3 * 729, 2, 2, dim)
    bounds = torch.arange(0, 3 * 729 + 1, 729, dtype=torch.int32)
    out = single_query_attention(query, key_value, bounds[:-1].long(), bounds)
    key, value = key_value.unflatten(0, (3, 729)).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, None], key, value)[:, :, 0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_limits_and_doctor_name_the_head_dimension() -> None:
    qkv = torch.empty(1, 729, 3, 16, 72)
    assert LIMITS["cpu"](qkv) == "the head dimension 72 is not a multiple of 16"
    assert LIMITS["triton"](qkv) == "d=72 is not 32, 64, 80, 96 or 128"
    assert LIMITS["cuda"](qkv) == "d=72 is not 32, 64, 96 or 128"
    assert LIMITS["torch"](qkv) is None
    report = "\n".join(doctor.lines())
    assert "d = 72" in report
    assert "the head dimension 72 is not a multiple of 16" in report

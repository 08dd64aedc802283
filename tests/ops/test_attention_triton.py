"""Attention in Triton without a GPU: run by Triton's interpreter, and compiled ahead of time for sm_80 and sm_90."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from inside import num_passed
from judged import judge_attention
from oracle import collected_if
from resources import CAPABILITIES, TYPES, compiled_resources

from bclip_fast import ops
from bclip_fast.ops.attention import LIMITS, reference
from bclip_fast.ops.dispatch import BackendError

pytest.importorskip("triton")
ours = pytest.importorskip("bclip_fast.ops.attention.triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton reads the variable where kernels are defined, so a process has either interpreted or compiled kernels.
interpreted, compiled = collected_if(INTERPRETED), collected_if(not INTERPRETED)

SEED = torch.tensor(-(2**40) + 12345)


@compiled
def test_under_the_interpreter():
    """What this file marks as interpreted, and those tests of the operator that don't take it minutes."""
    files = "test_attention.py", "test_single_query_attention.py", Path(__file__).name
    assert num_passed(files, "triton and not 197 and not 256 and not 700", TRITON_INTERPRET="1") >= 30


def bounds_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def check(shape, dtype, cu_seqlens, key_mask, max_seqlen, causal, dropout_p, scale=0.2):
    options = cu_seqlens, key_mask, max_seqlen, causal, dropout_p, SEED if dropout_p else None, scale
    judge_attention(lambda qkv: torch.ops.bclip.attention(qkv, *options, "triton")[0], options, shape, dtype)
    qkv = torch.randn(shape[0], 3, *shape[1:]).to(dtype)
    lse = torch.ops.bclip.attention(qkv, *options, "triton")[1]
    torch.testing.assert_close(lse.double(), reference.forward(qkv.double(), *options)[1], rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize(
    ("shape", "masked", "causal", "dropout_p"),
    [  # (B, N, H, d)
        ((2, 199, 1, 64), False, False, 0.3),
        ((2, 71, 1, 64), True, False, 0.3),
        ((3, 13, 2, 32), False, False, 0.0),
        ((1, 67, 2, 80), True, False, 0.3),
        ((1, 67, 1, 96), False, False, 0.0),
        ((2, 41, 1, 128), True, True, 0.3),
        ((1, 67, 2, 64), False, True, 0.0),
        ((1, 307, 1, 64), True, False, 0.6),
    ],
    ids=str,
)
def test_triton_float16_dense(shape, masked, causal, dropout_p, nan_filled):
    batch, tokens, heads, dim = shape
    mask = torch.rand(batch * tokens) < 0.7 if masked else None
    if masked:
        mask[:tokens] &= torch.arange(tokens) >= 5
        mask[-tokens:] &= batch == 1
    check((batch * tokens, heads, dim), torch.float16, None, mask, tokens, causal, dropout_p)


@interpreted
@pytest.mark.parametrize(("causal", "dropout_p"), [(False, 0.3), (False, 0.0), (True, 0.0)])
def test_triton_float16_ragged(causal, dropout_p, nan_filled):
    """Lengths on both sides of 64 and 128, where a row kernel's programs part."""
    lengths = [67, 0, 131, 1, 64, 2, 0]
    check((sum(lengths), 2, 64), torch.float16, bounds_of(lengths), None, 199, causal, dropout_p)


@interpreted
def test_triton_enough_heads_for_one_program_each(nan_filled, monkeypatch):
    monkeypatch.setattr(ours, "FEW_PROGRAMS", 6)
    lengths = [67, 1, 13]
    check((sum(lengths), 2, 32), torch.float16, bounds_of(lengths), None, 71, False, 0.2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_triton_reads_any_strides(dtype):
    """A projection that is part of something wider, and the gradient of a sum, whose strides are zero."""
    wide = torch.randn(37, 4, 2, 40, dtype=dtype)
    strided = wide[:, :3, :, :32]
    for qkv in (strided, strided.transpose(2, 3).contiguous().transpose(2, 3)):
        grads = []
        for tensor in (qkv, qkv.contiguous()):
            leaf = tensor.detach().requires_grad_()
            out = ops.varlen_attention(leaf, bounds_of([30, 7]), 30, backend="triton")
            grads.append(torch.autograd.grad(out.sum(), leaf)[0])
        assert torch.equal(*grads)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_triton_nothing_leaks_into_the_next_sequence(dtype):
    qkv = torch.randn(50, 3, 1, 32, dtype=dtype)
    qkv[19:31] = float("nan")
    leaf = qkv.requires_grad_()
    out = ops.varlen_attention(leaf, bounds_of([19, 12, 19]), 19, dropout_p=0.1, seed=1, backend="triton")
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    for tensor in (out, gradient):
        assert tensor[:19].isfinite().all() and tensor[31:].isfinite().all() and tensor[19:31].isnan().all()


@interpreted
@pytest.mark.parametrize(("tokens", "first", "dtype"), [(61, 0, torch.float16), (331, 288, torch.float16)], ids=str)
def test_triton_drops_the_same_weights_bit_for_bit(tokens, first, dtype):
    """With keys of zero the output is the sum of the values kept: here of 32 keys, each with a place of its own."""
    qkv = torch.zeros(2 * tokens, 3, 2, 32, dtype=dtype)
    for start in (0, tokens):
        qkv[start + first : start + first + 32, 2] = torch.eye(32, dtype=dtype)[:, None]
    out, _ = ours.forward(qkv, None, None, tokens, False, 0.25, SEED, 1.0)
    kept = reference.dropout_mask(slice(0, 2 * tokens), (2, tokens), qkv, 0.25, SEED)[..., first : first + 32] > 0
    assert torch.equal(out.unflatten(0, (2, tokens)).transpose(1, 2) > 0, kept)
    assert 0.7 < kept.double().mean() < 0.8


def test_limits_say_why():
    limits = LIMITS["triton"]
    qkv = torch.ones(3, 3, 1, 32)
    assert "d is 48" in limits(torch.ones(3, 3, 1, 48)) and "float64" in limits(qkv.double())
    if INTERPRETED:
        assert limits(qkv) is None and "bfloat16" in limits(qkv.bfloat16())
    else:
        with pytest.raises(BackendError, match="not cuda"):
            ops.varlen_attention(qkv, bounds_of([3]), 3, backend="triton")


@compiled
def test_triton_refuses_sequences_beyond_int32():
    with pytest.raises(ValueError, match="more than"):
        ours._operand(torch.empty(9, 3, 1, 32), 2**25)


def resources(name, dtype, dim, max_seqlen, variant, capability, folder):
    kernel = getattr(ours, name + "_kernel")
    constants = {**ours.configuration(name, dtype, dim, max_seqlen), "HEADS": 12}
    constants |= {arg: value for arg, value in VARIANTS[variant].items() if arg in kernel.arg_names}
    types = dict.fromkeys(["qkv", "out", "grad_out", "grad_qkv"], f"*{TYPES[dtype]}")
    types |= {"cu_seqlens": "*i32", "key_mask": "*u8", "seed": "*i64", "lse": "*fp32", "delta": "*fp32"}
    types |= {"keep_scale": "fp32", "scale": "fp32"}
    return compiled_resources(kernel, types, constants, capability, folder)


VARIANTS = {
    "images": {"CAUSAL": False, "DROPOUT": False, "cu_seqlens": None, "key_mask": None, "seed": None},
    "images with dropout": {"CAUSAL": False, "DROPOUT": True, "cu_seqlens": None, "key_mask": None},
    "captions": {"CAUSAL": False, "DROPOUT": True, "key_mask": None},
    "masks": {"CAUSAL": True, "DROPOUT": True, "cu_seqlens": None},
}
KERNELS = ["_row_forward", "_row_backward", "_block_forward", "_query_backward", "_key_backward"]
# Shared memory of a multiprocessor, of which each program takes 1 KiB for itself (CUDA's compute capabilities table).
SHARED = {80: 164 * 1024, 90: 228 * 1024}


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name in KERNELS[:2] for variant in ("images", "captions")]
    + [(name, "masks") for name in KERNELS[2:]],
)
def test_compile_without_spills(name, variant, capability, tmp_path):
    needs = resources(name, torch.bfloat16, 64, 256, variant, capability, tmp_path)
    assert needs.spilled == 0
    # As configuration() says: two programs of 8 warps on a multiprocessor.
    programs = 2 if name == "_row_forward" else 1
    assert programs * (needs.shared + 1024) <= SHARED[capability]
    assert programs * 256 * needs.registers <= 65536


SHORT = [(torch.bfloat16, 64, 64), (torch.bfloat16, 64, 128), (torch.float16, 64, 256), (torch.bfloat16, 80, 256)]
WIDTHS = [(torch.bfloat16, dim, 256) for dim in (32, 80, 128)] + [(torch.float32, dim, 256) for dim in (64, 80)]
SLOW = [
    *itertools.product(KERNELS[:1], [*SHORT, (torch.bfloat16, 128, 256)], ["images with dropout", "captions"]),
    *itertools.product(KERNELS[1:2], SHORT[:3], ["images with dropout", "captions"]),
    *itertools.product(KERNELS[2:], WIDTHS, ["captions", "masks"]),
]


@compiled
@pytest.mark.long
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("name", "sizes", "variant"), SLOW, ids=str)
def test_the_rest_compiles_without_spills(name, sizes, variant, capability, tmp_path):
    needs = resources(name, *sizes, variant, capability, tmp_path)
    assert needs.spilled == 0 and needs.shared + 1024 <= SHARED[capability]

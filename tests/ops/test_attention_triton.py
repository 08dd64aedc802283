"""Attention in Triton without a GPU: run by Triton's interpreter, and compiled ahead of time for sm_80 and sm_90."""

from __future__ import annotations

import itertools
from pathlib import Path

import launches
import pytest
import torch
from inside import num_passed
from interpreter import ENVIRONMENT, INTERPRETED, RUNS_KERNELS, compiled, interpreted
from judged import SEED, bounds_of, judge_attention_operator, judge_longer_sequence
from launches import ATTENTION_KERNELS as KERNELS
from resources import CAPABILITIES, compiled_resources

from bclip_fast import ops
from bclip_fast.ops.attention import LIMITS, reference
from bclip_fast.ops.attention.call import AttentionCall, SingleQueryCall
from bclip_fast.ops.dispatch import BackendError

pytest.importorskip("triton")
ours = pytest.importorskip("bclip_fast.ops.attention.triton")
single_query = pytest.importorskip("bclip_fast.ops.attention.single_query.triton")


@compiled
@pytest.mark.slow
def test_suite_passes_under_the_interpreter():
    """Runs the tests that this file marks as interpreted, and the operator's tests that don't take minutes."""
    files = "test_attention.py", "test_single_query_attention.py", Path(__file__).name
    assert num_passed(files, "triton and not 197 and not 256 and not 700", **ENVIRONMENT) >= 30


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
def test_triton_float16_dense_is_as_accurate_as_eager(shape, masked, causal, dropout_p, nan_filled):
    batch, tokens, heads, dim = shape
    mask = torch.rand(batch * tokens) < 0.7 if masked else None
    if masked:
        mask[:tokens] &= torch.arange(tokens) >= 5
        mask[-tokens:] &= batch == 1
    judge_attention_operator(
        "triton", (batch * tokens, heads, dim), torch.float16, None, mask, tokens, causal, dropout_p
    )


@interpreted
@pytest.mark.parametrize(("causal", "dropout_p"), [(False, 0.3), (False, 0.0), (True, 0.0)])
def test_triton_float16_ragged_is_as_accurate_as_eager(causal, dropout_p, nan_filled):
    """The lengths lie on both sides of 64 and 128, the tile sizes of the row kernels."""
    lengths = [67, 0, 131, 1, 64, 2, 0]
    judge_attention_operator(
        "triton", (sum(lengths), 2, 64), torch.float16, bounds_of(lengths), None, 199, causal, dropout_p
    )


@interpreted
def test_triton_enough_heads_for_one_program_each_are_as_accurate_as_eager(nan_filled, monkeypatch):
    monkeypatch.setattr(ours, "FEW_PROGRAMS", 6)
    lengths = [67, 1, 13]
    judge_attention_operator("triton", (sum(lengths), 2, 32), torch.float16, bounds_of(lengths), None, 71, False, 0.2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_triton_strided_inputs_give_the_same_gradients(dtype):
    """The projection is part of a wider tensor, and the gradient of the sum has zero strides."""
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
def test_triton_nan_in_one_sequence_does_not_spread(dtype):
    qkv = torch.randn(50, 3, 1, 32, dtype=dtype)
    qkv[19:31] = float("nan")
    leaf = qkv.requires_grad_()
    out = ops.varlen_attention(leaf, bounds_of([19, 12, 19]), 19, dropout_p=0.1, seed=1, backend="triton")
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    for tensor in (out, gradient):
        assert tensor[:19].isfinite().all()
        assert tensor[31:].isfinite().all()
        assert tensor[19:31].isnan().all()


@interpreted
@pytest.mark.parametrize(
    ("dtype", "causal"), [(torch.float16, False), (torch.float16, True), (torch.float32, False)], ids=str
)
def test_triton_sequence_longer_than_max_seqlen_changes_no_other(dtype, causal, nan_filled):
    judge_longer_sequence(ours, dtype, causal)


@interpreted
def test_triton_single_query_outside_its_sequence_reads_no_other():
    query, pairs = torch.randn(2, 1, 32), torch.randn(20, 2, 1, 32)
    options = bounds_of([5, 15]), True, 0.0, None, 0.2
    calls = [SingleQueryCall(query, pairs, torch.tensor(rows), *options) for rows in ([9, 10], [4, 10])]
    results = []
    for call in calls:
        out, lse = single_query.forward(call)
        results.append([out, lse, *single_query.backward(call, torch.ones_like(out), out, lse)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@interpreted
def test_triton_attention_with_little_shared_memory_is_as_accurate_as_eager(nan_filled, monkeypatch):
    """sm_86, sm_89 and sm_120 give a program 99 KiB, too little for the row kernels with 256 keys."""
    monkeypatch.setattr(ours, "triton_block_bytes", lambda tensor: 99 * 1024)
    judge_attention_operator("triton", (131, 1, 64), torch.float16, None, None, 131, False, 0.3)
    bounds = bounds_of([131, 7])
    judge_attention_operator("triton", (138, 1, 128), torch.float16, bounds, None, 140, False, 0.0)


@interpreted
@pytest.mark.parametrize(("tokens", "first", "dtype"), [(61, 0, torch.float16), (331, 288, torch.float16)], ids=str)
def test_triton_dropout_drops_the_weights_of_the_reference(tokens, first, dtype):
    """With zero keys, the output is the sum of the kept values: here 32 keys, each with its own output element."""
    qkv = torch.zeros(2 * tokens, 3, 2, 32, dtype=dtype)
    for start in (0, tokens):
        qkv[start + first : start + first + 32, 2] = torch.eye(32, dtype=dtype)[:, None]
    call = AttentionCall(qkv, None, None, tokens, False, 0.25, SEED, 1.0)
    out, _ = ours.forward(call)
    kept = reference.dropout_mask(call, slice(0, 2 * tokens), (2, tokens), qkv.dtype)[..., first : first + 32] > 0
    assert torch.equal(out.unflatten(0, (2, tokens)).transpose(1, 2) > 0, kept)
    assert 0.7 < kept.double().mean() < 0.8


def test_limits_give_reasons():
    limits = LIMITS["triton"]
    qkv = torch.ones(3, 3, 1, 32)
    assert "d=48" in limits(torch.ones(3, 3, 1, 48))
    assert "float64" in limits(qkv.double())
    if RUNS_KERNELS:
        assert limits(qkv) is None
        assert ("bfloat16" in limits(qkv.bfloat16())) if INTERPRETED else limits(qkv.bfloat16()) is None
    else:
        with pytest.raises(BackendError, match="not cuda"):
            ops.varlen_attention(qkv, bounds_of([3]), 3, backend="triton")


@compiled
def test_triton_sequence_beyond_int32_raises_an_error():
    with pytest.raises(ValueError, match="exceed the 2\\^31 elements"):
        ours._operand(torch.empty(9, 3, 1, 32), 2**25)


def resources(*launch, capability, folder):
    return compiled_resources(*launches.attention(*launch), capability, folder)


# Shared memory of a multiprocessor, of which each program takes 1 KiB for itself (CUDA's compute capabilities table).
SHARED = {80: 164 * 1024, 90: 228 * 1024}


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name in KERNELS[:2] for variant in ("images", "captions")]
    + [(name, "masks") for name in KERNELS[2:]],
)
def test_kernel_compiles_without_spills(name, variant, capability, tmp_path):
    needs = resources(name, torch.bfloat16, 64, 256, variant, capability=capability, folder=tmp_path)
    assert needs.spilled == 0
    # `configuration` promises two programs of 8 warps per multiprocessor.
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
def test_other_variants_compile_without_spills(name, sizes, variant, capability, tmp_path):
    needs = resources(name, *sizes, variant, capability=capability, folder=tmp_path)
    assert needs.spilled == 0
    assert needs.shared + 1024 <= SHARED[capability]

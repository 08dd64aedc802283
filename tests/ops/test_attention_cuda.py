"""Attention in CUDA C++ without a GPU: the kernels' meaning on the host (csrc/cuda/device.cuh), plain and sanitized."""

from __future__ import annotations

import itertools
import types
from pathlib import Path

import cuda_emulator
import pytest
import torch
from cuda_emulator import ON_GPU, hosted, outside
from inside import num_passed
from judged import judge_attention

from bclip_fast import ops
from bclip_fast.ops import cuda_device
from bclip_fast.ops.attention import CUDA_BLOCK_BYTES, LIMITS, cuda, reference
from bclip_fast.ops.cuda_device import CUDA_HOST, cuda_module

SEED = torch.tensor(-(2**40) + 12345)


@outside
def test_on_the_host():
    """What this file marks as hosted, and every test of the operator that takes a backend."""
    assert num_passed(["test_attention.py", Path(__file__).name], "cuda", **cuda_emulator.environment()) >= 45


@outside
def test_on_the_host_under_the_sanitizers():
    sanitized = cuda_emulator.environment(sanitized=True)
    assert num_passed([Path(__file__).name], "hosted_ragged or hosted_dense", **sanitized) >= 12


def bounds_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def check(shape, dtype, cu_seqlens, key_mask, max_seqlen, causal, dropout_p, scale=0.2):
    options = cu_seqlens, key_mask, max_seqlen, causal, dropout_p, SEED if dropout_p else None, scale
    judge_attention(lambda qkv: torch.ops.bclip.attention(qkv, *options, "cuda")[0], options, shape, dtype)
    qkv = torch.randn(shape[0], 3, *shape[1:]).to(dtype)
    lse = torch.ops.bclip.attention(qkv, *options, "cuda")[1]
    torch.testing.assert_close(lse.double(), reference.forward(qkv.double(), *options)[1], rtol=1e-5, atol=1e-5)


@hosted
@pytest.mark.parametrize(
    ("shape", "masked", "causal", "dropout_p"),
    [  # (B, N, H, d)
        ((1, 197, 1, 64), False, False, 0.3),
        ((2, 71, 1, 64), True, False, 0.3),
        ((2, 13, 2, 32), True, True, 0.3),
        ((1, 67, 1, 96), False, False, 0.0),
        ((1, 41, 1, 128), True, True, 0.3),
        ((1, 67, 2, 64), False, True, 0.0),
        ((3, 1, 2, 64), False, False, 0.0),
        ((1, 256, 1, 64), False, True, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuda_hosted_dense(shape, masked, causal, dropout_p, dtype, nan_filled):
    batch, tokens, heads, dim = shape
    mask = torch.rand(batch * tokens) < 0.7 if masked else None
    if masked and batch > 1:
        mask[:tokens] &= torch.arange(tokens) >= 5
        mask[-tokens:] = False
    check((batch * tokens, heads, dim), dtype, None, mask, tokens, causal, dropout_p)


@hosted
@pytest.mark.parametrize(("causal", "dropout_p"), [(False, 0.3), (True, 0.0)])
@pytest.mark.parametrize(("dim", "longest"), [(64, 131), (64, 120), (32, 131), (128, 131)])
def test_cuda_hosted_ragged(causal, dropout_p, dim, longest, nan_filled):
    """Lengths on both sides of 16, 64 and 128, where tiles, strips and chunks of keys part."""
    lengths = [67, 0, longest, 1, 64, 2, 17, 0]
    check((sum(lengths), 1, dim), torch.float16, bounds_of(lengths), None, longest + 3, causal, dropout_p)


@hosted
@pytest.mark.parametrize(("tokens", "dim"), [(307, 64), (523, 32), (260, 96), (257, 128)])
@pytest.mark.parametrize(("causal", "dropout_p"), [(False, 0.0), (True, 0.3)])
def test_cuda_rows_longer_than_registers_hold(tokens, dim, causal, dropout_p, nan_filled):
    mask = torch.rand(tokens) < 0.8
    check((tokens, 1, dim), torch.float16, None, mask if causal else None, tokens, causal, dropout_p)


@hosted
def test_cuda_enough_heads_for_one_block_each(nan_filled, monkeypatch):
    monkeypatch.setattr(cuda, "FEW_BLOCKS", 3)
    check((3 * 131, 1, 64), torch.float16, None, None, 131, False, 0.0)


@hosted
@pytest.mark.skipif(ON_GPU, reason="a GPU's order can't be chosen")
def test_cuda_hosted_order_of_threads_does_not_matter():
    qkv, bounds = torch.randn(210, 3, 2, 64).half(), bounds_of([150, 60])
    results = []
    for seed in range(3):
        cuda_module().set_seed(seed)
        out, lse = cuda.forward(qkv, bounds, None, 150, True, 0.2, SEED, 0.1)
        results.append(
            [out, lse, cuda.backward(torch.ones_like(out), qkv, out, lse, bounds, None, 150, True, 0.2, SEED, 0.1)]
        )
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@hosted
@pytest.mark.parametrize(("tokens", "first"), [(50, 0), (201, 160), (300, 256)])
def test_cuda_drops_what_the_reference_drops(tokens, first):
    """With keys of zero and values of the unit matrix the output is the weights themselves."""
    qkv = torch.zeros(2 * tokens, 3, 2, 32, dtype=torch.float16)
    columns = slice(first, first + 32)
    qkv[:, 2] = torch.eye(tokens, dtype=torch.float16)[:, columns].repeat(2, 1)[:, None]
    inputs = None, None, tokens, False, 0.25, SEED, 1.0
    out, lse = cuda.forward(qkv, *inputs)
    kept = reference.dropout_mask(slice(0, 2 * tokens), (2, tokens), qkv, 0.25, SEED)[..., columns] > 0
    assert torch.equal(out.unflatten(0, (2, tokens)).transpose(1, 2) > 0, kept)
    # Back from ones, dV of a key is its column's sum in each of its elements.
    grad = cuda.backward(torch.ones_like(out), qkv, out, lse, *inputs)[:, 2].unflatten(0, (2, tokens))[:, columns]
    sums = kept.sum(2) / tokens / 0.75
    torch.testing.assert_close(grad.double(), sums.mT[..., None].expand(grad.shape).double(), rtol=2e-3, atol=2e-3)


@hosted
def test_cuda_hosted_strided_and_unaligned_inputs():
    wide = torch.randn(2, 30, 3, 2, 96).half()
    slices = [wide[..., :64], wide[..., 8:72], wide[..., 3:67], wide[:, 5:24, :, 1:, :64]]
    for qkv in slices:
        leaves = [qkv.requires_grad_(), qkv.detach().clone().requires_grad_()]
        grads = [torch.autograd.grad(ops.fused_attention(leaf, backend="cuda").sum(), leaf)[0] for leaf in leaves]
        assert torch.equal(*grads)


def test_cuda_limits_say_why():
    limits = LIMITS["cuda"]
    qkv = torch.ones(3, 3, 1, 32).half()
    assert "d is 80" in limits(torch.ones(3, 3, 1, 80).half()) and "float32" in limits(qkv.float())
    assert limits(qkv) is None if CUDA_HOST or ON_GPU else "not cuda" in limits(qkv)


@hosted
def test_cuda_blocks_of_little_memory(nan_filled, monkeypatch):
    """sm_86, sm_89 and sm_120 give a block 99 KiB: long rows of 64 elements go through in more chunks, 96 and 128 are
    refused. What is asked of them is what the kernels take."""
    module = cuda_module()
    for dim, needed in CUDA_BLOCK_BYTES.items():
        backward = module.attention_backward_shared_bytes(dim, 257, needed)
        assert module.attention_forward_shared_bytes(dim, 257) <= backward == needed
    monkeypatch.setattr(cuda, "cuda_block_bytes", lambda tensor: 99 * 1024)
    assert module.attention_backward_keys(64, 257, 99 * 1024) == 128 < module.attention_backward_keys(64, 257, 2**18)
    check((197, 2, 64), torch.float16, None, None, 197, False, 0.3)
    monkeypatch.setattr(cuda_device, "_cuda_device", lambda index: (99 * 1024, ""))
    refusals = [LIMITS["cuda"](torch.ones(3, 3, 1, dim).half()) for dim in CUDA_BLOCK_BYTES]
    assert refusals[:2] == [None, None] and all("this device gives it 101376" in reason for reason in refusals[2:])


@hosted
def test_cuda_a_device_that_fails_is_a_refusal(monkeypatch):
    """As with a driver too old for the toolkit that built the module: `auto` must then go on to the next backend."""

    def fails(index):
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(cuda_device, "cuda_module", lambda: types.SimpleNamespace(device=fails))
    cuda_device._cuda_device.cache_clear()
    try:
        assert "driver version is insufficient" in LIMITS["cuda"](torch.ones(3, 3, 1, 64).half())
        assert ops.fused_attention(torch.randn(1, 3, 3, 1, 64).half()).isfinite().all()
    finally:
        cuda_device._cuda_device.cache_clear()


@hosted
def test_cuda_compiles_without_a_graph_break():
    """As every operator's test of that name, which has float32 alone. What the device allows is asked while tracing."""
    cuda_device._cuda_device.cache_clear()
    compiled = torch.compile(lambda qkv: ops.fused_attention(qkv, backend="cuda"), fullgraph=True, backend="aot_eager")
    qkv = torch.randn(2, 7, 3, 2, 32).half().requires_grad_()
    results = [function(qkv) for function in (compiled, lambda qkv: ops.fused_attention(qkv, backend="cuda"))]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(result.sum(), qkv)[0] for result in results))


@hosted
@pytest.mark.skipif(ON_GPU, reason="takes memory that is only reserved where nothing touches it")
@pytest.mark.parametrize("dim", [32, 64])
def test_cuda_places_beyond_2_to_the_31(dim):
    """Rows that lie 2^30 elements apart, of Q, K, V and dO: an index of 32 bits would wrap."""
    far, near = torch.empty(2**31 + 4096, dtype=torch.float16), torch.randn(3, 4, 2, dim).half()
    far = far.as_strided(near.shape, (2**30, 2 * dim, dim, 1)).copy_(near)
    results = []
    for qkv, grad in ((far[:, :3], far[:, 3]), (near[:, :3], near[:, 3])):
        inputs = None, None, 3, False, 0.0, None, 0.2
        out, lse = cuda.forward(qkv, *inputs)
        results.append((out, lse, cuda.backward(grad, qkv, out, lse, *inputs)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@hosted
def test_cuda_hosted_what_the_module_refuses():
    qkv = torch.ones(3, 3, 1, 48).half()
    with pytest.raises(ValueError, match="isn't among 32, 64, 96 and 128"):
        cuda.forward(qkv, None, None, 3, False, 0.0, None, 1.0)

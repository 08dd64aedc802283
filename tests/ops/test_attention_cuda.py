"""Attention in CUDA C++ without a GPU: the kernels run on the host (csrc/cuda/device.cuh), plain and sanitized."""

from __future__ import annotations

import types
from pathlib import Path

import cuda_emulator
import pytest
import torch
from cuda_emulator import ON_GPU, hosted, outside
from inside import num_passed
from judged import SEED, bounds_of, judge_attention_operator, judge_longer_sequence

from bclip_fast import ops
from bclip_fast.ops import cuda_device
from bclip_fast.ops.attention import CUDA_BLOCK_BYTES, LIMITS, cuda, reference
from bclip_fast.ops.attention.call import AttentionCall
from bclip_fast.ops.cuda_device import CUDA_HOST, cuda_module


@outside
@pytest.mark.slow
def test_suite_passes_on_the_host():
    """Runs the tests that this file marks as hosted, and every test of the operator that takes a backend."""
    assert num_passed(["test_attention.py", Path(__file__).name], "cuda", **cuda_emulator.environment()) >= 45


@outside
def test_suite_passes_on_the_host_under_sanitizers():
    sanitized = cuda_emulator.environment(sanitized=True)
    assert num_passed([Path(__file__).name], "hosted_ragged or hosted_dense", **sanitized) >= 12


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
def test_cuda_hosted_dense_is_as_accurate_as_eager(shape, masked, causal, dropout_p, dtype, nan_filled):
    batch, tokens, heads, dim = shape
    mask = torch.rand(batch * tokens) < 0.7 if masked else None
    if masked and batch > 1:
        mask[:tokens] &= torch.arange(tokens) >= 5
        mask[-tokens:] = False
    judge_attention_operator("cuda", (batch * tokens, heads, dim), dtype, None, mask, tokens, causal, dropout_p)


@hosted
@pytest.mark.parametrize(("causal", "dropout_p"), [(False, 0.3), (True, 0.0)])
@pytest.mark.parametrize(("dim", "longest"), [(64, 131), (64, 120), (32, 131), (128, 131)])
def test_cuda_hosted_ragged_is_as_accurate_as_eager(causal, dropout_p, dim, longest, nan_filled):
    """The lengths lie on both sides of 16, 64 and 128, the sizes of tiles, strips and chunks of keys."""
    lengths = [67, 0, longest, 1, 64, 2, 17, 0]
    judge_attention_operator(
        "cuda", (sum(lengths), 1, dim), torch.float16, bounds_of(lengths), None, longest + 3, causal, dropout_p
    )


@hosted
@pytest.mark.parametrize(("tokens", "dim"), [(307, 64), (523, 32), (260, 96), (257, 128)])
@pytest.mark.parametrize(("causal", "dropout_p"), [(False, 0.0), (True, 0.3)])
def test_cuda_rows_beyond_registers_are_as_accurate_as_eager(tokens, dim, causal, dropout_p, nan_filled):
    mask = torch.rand(tokens) < 0.8
    judge_attention_operator(
        "cuda", (tokens, 1, dim), torch.float16, None, mask if causal else None, tokens, causal, dropout_p
    )


@hosted
@pytest.mark.parametrize("causal", [False, True])
def test_cuda_sequence_longer_than_max_seqlen_changes_no_other(causal, nan_filled):
    judge_longer_sequence(cuda, torch.float16, causal)


@hosted
def test_cuda_enough_heads_for_one_block_each_are_as_accurate_as_eager(nan_filled, monkeypatch):
    monkeypatch.setattr(cuda, "FEW_BLOCKS", 3)
    judge_attention_operator("cuda", (3 * 131, 1, 64), torch.float16, None, None, 131, False, 0.0)


@hosted
@pytest.mark.skipif(ON_GPU, reason="a test cannot choose the order of threads on a GPU")
def test_cuda_hosted_order_of_threads_does_not_change_results():
    call = AttentionCall(torch.randn(210, 3, 2, 64).half(), bounds_of([150, 60]), None, 150, True, 0.2, SEED, 0.1)
    results = []
    for seed in range(3):
        cuda_module().set_seed(seed)
        out, lse = cuda.forward(call)
        results.append([out, lse, cuda.backward(call, torch.ones_like(out), out, lse)])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@hosted
@pytest.mark.parametrize(("tokens", "first"), [(50, 0), (201, 160), (300, 256)])
def test_cuda_dropout_drops_the_weights_of_the_reference(tokens, first):
    """With zero keys and the unit matrix as values, the output is the weights themselves."""
    qkv = torch.zeros(2 * tokens, 3, 2, 32, dtype=torch.float16)
    columns = slice(first, first + 32)
    qkv[:, 2] = torch.eye(tokens, dtype=torch.float16)[:, columns].repeat(2, 1)[:, None]
    call = AttentionCall(qkv, None, None, tokens, False, 0.25, SEED, 1.0)
    out, lse = cuda.forward(call)
    kept = reference.dropout_mask(call, slice(0, 2 * tokens), (2, tokens), qkv.dtype)[..., columns] > 0
    assert torch.equal(out.unflatten(0, (2, tokens)).transpose(1, 2) > 0, kept)
    # For an upstream gradient of ones, every element of dV of a key is the sum of the key's column.
    grad = cuda.backward(call, torch.ones_like(out), out, lse)[:, 2].unflatten(0, (2, tokens))[:, columns]
    sums = kept.sum(2) / tokens / 0.75
    torch.testing.assert_close(grad.double(), sums.mT[..., None].expand(grad.shape).double(), rtol=2e-3, atol=2e-3)


@hosted
def test_cuda_hosted_strided_and_unaligned_inputs_give_the_same_gradients():
    wide = torch.randn(2, 30, 3, 2, 96).half()
    slices = [wide[..., :64], wide[..., 8:72], wide[..., 3:67], wide[:, 5:24, :, 1:, :64]]
    for qkv in slices:
        leaves = [qkv.requires_grad_(), qkv.detach().clone().requires_grad_()]
        grads = [torch.autograd.grad(ops.fused_attention(leaf, backend="cuda").sum(), leaf)[0] for leaf in leaves]
        assert torch.equal(*grads)


def test_cuda_limits_give_reasons():
    limits = LIMITS["cuda"]
    qkv = torch.ones(3, 3, 1, 32).half()
    assert "d=80" in limits(torch.ones(3, 3, 1, 80).half())
    assert "float32" in limits(qkv.float())
    assert limits(qkv) is None if CUDA_HOST or ON_GPU else "not cuda" in limits(qkv)


@hosted
def test_cuda_device_with_little_shared_memory_takes_short_heads_only(nan_filled, monkeypatch):
    """sm_86, sm_89 and sm_120 give a block 99 KiB. d = 64 then takes more chunks, and 96 and 128 are refused.

    The limits ask for exactly the memory that the kernels take.
    """
    module = cuda_module()
    for dim, needed in CUDA_BLOCK_BYTES.items():
        backward = module.attention_backward_shared_bytes(dim, 257, needed)
        assert max(module.attention_forward_shared_bytes(dim, 257), backward) == needed
    monkeypatch.setattr(cuda, "cuda_block_bytes", lambda tensor: 99 * 1024)
    assert module.attention_backward_keys(64, 257, 99 * 1024) == 128 < module.attention_backward_keys(64, 257, 2**18)
    judge_attention_operator("cuda", (197, 2, 64), torch.float16, None, None, 197, False, 0.3)
    monkeypatch.setattr(cuda_device, "_cuda_device", lambda index: (99 * 1024, ""))
    refusals = [LIMITS["cuda"](torch.ones(3, 3, 1, dim).half()) for dim in CUDA_BLOCK_BYTES]
    assert refusals[:2] == [None, None]
    assert all("this device gives it 101376" in reason for reason in refusals[2:])


@hosted
def test_cuda_device_that_fails_is_refused_with_its_error(monkeypatch):
    """For example, the driver is too old for the toolkit that built the module. `auto` must take the next backend."""

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
def test_cuda_compile_has_no_graph_break():
    """The other compile tests only use float32. The limits query the device while torch traces."""
    cuda_device._cuda_device.cache_clear()
    compiled = torch.compile(lambda qkv: ops.fused_attention(qkv, backend="cuda"), fullgraph=True, backend="aot_eager")
    qkv = torch.randn(2, 7, 3, 2, 32).half().requires_grad_()
    results = [function(qkv) for function in (compiled, lambda qkv: ops.fused_attention(qkv, backend="cuda"))]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(result.sum(), qkv)[0] for result in results))


@hosted
@pytest.mark.skipif(ON_GPU, reason="needs memory that the CPU only reserves, because nothing touches most of it")
@pytest.mark.parametrize("dim", [32, 64])
def test_cuda_addresses_beyond_2_to_the_31_are_right(dim):
    """Rows of Q, K, V and dO lie 2^30 elements apart, so a 32-bit index would wrap."""
    far, near = torch.empty(2**31 + 4096, dtype=torch.float16), torch.randn(3, 4, 2, dim).half()
    far = far.as_strided(near.shape, (2**30, 2 * dim, dim, 1)).copy_(near)
    results = []
    for qkv, grad in ((far[:, :3], far[:, 3]), (near[:, :3], near[:, 3])):
        call = AttentionCall(qkv, None, None, 3, False, 0.0, None, 0.2)
        out, lse = cuda.forward(call)
        results.append((out, lse, cuda.backward(call, grad, out, lse)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@hosted
def test_cuda_hosted_module_refuses_other_head_dimensions():
    qkv = torch.ones(3, 3, 1, 48).half()
    with pytest.raises(ValueError, match="isn't among 32, 64, 96 and 128"):
        cuda.forward(AttentionCall(qkv, None, None, 3, False, 0.0, None, 1.0))

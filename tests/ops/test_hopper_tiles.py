"""The epilogues of the kernels for Hopper, with tiles of 128 x 256: emulated, plain and sanitized, and on a GPU.

On other GPUs than Hopper these tests run the kernels for all GPUs.
"""

from __future__ import annotations

from pathlib import Path

import cuda_emulator
import pytest
import torch
from cuda_emulator import ON_GPU, hosted, outside
from inside import num_passed
from judged import assert_close, features

from bclip_fast.ops.contrastive import cuda, reference
from bclip_fast.ops.contrastive.call import ContrastiveCall, SoftmaxGradient
from bclip_fast.ops.cuda_device import cuda_module

HALF = torch.float16


@outside
@pytest.mark.slow
def test_suite_of_the_loss_passes_with_the_kernels_for_hopper():
    variables = cuda_emulator.environment() | {"BCLIP_HOPPER": "1"}
    assert num_passed(["test_contrastive_cuda.py", Path(__file__).name], "cuda", **variables) >= 50


@outside
def test_kernels_for_hopper_pass_under_sanitizers():
    variables = cuda_emulator.environment(sanitized=True) | {"BCLIP_HOPPER": "1"}
    assert num_passed([Path(__file__).name], "complete_wide_tile or ragged_wide_tile", **variables) == 2


def exact(call: ContrastiveCall) -> ContrastiveCall:
    wide = call.image.double(), call.text.double(), call.scale.double()
    return ContrastiveCall(*wide, call.positive_offset, 64, bias=None if call.bias is None else call.bias.double())


def judge(call: ContrastiveCall) -> None:
    """Compares all functions with the reference. Some rows and columns have no loss."""
    truth = reference.forward(exact(call))
    assert_close(cuda.forward(call), truth, 1e-6)
    num_rows = len(call.image)
    for without_loss in (False, True):
        lse = [one.clone() + 0.5 for one in truth]
        if without_loss:
            lse[0][::7], lse[1][5:9] = torch.inf, torch.inf
        upstream = SoftmaxGradient(*lse, torch.tensor(-0.3), torch.randn(num_rows) / 10)
        wide = SoftmaxGradient(*lse, torch.tensor(-0.3).double(), upstream.positive_grad)
        grads = reference.backward(exact(call), wide, torch.float64)
        assert_close(cuda.backward(call, upstream, torch.float32), grads, 3e-4)
    results = reference.siglip(exact(call), 0.1, torch.float64, True)
    assert_close(cuda.siglip(call, 0.1, torch.float32, True), results, 3e-4)
    assert_close(cuda.siglip(call, 0.1, torch.float32, False)[:1], results[:1], 1e-6)


@hosted
@pytest.mark.skipif(ON_GPU, reason="only the emulator counts launches")
def test_cuda_calls_without_groups_take_the_kernels_for_hopper(nan_filled):
    call = ContrastiveCall(features(3, 8, HALF), features(5, 8, HALF), torch.tensor(9.0), None, 64)
    cuda_module().counters.start()
    rows, columns = cuda.forward(call)
    cuda.backward(call, SoftmaxGradient(rows, columns, torch.tensor(1.0), torch.empty(0)), torch.float32)
    cuda.siglip(call, 0.1, torch.float32, True)
    cuda_module().counters.stop()
    names = [launch["kernel"] for launch in cuda_module().counters.read()]
    assert names == [f"wide_{name}<Half>" for name in ("forward", "softmax", "sigmoid")]


@hosted
def test_cuda_complete_wide_tile_matches_the_reference(nan_filled):
    judge(ContrastiveCall(features(128, 24, HALF), features(256, 24, HALF), torch.tensor(20.0), None, 256,
                          bias=torch.tensor(-2.0)))  # fmt: skip


@hosted
def test_cuda_ragged_wide_tile_matches_the_reference(nan_filled):
    """The positives of the first rows are in the first tile, and those of the last are in another."""
    judge(ContrastiveCall(features(147, 40, HALF), features(291, 40, HALF), torch.tensor(20.0), 140, 147,
                          bias=torch.tensor(-2.0)))  # fmt: skip


@hosted
@pytest.mark.parametrize("scale", [100.0, -100.0])
@pytest.mark.parametrize("opposed", ["rows", "columns", "rows of a warp"])
def test_cuda_sums_of_a_wide_tile_far_below_its_highest_are_accurate(opposed, scale, nan_filled):
    """Logits from -90 to 100, without positives: whole rows or columns of exp(S - highest) are zero."""
    direction = features(1, 31, HALF)
    image, text = features(128, 31, HALF, direction), features(256, 31, HALF, direction)
    if opposed == "columns":
        text[::5] = features(52, 31, HALF, -direction)
    else:
        chosen = slice(32, 48) if opposed == "rows of a warp" else slice(3, 128, 9)
        image[chosen] = features(len(image[chosen]), 31, HALF, -direction)
    call = ContrastiveCall(image, text, torch.tensor(scale), None, 256)
    truth = reference.forward(exact(call))
    assert torch.cat(truth).max() - torch.cat(truth).min() > 100
    assert_close(cuda.forward(call), truth, 1e-6)


@hosted
@pytest.mark.skipif(ON_GPU, reason="a test cannot choose the order of threads on a GPU")
def test_cuda_order_of_threads_does_not_change_results_of_wide_tiles():
    call = ContrastiveCall(features(150, 24, HALF), features(270, 24, HALF), torch.tensor(20.0), 0, 150)
    results = []
    for seed in range(2):
        cuda_module().set_seed(seed)
        rows, columns = cuda.forward(call)
        upstream = SoftmaxGradient(rows, columns, torch.tensor(1.0), torch.ones(150))
        results.append([rows, columns, *cuda.backward(call, upstream, torch.float32)])
        results[-1] += cuda.siglip(call, 0.1, torch.float32, True)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))

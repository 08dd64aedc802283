"""The contrastive Triton kernels without a GPU: interpreted, and compiled ahead of time for sm_80 and sm_90."""

from __future__ import annotations

from pathlib import Path

import launches
import numpy as np
import pytest
import torch
from inside import num_passed
from interpreter import ENVIRONMENT, INTERPRETED, RUNS_KERNELS, compiled, interpreted
from judged import (
    assert_close,
    features,
    judge_clip_loss,
    judge_clip_operator,
    judge_rectangle,
    judge_siglip_operator,
)
from launches import CONTRASTIVE_VARIANTS
from resources import CAPABILITIES, compiled_resources

from bclip_fast import ops
from bclip_fast.ops.contrastive import LIMITS, gpu_tiles, reference
from bclip_fast.ops.contrastive.call import ContrastiveCall
from bclip_fast.ops.dispatch import BackendError

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
ours = pytest.importorskip("bclip_fast.ops.contrastive.triton")
kernels = pytest.importorskip("bclip_fast.ops.contrastive.triton_kernels")


@compiled
@pytest.mark.slow
def test_suite_passes_under_the_interpreter():
    """Runs the tests that this file marks as interpreted, and every test of the operators that takes a backend."""
    files = "test_contrastive.py", "test_contrastive_modes.py", "test_contrastive_targets.py", Path(__file__).name
    assert num_passed(files, "triton", **ENVIRONMENT) >= 25


@interpreted
def test_triton_products_do_not_depend_on_their_place_in_a_tile():
    if not INTERPRETED:
        pytest.skip("the tests of accuracy show it on a GPU")
    left, right = features(64, 16).numpy(), features(64, 16).numpy().T
    products = left @ right
    for shift in range(1, 64):
        assert (np.roll(left, shift, 0) @ right == np.roll(products, shift, 0)).all()
        assert (left @ np.roll(right, shift, 1).copy() == np.roll(products, shift, 1)).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "scale"), [((137, 67), 14.3), ((131, 19), 100.0), ((1, 2), 14.3)], ids=str)
def test_clip_loss_of_prime_shapes_is_as_accurate_as_eager(dtype, shape, scale, nan_filled):
    judge_clip_operator("triton", shape, scale, dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(137, 67), (1, 2)], ids=str)
def test_siglip_loss_of_prime_shapes_is_as_accurate_as_eager(dtype, shape, nan_filled):
    judge_siglip_operator("triton", shape, dtype, 1e-3 if dtype == torch.float16 else 2e-6)


@interpreted
@pytest.mark.parametrize("chunk_size", [1, 13, 64])
def test_rectangle_matches_the_reference(chunk_size, nan_filled):
    for positive_offset in (97, None):
        judge_rectangle(ours, features, positive_offset, chunk_size, 1e-5)


@interpreted
def test_triton_more_rows_than_one_launch_match_the_reference():
    image, text = features(151, 7), features(157, 7)
    truth = reference.forward(ContrastiveCall(image.double(), text.double(), torch.tensor(5.0), 3, 64))
    assert_close(ours.forward(ContrastiveCall(image, text, torch.tensor(5.0), 3, 1)), truth, 1e-6)


@interpreted
def test_triton_rows_far_below_the_rest_of_their_tile_are_accurate():
    """One tile has logits from -90 to 100, so exp(S - highest) is zero in complete rows."""
    direction = features(1, 31)
    image = torch.cat([features(20, 31, aligned=direction), features(20, 31, aligned=-direction)])
    text = features(40, 31, aligned=direction)
    scale = torch.tensor(100.0)
    truth = reference.forward(ContrastiveCall(image.double(), text.double(), scale.double(), 0, 64))
    assert truth[0].max() - truth[0].min() > 150
    assert_close(ours.forward(ContrastiveCall(image, text, scale, 0, 64)), truth, 1e-6)
    # All cosines are near -0.8, so an offset by the scale would make every exponential zero.
    judge_clip_loss(lambda *a: ops.clip_loss(*a, backend="triton"), lambda: [image, text, scale, torch.tensor(0.0)])


@interpreted
def test_triton_float16_small_probabilities_survive():
    """A gradient tile that underflows would pass within eager's tolerance, so the bound here is relative."""
    image, text = features(139, 64, torch.float16), features(139, 64, torch.float16)
    scale = torch.tensor(20.0)
    leaves = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
    ours = torch.autograd.grad(ops.clip_loss(*leaves, backend="triton"), leaves)
    wide = [tensor.double().requires_grad_() for tensor in (image, text, scale)]
    truth = torch.autograd.grad(reference.dense(*wide), wide)
    assert_close(ours, [tensor.detach() for tensor in truth], 1e-3)


@interpreted
def test_triton_zero_upstream_gradient_gives_zeros():
    image = features(5, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(
        ops.clip_loss(image, features(5, 8), 10.0, backend="triton"), image, torch.zeros(())
    )
    assert torch.equal(gradient, torch.zeros_like(image))


@interpreted
def test_triton_log1p_is_accurate_to_its_last_digits():
    @triton.jit
    def kernel(x, y, SIZE: tl.constexpr):
        places = tl.arange(0, SIZE)
        tl.store(y + places, kernels._log1p(tl.load(x + places)))

    x = torch.cat([torch.logspace(-30, 0, 1023), torch.zeros(1)])
    y = torch.empty_like(x)
    kernel[(1,)](x, y, SIZE=1024)
    torch.testing.assert_close(y.double(), x.double().log1p(), rtol=5e-7, atol=0)


@compiled
def test_bfloat16_operands_are_exact_in_float16():
    features = (torch.randn(50, 30) * 1e6).bfloat16()
    (operand, zeros), units = gpu_tiles.operands(features, torch.zeros(3, 4, dtype=torch.bfloat16))
    assert operand.dtype == torch.float16
    assert 0.5 <= operand.abs().max() < 1
    large = features.abs() >= features.abs().max() * 2.0**-13
    assert torch.equal((operand.double() * units[0])[large], features.double()[large])
    assert not zeros.any()
    assert units[1] == 1


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_from_given_tiles_are_accurate(dtype):
    """Test chunks, units, scales and widths without the kernel, because the interpreter cannot run bfloat16."""
    image, text = 300 * features(37, 21, dtype), 0.01 * features(53, 21, dtype)
    tile = torch.rand(37, 53)

    def launch(start, rows, grad, partials, unit):
        grad.copy_(tile[start : start + len(rows)] * unit)
        partials.fill_(0.5)

    padded = (gpu_tiles.padded(part, 16) for part in (image, text))
    call = ContrastiveCall(*padded, torch.tensor(1.0), None, 10)
    image_grad, text_grad, sums = gpu_tiles.gradients(call, 21, torch.tensor(-3.0), dtype, (64, 128), 2, launch)
    assert image_grad.dtype == text_grad.dtype == dtype
    assert image_grad.is_contiguous()
    assert text_grad.is_contiguous()
    assert sums.tolist() == [2.0, 2.0]
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}[dtype]
    assert_close([image_grad], [-3 * tile.double() @ text.double()], tolerance)
    assert_close([text_grad], [-3 * tile.double().T @ image.double()], tolerance)


def test_limits_give_reasons():
    limits = LIMITS["triton"]
    ones = torch.ones(3, 4)
    assert "float64" in limits(ones.double(), ones.double())
    if RUNS_KERNELS:
        assert limits(ones, ones) is None
        assert limits(ones.half(), ones.half()) is None
        refusal = limits(ones.bfloat16(), ones.bfloat16())
        assert ("bfloat16" in refusal) if INTERPRETED else refusal is None
        assert "2049" in limits(torch.ones(1, 2049), torch.ones(1, 2049))
    else:
        assert "cpu" in limits(ones, ones)
        with pytest.raises(BackendError, match="not cuda"):
            ops.clip_loss(ones, ones, 1.0, backend="triton")


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONTRASTIVE_VARIANTS)
def test_kernel_compiles_without_spills(name, dtype, capability, tmp_path):
    assert spilled(name, dtype, 512, capability, tmp_path) == 0


@compiled
@pytest.mark.long
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 512), (torch.float16, 96), (torch.float16, 80)], ids=str)
@pytest.mark.parametrize("name", CONTRASTIVE_VARIANTS)
def test_other_widths_compile_without_spills(name, dtype, width, capability, tmp_path):
    assert spilled(name, dtype, width, capability, tmp_path) == 0


def spilled(name, dtype, width, capability, folder):
    launch = launches.contrastive(name, dtype, width, capability)
    return compiled_resources(*launch, capability, folder).spilled

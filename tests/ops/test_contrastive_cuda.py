"""The contrastive kernels in CUDA C++ without a GPU: they run on the host, plain and sanitized."""

from __future__ import annotations

from pathlib import Path

import cuda_emulator
import judged
import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import ON_GPU, hosted, outside
from inside import num_passed
from judged import (
    assert_close,
    judge_clip_loss,
    judge_clip_operator,
    judge_rectangle,
    judge_siglip_operator,
)

from bclip_fast import ops
from bclip_fast.benchmarks.bounds.cache import banded
from bclip_fast.ops import cuda_device
from bclip_fast.ops.contrastive import LIMITS, cuda, reference
from bclip_fast.ops.contrastive.call import ContrastiveCall, SoftmaxGradient
from bclip_fast.ops.contrastive.groups import Groups
from bclip_fast.ops.cuda_device import CUDA_HOST, cuda_module

DTYPES = [torch.float16, torch.bfloat16]


@outside
@pytest.mark.slow
def test_suite_passes_on_the_host():
    """Runs the tests that this file marks as hosted, and every test of the operators that takes a backend."""
    files = "test_contrastive.py", "test_contrastive_modes.py", "test_contrastive_targets.py", Path(__file__).name
    assert num_passed(files, "cuda", **cuda_emulator.environment()) >= 55


@outside
def test_suite_passes_on_the_host_under_sanitizers():
    sanitized = cuda_emulator.environment(sanitized=True)
    assert num_passed([Path(__file__).name], "rectangle or far_below", **sanitized) >= 5


def features(num_rows, width, dtype=torch.float16, aligned=None):
    return judged.features(num_rows, width, dtype, aligned)


@hosted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "scale"),
    [((137, 67), 14.3), ((131, 19), 100.0), ((1, 2), 14.3), ((128, 40), 50.0), ((258, 8), 20.0), ((33, 520), 90.0)],
    ids=str,
)
def test_cuda_clip_loss_of_odd_shapes_is_as_accurate_as_eager(dtype, shape, scale, nan_filled):
    judge_clip_operator("cuda", shape, scale, dtype)


@hosted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(137, 67), (1, 2), (258, 8)], ids=str)
def test_cuda_siglip_loss_of_odd_shapes_is_as_accurate_as_eager(dtype, shape, nan_filled):
    judge_siglip_operator("cuda", shape, dtype, 2e-6)


@hosted
@pytest.mark.parametrize("chunk_size", [13, 64])
@pytest.mark.parametrize("positive_offset", [97, None])
def test_cuda_rectangle_matches_the_reference(chunk_size, positive_offset, nan_filled):
    # G is rounded to float16.
    judge_rectangle(cuda, features, positive_offset, chunk_size, 3e-4)


@hosted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_groups_match_the_reference(dtype, nan_filled):
    image, text, scale = features(137, 24, dtype), features(150, 24, dtype), torch.tensor(20.0)
    ids = torch.arange(137) // 3, torch.arange(150) % 40
    groups = Groups.of(ids[0], *ids)
    wide = image.double(), text.double(), scale.double()
    call = ContrastiveCall(image, text, scale, None, 100, groups=groups.tile)
    exact_call = ContrastiveCall(*wide, None, 64, groups=groups.tile)
    lse = groups.raised(torch.cat(reference.forward(exact_call))).split([137, 150])
    nothing, weight = torch.empty(0), torch.tensor(0.2)
    truth = reference.backward(exact_call, SoftmaxGradient(*lse, weight.double(), nothing), torch.float64)
    assert_close(cuda.backward(call, SoftmaxGradient(*lse, weight, nothing), torch.float32), truth, 3e-4)
    truth = reference.siglip(exact_call, 0.1, torch.float64, True)
    assert_close(cuda.siglip(call, 0.1, torch.float32, True), truth, 3e-4)


# Complete tiles without positives take another path: the first 128 rows with the second 128 columns are one.
@hosted
@pytest.mark.parametrize("half", [20, 130])
def test_cuda_rows_far_below_the_rest_of_their_tile_are_accurate(half, nan_filled):
    """One tile has logits from -90 to 100, so exp(S - highest) is zero in complete rows."""
    direction = features(1, 31)
    image = torch.cat([features(half, 31, aligned=direction), features(half, 31, aligned=-direction)])
    text, scale = features(2 * half, 31, aligned=direction), torch.tensor(100.0)
    truth = reference.forward(ContrastiveCall(image.double(), text.double(), scale.double(), 0, 64))
    assert truth[0].max() - truth[0].min() > 150
    assert_close(cuda.forward(ContrastiveCall(image, text, scale, 0, 64)), truth, 1e-6)
    judge_clip_loss(lambda *a: ops.clip_loss(*a, backend="cuda"), lambda: [image, text, scale, torch.tensor(0.0)])


@hosted
@pytest.mark.parametrize(("size", "row", "column"), [(2, 0, 0), (256, 3, 200)])
def test_cuda_pair_without_loss_has_no_gradient(size, row, column, nan_filled):
    """S is 200 at that pair and -200 elsewhere, so exp(S - m) overflows for an m that suits the others."""
    image, text = torch.zeros(size, 8).half(), torch.zeros(size, 8).half()
    image[:, 1], text[:, :2] = 1, -1
    image[row, :2], text[column, 0] = torch.tensor([1, 0]), 1
    rows_lse, columns_lse = torch.full((size,), -199.0).double(), torch.full((size,), -199.0).double()
    rows_lse[row], columns_lse[column] = torch.inf, torch.inf
    upstream, scale = SoftmaxGradient(rows_lse, columns_lse, torch.tensor(1.0), torch.empty(0)), torch.tensor(200.0)
    grads = cuda.backward(ContrastiveCall(image, text, scale, None, 256), upstream, torch.float32)
    exact_call = ContrastiveCall(image.double(), text.double(), scale.double(), None, 256)
    assert_close(grads, reference.backward(exact_call, upstream, torch.float64), 1e-3)


@hosted
def test_cuda_negative_scale_matches_the_reference(nan_filled):
    image, text, scale = features(256, 24), features(256, 24), torch.tensor(-400.0)
    truth = reference.forward(ContrastiveCall(image.double(), text.double(), scale.double(), 0, 256))
    assert_close(cuda.forward(ContrastiveCall(image, text, scale, 0, 256)), truth, 1e-6)


@hosted
@pytest.mark.parametrize("case", ["near", "far apart", "some without loss", "none with loss"])
def test_cuda_softmax_gradient_of_complete_tiles_matches_the_reference(case, nan_filled):
    """R and Q are at least the log-sum-exps. They are within 86 ln 2 of each other, or not, or infinite."""
    image, text, scale = features(256, 24), features(256, 24), torch.tensor(20.0)
    exact_call = ContrastiveCall(image.double(), text.double(), scale.double(), None, 256)
    lse = list(reference.forward(exact_call))
    if case == "far apart":
        lse = [one + torch.linspace(0, 90, 256).double() for one in lse]
    elif case == "some without loss":
        lse[0][3], lse[1][200] = torch.inf, torch.inf
    elif case == "none with loss":
        lse[0][:], lse[1][128:] = torch.inf, torch.inf
    upstream = SoftmaxGradient(*lse, torch.tensor(0.3), torch.empty(0))
    grads = cuda.backward(ContrastiveCall(image, text, scale, None, 256), upstream, torch.float32)
    exact = SoftmaxGradient(*lse, torch.tensor(0.3).double(), torch.empty(0))
    assert_close(grads, reference.backward(exact_call, exact, torch.float64), 3e-4)


@hosted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_small_probabilities_survive(dtype):
    """A gradient tile that underflows would pass within eager's tolerance, so the bound here is relative."""
    inputs = features(139, 64, dtype), features(139, 64, dtype), torch.tensor(20.0)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    ours = torch.autograd.grad(ops.clip_loss(*leaves, backend="cuda"), leaves)
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    truth = torch.autograd.grad(reference.dense(*wide), wide)
    assert_close(ours, [tensor.detach() for tensor in truth], 1e-3 if dtype == torch.float16 else 4e-3)


@hosted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_gradients_of_a_saturated_batch_are_accurate(dtype):
    """At a loss of 1e-9 all of G is that small, and it keeps its digits in float16 times 2^14."""
    image = features(139, 64, torch.float64)
    inputs = [image.to(dtype), F.normalize(image + 0.115 * torch.randn(139, 64)).to(dtype), torch.tensor(100.0)]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = ops.clip_loss(*leaves, backend="cuda")
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    truth = reference.dense(*wide)
    assert 1e-11 < truth < 1e-7
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=0)
    ours, exact = (torch.autograd.grad(value, by) for value, by in ((1e8 * loss, leaves), (1e8 * truth, wide)))
    for actual, true in zip(ours, exact, strict=True):
        assert (actual.double() - true).norm() <= (1e-3 if dtype == torch.float16 else 4e-3) * true.norm()


@hosted
@pytest.mark.skipif(ON_GPU, reason="needs memory that the CPU only reserves, because nothing touches most of it")
def test_cuda_gradient_beyond_2_to_the_31_elements_is_right(nan_filled):
    """131 rows of G lie 2^24 elements apart, like a batch of 16 million, so a 32-bit index would wrap."""
    image, text, scale, stride = features(131, 8), features(3, 8), torch.tensor(9.0), 2**24
    torch.use_deterministic_algorithms(False)
    grads = [torch.empty(131 * one, dtype=torch.float16).as_strided((131, 3), (one, 1)) for one in (stride, 16)]
    for grad in grads:
        call, partials = ContrastiveCall(image, text, scale, 0, 131), torch.empty(2, 3)
        features_, target = cuda._features(call, 0, image, scale), cuda._gradient(grad, partials, 2.0**14)
        cuda_module().contrastive_sigmoid(features_, 0, cuda_module().Groups(0, 0, 0, 0), target)
    assert torch.equal(*grads)
    assert grads[0].count_nonzero() > 200


@hosted
def test_cuda_loss_of_too_many_columns_names_the_limit():
    """Offsets inside a tile take 32 bits."""
    module = cuda_module()
    wide = module.Features(0, 0, False, 1, 1, 2**23 + 8, 0, 0, 0)
    with pytest.raises(ValueError, match=r"more than 2\^23 columns"):
        module.contrastive_forward(wide, 0, 0)


@hosted
@pytest.mark.parametrize(("width", "height"), [(512, 32), (4096, 4), (16384, 4), (8, 2048)])
def test_cuda_blocks_take_tiles_in_bands_whose_features_stay_in_l2(width, height):
    """The features of a band's rows take 4 MiB, but a band has at least 4 rows of tiles."""
    rows, columns = 37, 5
    tiles = [cuda_module().contrastive_tile(block, rows, columns, width) for block in range(rows * columns)]
    assert tiles == [banded(height, block, rows, columns) for block in range(rows * columns)]
    assert len(set(tiles)) == rows * columns


@hosted
@pytest.mark.parametrize("operator", [ops.clip_loss, ops.siglip_loss], ids=["clip", "siglip"])
def test_cuda_compile_has_no_graph_break(operator):
    cuda_device._cuda_device.cache_clear()
    inputs = [features(9, 8).requires_grad_(), features(9, 8).requires_grad_(), torch.tensor(9.0)]
    compiled = torch.compile(lambda *a: operator(*a, backend="cuda"), fullgraph=True, backend="aot_eager")
    results = [function(*inputs) for function in (compiled, lambda *a: operator(*a, backend="cuda"))]
    assert torch.equal(*results)
    for ours, theirs in zip(*(torch.autograd.grad(result, inputs[:2]) for result in results), strict=True):
        assert torch.equal(ours, theirs)


@hosted
@pytest.mark.skipif(ON_GPU, reason="a test cannot choose the order of threads on a GPU")
def test_cuda_order_of_threads_does_not_change_results():
    call = ContrastiveCall(features(150, 24), features(150, 24), torch.tensor(20.0), 0, 64)
    results = []
    for seed in range(3):
        cuda_module().set_seed(seed)
        rows, columns = cuda.forward(call)
        upstream = SoftmaxGradient(rows, columns, torch.tensor(1.0), torch.ones(150))
        results.append([rows, columns, *cuda.backward(call, upstream, torch.float32)])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_cuda_limits_give_reasons(monkeypatch):
    limits, ones = LIMITS["cuda"], torch.ones(3, 4)
    assert "float32" in limits(ones, ones)
    assert "float64" in limits(ones.double(), ones.double())
    for dtype in DTYPES:
        reason = limits(ones, ones, dtype)
        assert reason is None if CUDA_HOST or ON_GPU else "not cuda" in reason

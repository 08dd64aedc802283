"""The C++ backend beyond test_contrastive.py: edges of its tiles, its two ways to multiply, its safe offset."""

from __future__ import annotations

import ctypes
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from judged import judge_clip_loss, judge_siglip_loss
from pairwise import pairwise

from bclip_fast import _cpu, ops
from bclip_fast.ops import pointers
from bclip_fast.ops.contrastive import LIMITS, cpu, cpu_products, reference
from bclip_fast.ops.contrastive.call import ContrastiveCall, SoftmaxGradient
from bclip_fast.ops.dispatch import BackendError, use_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def features(rows, width, dtype=torch.float32):
    return F.normalize(torch.randn(rows, width, dtype=torch.float64)).to(dtype)


WAYS = ["matrix unit"] * _cpu.has_amx() + ["library", "library in blocks"]


@pytest.fixture(params=WAYS)
def products(request, monkeypatch):
    """Multiplies bfloat16 features in both ways, if the machine has both, and takes many columns in blocks."""
    if request.param.startswith("library"):
        monkeypatch.setattr(_cpu, "has_amx", lambda: False)
        if request.param == "library in blocks":
            monkeypatch.setattr(cpu_products, "_LIBRARY_COLUMNS", 150)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.getfixturevalue("num_threads"))
    yield
    torch.set_num_threads(before)


def clip(*inputs, chunk_size=1000):
    return ops.clip_loss(*inputs, chunk_size=chunk_size, backend="cpu")


def siglip(*inputs, chunk_size=1000):
    return ops.siglip_loss(*inputs, chunk_size=chunk_size, backend="cpu")


# Tiles have 512 columns, and vectors have 16 elements. On the matrix unit, panels are 32 x 32, blocks have 512 rows, or
# fewer for D above 512, and tasks have 1024 rows.
@pytest.mark.slow
@pairwise(
    shape=[(1, 1), (2, 31), (33, 33), (523, 67), (1031, 40), (300, 1030)],
    dtype=DTYPES,
    chunk_size=[101, 1000],
    num_threads=[1, 3],
    products=WAYS,
)
def test_odd_shapes_are_as_accurate_as_eager(shape, dtype, chunk_size, num_threads, products, threads, nan_filled):

    def draw():
        return [features(*shape, dtype), features(*shape, dtype), torch.tensor(30.0), torch.tensor(-2.0)]

    for judge, loss in ((judge_clip_loss, clip), (judge_siglip_loss, siglip)):
        judge(partial(loss, chunk_size=chunk_size), draw)


def test_strided_features_give_the_same_loss(products):
    both = torch.randn(2, 24, 90, dtype=torch.bfloat16)
    image, text = both[0].T, both[1].T.flip(0).as_strided((90, 24), (1, 90))
    assert not image.is_contiguous()
    assert not text.is_contiguous()
    scale = torch.tensor(1.5)
    assert torch.equal(clip(image, text, scale), clip(image.contiguous(), text.contiguous(), scale))


@pairwise(
    dtype=DTYPES[:2],
    first_and_columns=[(0, 777), (5, 777), (700, 777), (None, 777), (700, 2100)],
    products=WAYS,
)
def test_rectangular_tile_of_ranks_matches_the_reference(dtype, first, columns, products, nan_filled):
    image, text = features(70, 48, dtype), features(columns, 48, dtype)
    scale, weight = torch.tensor(40.0), torch.tensor(0.01)
    call = ContrastiveCall(image, text, scale, first, 33)
    exact_call = ContrastiveCall(image.double(), text.double(), scale.double(), first, 1000)
    truth = reference.forward(exact_call)
    for ours, true in zip(cpu.forward(call), truth, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-5)
    # Compute gradients as if other ranks held further rows, and as if some rows and columns had no loss.
    rows, columns = truth[0] + 0.5, truth[1] + 1
    rows[3:9], columns[::5] = torch.inf, torch.inf
    positive_grad = torch.linspace(-1, -2, 70)
    upstream = SoftmaxGradient(rows, columns, weight.double(), positive_grad)
    true = reference.backward(exact_call, upstream, torch.float64)
    for result in (dtype, torch.float32):
        ours = cpu.backward(call, SoftmaxGradient(rows, columns, weight, positive_grad), result)
        assert [actual.dtype for actual in ours] == [result, result, torch.float32]
        for actual, exact in zip(ours, true, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
            assert (actual.double() - exact).norm() <= tolerance * exact.norm()


def test_siglip_tile_without_positives_matches_the_reference(products):
    image, text = features(40, 24, torch.bfloat16), features(50, 24, torch.bfloat16)
    scale, bias = torch.tensor(10.0), torch.tensor(-1.0)
    wide = [tensor.double() for tensor in (image, text, scale, bias)]
    exact_call = ContrastiveCall(*wide[:3], None, 64, bias=wide[3])
    truth = reference.siglip(exact_call, 0.1, torch.float64, True)
    ours = cpu.siglip(ContrastiveCall(image, text, scale, None, 64, bias=bias), 0.1, torch.bfloat16, True)
    for actual, exact in zip(ours, truth, strict=True):
        assert (actual.double() - exact).norm() <= 2.0**-7 * exact.norm()


def test_number_of_threads_does_not_change_results(products):
    image, text = features(1100, 64, torch.bfloat16), features(1100, 64, torch.bfloat16)
    if not _cpu.has_amx():
        # The library's products may depend on the number of threads, unless they are exact.
        image, text = ((torch.randint(-2, 3, (1100, 64)) / 16).bfloat16() for _ in range(2))
    scale = torch.tensor(50.0)
    lse = torch.full((1100,), 51.0, dtype=torch.float64)
    call = ContrastiveCall(image, text, scale, 0, 600)
    upstream = SoftmaxGradient(lse, lse + 1, torch.tensor(1e-3), torch.full((1100,), -1e-3))
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append([*cpu.forward(call)])
        if _cpu.has_amx():  # the library's matmul doesn't guarantee this
            results[-1] += cpu.backward(call, upstream, torch.bfloat16)
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def cone(rows, cosine):
    """Images and texts with all cosines near `cosine`, far from the largest that their norms allow."""
    axis = F.normalize(torch.randn(64), dim=0)
    text = F.normalize(axis + 0.01 * torch.randn(rows, 64))
    across = torch.randn(rows, 64)
    across = F.normalize(across - (across @ axis)[:, None] * axis)
    return cosine * axis + (1 - cosine**2) ** 0.5 * across, text


@pytest.mark.parametrize("scale", [100.0, 300.0, -100.0, 0.0])
def test_offset_that_underflows_gives_way_to_the_running_maximum(scale, monkeypatch):
    image, text = cone(60, -0.8)
    calls = []
    original = cpu._with_running_maximum
    monkeypatch.setattr(cpu, "_with_running_maximum", lambda *a: calls.append(1) or original(*a))
    call = ContrastiveCall(image, text, torch.tensor(scale), 0, 64)
    exact_call = ContrastiveCall(image.double(), text.double(), torch.tensor(scale).double(), 0, 64)
    for actual, exact in zip(cpu.forward(call), reference.forward(exact_call), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=2e-5)
    assert bool(calls) == (scale > 0)
    judge_clip_loss(clip, lambda: [*cone(60, -0.8), torch.tensor(scale)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_of_any_norm_are_as_accurate_as_eager(dtype):
    norms = torch.logspace(-3, 0, 40)[:, None].to(dtype)

    def draw():
        rows = [torch.randn(40, 32).to(dtype) * norms for _ in range(2)]
        return [*rows, torch.tensor(8.0), torch.tensor(500.0)]

    judge_clip_loss(clip, draw)


def test_distant_log_sum_exps_are_as_accurate_as_eager():
    norms = torch.tensor([30.0, 1.0]).repeat_interleave(25)[:, None]
    judge_clip_loss(clip, lambda: [features(50, 32) * norms, features(50, 32), torch.tensor(10.0)])


def test_infinite_and_nan_features_make_the_loss_nonfinite():
    for value in (float("nan"), float("inf")):
        image, text = features(20, 8), features(20, 8)
        image[3, 2] = value
        for loss in (clip(image, text, 10.0), siglip(image, text, 10.0, -10.0)):
            assert not loss.isfinite()


def test_float64_is_refused():
    image, text = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    assert "float64" in LIMITS["cpu"](image, text)
    with pytest.raises(BackendError, match="float64"):
        ops.clip_loss(image, text, 1.0, backend="cpu")
    with use_backend("auto"):
        ops.clip_loss(image, text, 1.0)


def test_address_of_an_unexpected_tensor_raises_an_error():
    tensor = torch.zeros(3, 4)
    assert pointers.address(tensor, torch.float32, 3, 4) == tensor.data_ptr()
    for wrong in (tensor.T, tensor.double(), tensor[:2]):
        with pytest.raises(ValueError, match="expects a contiguous"):
            pointers.address(wrong, torch.float32, 3, 4)


def test_requested_instruction_set_is_used():
    name = _cpu.instruction_set()
    assert name == os.environ.get("BCLIP_CPU_ISA", name)
    assert name in ("avx512", "avx2", "plain")
    assert name == "avx512" or not _cpu.has_amx()


def test_kernel_with_negative_sizes_raises_an_error():
    with pytest.raises(ValueError, match="negative sizes"):
        _cpu.exponential_sums(0, -1, 4, 0, 1.0, 0.0, 0, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_dtype_and_device_of_torch_do_not_change_results(dtype):
    image, text = features(300, 40, dtype), features(300, 40, dtype)
    inputs = [image.requires_grad_(), text.requires_grad_(), torch.tensor(10.0)]
    for loss in (clip, siglip):
        truth = torch.autograd.grad(loss(*inputs), inputs[:2])
        for default in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(default)
            try:
                with torch.device("meta"):
                    value = loss(*inputs)
                    gradients = torch.autograd.grad(value, inputs[:2])
            finally:
                torch.set_default_dtype(torch.float32)
            assert value.dtype == torch.float32
            assert value.device.type == "cpu"
            assert all(torch.equal(actual, true) for actual, true in zip(gradients, truth, strict=True))


def test_gradient_of_the_scale_is_summed_before_g_is_rounded(products):
    """All cosines are alike, so the rounding errors of G don't average out."""
    image, text = (part.bfloat16() for part in cone(200, -0.8))
    inputs = [image, text, torch.tensor(100.0, requires_grad=True)]
    exact = torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
    (actual,) = torch.autograd.grad(clip(*inputs), inputs[2:])
    (true,) = torch.autograd.grad(reference.dense(image.double(), text.double(), exact), exact)
    assert (actual.double() - true).abs() <= 1e-4 * true.abs()


@pytest.mark.parametrize("texts", [37, 300])
def test_kept_products_give_the_same_gradients_as_recomputed_ones(texts, monkeypatch):
    monkeypatch.setattr(cpu_products, "_LIBRARY_COLUMNS", 150)
    image, text = torch.randn(37, 24).requires_grad_(), torch.randn(texts, 24).requires_grad_()
    scale = torch.tensor(5.0, requires_grad=True)
    kept = ops.clip_loss(image, text, scale, hardness=1.0, backend="cpu")
    again = ops.clip_loss(image, text, scale, hardness=1.0, chunk_size=16, backend="cpu")
    torch.testing.assert_close(kept, again)
    first = torch.autograd.grad(kept, (image, text, scale), retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(again, (image, text, scale)))
    # A second backward pass through the same graph can still read the products.
    assert all(map(torch.equal, first, torch.autograd.grad(kept, (image, text, scale))))


def test_products_are_kept_only_with_gradients_and_without_chunk_size(monkeypatch):
    shapes = []

    def forward(*inputs, products=None):
        shapes.append(None if products is None else tuple(products.shape))
        return original(*inputs, products=products)

    original = cpu.forward
    monkeypatch.setattr(cpu, "forward", forward)
    image, text = torch.randn(5, 8), torch.randn(7, 8)
    trainable = image.clone().requires_grad_()
    ops.clip_loss(image, text, 2.0, backend="cpu")
    ops.clip_loss(trainable, text, 2.0, backend="cpu")
    ops.clip_loss(trainable, text, 2.0, chunk_size=5, backend="cpu")
    with torch.no_grad():
        ops.clip_loss(trainable, text, 2.0, backend="cpu")
    assert shapes == [None, (5, 7), None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matrix_unit_gives_gradients_of_every_dtype(dtype, monkeypatch):
    """C++ writes float32 or bfloat16. Here a function in its place fills the gradients with ones, without a unit."""
    written = []

    def gradients(image, text, in_single, scale):
        for address in (image, text):
            fill = ctypes.c_float * 40 if in_single else ctypes.c_uint16 * 40
            fill.from_address(address)[:] = [1.0 if in_single else 0x3F80] * 40
        written.append(torch.float32 if in_single else torch.bfloat16)

    monkeypatch.setattr(_cpu, "AmxGradients", gradients)
    monkeypatch.setattr(_cpu, "amx_softmax_gradient", lambda *_: 2.0)
    monkeypatch.setattr(_cpu, "amx_sigmoid_gradient", lambda *_: (1.0, 2.0, 3.0))
    monkeypatch.setattr(cpu, "takes_amx", lambda image: True)
    image, lse = features(5, 8, torch.bfloat16), torch.zeros(5, dtype=torch.float64)
    call = ContrastiveCall(image, image, torch.tensor(1.0), 0, 5)
    upstream = SoftmaxGradient(lse, lse, torch.tensor(1.0), torch.ones(5))
    for grads in (cpu.backward(call, upstream, dtype)[:2], cpu.siglip(call, 1.0, dtype, True)[1:3]):
        for grad in grads:
            assert torch.equal(grad, torch.ones(5, 8, dtype=dtype))
    assert written == [torch.bfloat16 if dtype == torch.bfloat16 else torch.float32] * 2

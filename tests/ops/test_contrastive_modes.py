"""Determinism and precision of the contrastive operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import every_backend, every_backend_and
from pairwise import pairwise
from torch._subclasses.fake_tensor import FakeTensorMode

from bclip_fast import ops
from bclip_fast.ops.contrastive import LIMITS, clip_op, siglip_op
from bclip_fast.ops.contrastive.checks import operand_dtype_for

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def features(rows, width, dtype=torch.float32):
    return [F.normalize(torch.randn(rows, width, dtype=torch.float64)).to(dtype) for _ in range(2)]


def results_of(function, *tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


LOSSES = {
    "clip": ops.clip_loss,
    "groups": lambda *a, **k: ops.clip_loss(*a, groups=torch.arange(len(a[0])) // 3, **k),
    "siglip": lambda *a, **k: ops.siglip_loss(*a, -5.0, **k),
}


@pairwise(backend_and_dtype=every_backend_and("contrastive", *DTYPES), name=list(LOSSES))
def test_repeated_calls_give_the_same_bits(backend, dtype, name):
    image, text = features(140 if backend in ("triton", "cuda") else 530, 48, dtype)
    scale = torch.tensor(30.0)

    def run(image, text, scale):
        return LOSSES[name](image, text, scale, chunk_size=100, deterministic=True, backend=backend)

    first = results_of(run, image, text, scale)
    # The address of the features must not change a matmul of the library either.
    shifted = []
    for features_ in (image, text):
        memory = torch.empty(features_.numel() + 3, dtype=dtype)
        shifted.append(memory[3:].view_as(features_).copy_(features_))
    for inputs in ([image, text], [image, text], shifted):
        for one, other in zip(first, results_of(run, *inputs, scale), strict=True):
            assert torch.equal(one, other)


def test_deterministic_on_cuda_needs_a_cublas_workspace(monkeypatch):
    class OnCuda:
        device, dtype, shape = torch.device("cuda"), torch.float32, (4, 8)

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert LIMITS["reference"](OnCuda, OnCuda) is None
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in LIMITS["reference"](OnCuda, OnCuda, None, True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert LIMITS["reference"](OnCuda, OnCuda, None, True) is None


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((torch.float32, "cuda", None, None), torch.float32),
        ((torch.float32, "cuda", None, torch.bfloat16), torch.float16),
        ((torch.float32, "cuda", None, torch.float16), torch.float16),
        ((torch.float32, "cuda", torch.bfloat16, torch.float16), torch.bfloat16),
        ((torch.float32, "cpu", None, torch.bfloat16), torch.bfloat16),
        ((torch.float32, "cpu", torch.float32, torch.bfloat16), torch.float32),
        ((torch.float64, "cpu", None, torch.bfloat16), torch.float64),
        ((torch.bfloat16, "cuda", None, torch.float16), torch.bfloat16),
        ((torch.bfloat16, "cuda", torch.float16, None), torch.float16),
    ],
    ids=str,
)
def test_operand_dtype_follows_request_and_autocast(case, expected):
    assert operand_dtype_for(*case) == expected


@pytest.mark.parametrize("asked", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_operand_dtype_wider_or_not_floating_raises_an_error(asked):
    with pytest.raises(ValueError, match="operand_dtype must be a floating dtype no wider"):
        ops.clip_loss(torch.eye(2), torch.eye(2), 1.0, operand_dtype=asked)


@pytest.mark.parametrize("backend", every_backend("contrastive", torch.float16))
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_rounded_operands_are_not_rounded(backend, name):
    """The float32 features are times 2**-12, so float16 gradients would be zero. The rounded features are the truth."""
    image, text = (part * 2.0**-12 for part in features(40, 24))
    scale = torch.tensor(20.0 * 2**-12)
    actual = results_of(lambda *a: LOSSES[name](*a, operand_dtype=torch.float16, backend=backend), image, text, scale)
    truth = results_of(LOSSES[name], image.half().double(), text.half().double(), scale.double())
    for ours, true in zip(actual, truth, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - true).norm() <= 1e-3 * true.norm()
    assert 0 < actual[1].abs().max() < 6e-8


@pytest.mark.parametrize("backend", every_backend("contrastive", torch.float16))
@pytest.mark.parametrize("name", LOSSES)
def test_float64_features_with_rounded_operands_are_accurate(backend, name):
    """The scalars are float64 there, but kernels of half-precision operands read float32."""
    inputs = [*features(40, 24, torch.float64), torch.tensor(20.0, dtype=torch.float64)]
    actual = results_of(lambda *a: LOSSES[name](*a, operand_dtype=torch.float16, backend=backend), *inputs)
    truth = results_of(LOSSES[name], inputs[0].half().double(), inputs[1].half().double(), inputs[2])
    for ours, true in zip(actual, truth, strict=True):
        assert ours.dtype == torch.float64
        assert (ours - true).norm() <= 1e-3 * true.norm()


@pytest.mark.parametrize("operator", ["clip_loss", "siglip_loss"])
@pytest.mark.parametrize("backend", every_backend("contrastive", torch.float16))
def test_float64_features_with_rounded_operands_are_registered(backend, operator):
    """Fake tensors have the dtypes of real results."""
    image, text = features(6, 8, torch.float64)
    scale, ids = torch.tensor(20.0, dtype=torch.float64), torch.arange(6) // 2
    results = {
        "clip_loss": lambda *a, ids=None: clip_op.clip_loss(*a, ids, ids, 6, 0.0, 4, torch.float16, False, backend),
        "siglip_loss": lambda *a, ids=None: siglip_op.siglip_loss(*a, a[2], ids, ids, 4, torch.float16, True, backend),
    }[operator]
    for given in (None, ids):
        real = results(image, text, scale, ids=given)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = results(image, text, scale, ids=given)
        assert [(each.dtype, each.shape) for each in fake] == [(each.dtype, each.shape) for each in real]

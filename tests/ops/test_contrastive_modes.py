"""How the contrastive operators run: the same bits each time, in which precision, with and without the dispatcher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import every_backend, every_backend_and
from pairwise import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

from bclip_fast import ops
from bclip_fast.ops import contrastive
from bclip_fast.ops.contrastive import LIMITS, operand_dtype_for

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
def test_the_same_bits_each_time(backend, dtype, name):
    image, text = features(140 if backend in ("triton", "cuda") else 530, 48, dtype)
    scale = torch.tensor(30.0)

    def run(image, text, scale):
        return LOSSES[name](image, text, scale, chunk_size=100, deterministic=True, backend=backend)

    first = results_of(run, image, text, scale)
    # Also where memory begins must not matter to a library's matmul.
    shifted = []
    for features_ in (image, text):
        memory = torch.empty(features_.numel() + 3, dtype=dtype)
        shifted.append(memory[3:].view_as(features_).copy_(features_))
    for inputs in ([image, text], [image, text], shifted):
        for one, other in zip(first, results_of(run, *inputs, scale), strict=True):
            assert torch.equal(one, other)


def test_on_cuda_the_library_must_have_been_told(monkeypatch):
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
def test_what_features_are_multiplied_in(case, expected):
    assert operand_dtype_for(*case) == expected


@pytest.mark.parametrize("asked", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_operands_that_are_refused(asked):
    with pytest.raises(ValueError, match="operand_dtype must be a floating dtype no wider"):
        ops.clip_loss(torch.eye(2), torch.eye(2), 1.0, operand_dtype=asked)


@pytest.mark.parametrize("backend", every_backend("contrastive", torch.float16))
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_rounded_operands_are_not_rounded(backend, name):
    """float32 features times 2**-12, whose gradients in float16 would be zero; the rounded features are the truth."""
    image, text = (part * 2.0**-12 for part in features(40, 24))
    scale = torch.tensor(20.0 * 2**-12)
    own = results_of(lambda *a: LOSSES[name](*a, operand_dtype=torch.float16, backend=backend), image, text, scale)
    truth = results_of(LOSSES[name], image.half().double(), text.half().double(), scale.double())
    for ours, true in zip(own, truth, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - true).norm() <= 1e-3 * true.norm()
    assert 0 < own[1].abs().max() < 6e-8


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_without_the_dispatcher_the_same_bits(backend, dtype, name, monkeypatch):
    image, text = features(33, 20, dtype)
    run = lambda *a: LOSSES[name](*a, backend=backend)  # noqa: E731
    direct = results_of(run, image, text, torch.tensor(20.0))
    monkeypatch.setattr(contrastive, "_in_plain_eager", lambda *tensors: False)
    for one, other in zip(direct, results_of(run, image, text, torch.tensor(20.0)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_raise_an_error(name):
    image, text = (each.requires_grad_() for each in features(5, 4))
    (gradient,) = torch.autograd.grad(LOSSES[name](image, text, 3.0), image, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hessian(lambda scale: LOSSES[name](image, text, scale), torch.tensor(3.0))


def test_whoever_watches_sees_the_operator():
    image, text = features(5, 4)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    ops.clip_loss(image, text, 1.0)
    with Watch():
        ops.clip_loss(image, text, 1.0)
        ops.siglip_loss(image, text, 1.0)
    assert "bclip.clip_loss.default" in seen and "bclip.siglip_loss.default" in seen
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(part) for part in (image, text)]
        assert ops.clip_loss(*fakes, 1.0).shape == ()

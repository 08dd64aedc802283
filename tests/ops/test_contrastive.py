from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as_eager, every_backend, skip_if_refused

from bclip_fast import ops
from bclip_fast.ops.contrastive import LIMITS, _clip_loss, _siglip_loss, reference

SHAPES = [(64, 512), (1, 8), (37, 13)]  # (B, D)


def features(rows, width, dtype=torch.float32):
    return [F.normalize(torch.randn(rows, width, dtype=torch.float64)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("backend", every_backend(LIMITS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_matches_reference(backend, shape, dtype, scale, nan_filled):
    image, text = features(*shape, dtype)
    skip_if_refused(LIMITS, backend, image, text)
    assert_as_accurate_as_eager(
        lambda *inputs: ops.clip_loss(*inputs, chunk_size=10, backend=backend),
        reference.dense,
        [image, text, torch.tensor(scale), torch.tensor(-3.0)],
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 37, 1000])
def test_any_chunk_size_gives_the_same_in_float64(chunk_size):
    image, text = features(37, 13, torch.float64)
    scale = torch.tensor(50.0, dtype=torch.float64)
    assert torch.isclose(
        ops.clip_loss(image, text, scale, chunk_size=chunk_size), reference.dense(image, text, scale), atol=1e-14
    )


def test_gradients_by_finite_differences():
    image, text = (tensor.requires_grad_() for tensor in features(5, 3, torch.float64))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: ops.clip_loss(*a, chunk_size=2), [image, text, scale])


def test_registration():
    image, text = (tensor.requires_grad_() for tensor in features(9, 4))
    scale = torch.tensor(10.0, requires_grad=True)
    torch.library.opcheck(_clip_loss, (image, text, scale, None, 4, "reference"))
    torch.library.opcheck(_clip_loss, (image, text, scale, torch.tensor(1.0, requires_grad=True), 4, "reference"))


def test_compiles_without_a_graph_break():
    image, text = (tensor.requires_grad_() for tensor in features(9, 4))
    compiled = torch.compile(lambda *a: ops.clip_loss(*a), fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(ops.clip_loss(image, text, 20.0), [image, text])
    for ours, theirs in zip(torch.autograd.grad(compiled(image, text, 20.0), [image, text]), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("image", "text", "words"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 5), r"\(b, D\)"),
        (torch.zeros(3, 4), torch.zeros(2, 4), "as many rows"),
        (torch.zeros(0, 4), torch.zeros(0, 4), "at least one row"),
        (torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.half), "dtype"),
    ],
)
def test_bad_arguments_are_named(image, text, words):
    with pytest.raises(ValueError, match=words):
        ops.clip_loss(image, text, 1.0)


@pytest.mark.parametrize("backend", every_backend(LIMITS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_siglip_matches_reference(backend, shape, dtype, nan_filled):
    image, text = features(*shape, dtype)
    skip_if_refused(LIMITS, backend, image, text)
    assert_as_accurate_as_eager(
        lambda *inputs: ops.siglip_loss(*inputs, chunk_size=10, backend=backend),
        reference.dense_siglip,
        [image, text, torch.tensor(10.0), torch.tensor(-10.0)],
    )


def test_siglip_registration_and_compile():
    image, text = (tensor.requires_grad_() for tensor in features(9, 4))
    scale = torch.tensor(10.0, requires_grad=True)
    torch.library.opcheck(_siglip_loss, (image, text, scale, None, 4, True, "reference"))
    compiled = torch.compile(lambda *a: ops.siglip_loss(*a), fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(ops.siglip_loss(image, text, scale, -5.0), [image, text, scale])
    for ours, theirs in zip(
        torch.autograd.grad(compiled(image, text, scale, -5.0), [image, text, scale]), eager, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_siglip_without_gradients_computes_the_loss_alone():
    image, text = features(9, 4)
    with torch.no_grad():
        loss = ops.siglip_loss(image, text, 10.0, -10.0)
    torch.testing.assert_close(loss, reference.dense_siglip(image, text, 10.0, -10.0))


@pytest.mark.parametrize("backend", every_backend(LIMITS))
def test_saturated_pairs_keep_their_gradient(backend):
    """Gradients of 1e-13: in fp32, softmax minus one would have none of their digits."""
    generator = torch.Generator().manual_seed(3)
    image = F.normalize(torch.randn(64, 128, generator=generator, dtype=torch.float64))
    text = F.normalize(image + 0.02 * torch.randn(64, 128, generator=generator, dtype=torch.float64))
    skip_if_refused(LIMITS, backend, image.float(), text.float())
    inputs = [image, text, torch.tensor(40.0, dtype=torch.float64)]
    truth = gradients_of(reference.dense, inputs)
    ours = gradients_of(lambda *a: ops.clip_loss(*a, backend=backend), [image.float(), text.float(), inputs[2].float()])
    for own, true in zip(ours, truth, strict=True):
        assert (own.double() - true).norm() <= 1e-3 * true.norm()


def gradients_of(function, inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves), leaves)

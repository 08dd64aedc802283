"""Second and forward-mode derivatives of the loss classes, on one rank and over several."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from losses import siglip_smoothed, smoothed
from ranks import on_ranks
from targets import dense, dense_siglip
from torch.func import grad, jvp

from bclip_fast import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss

IDS = torch.arange(8) % 3
PAIRED, GROUPED = torch.eye(8, dtype=torch.bool), IDS[:, None] == IDS


def inputs():
    generator = torch.Generator().manual_seed(1)
    images, texts, *teacher = torch.randn(4, 8, 6, generator=generator, dtype=torch.float64)
    logits = torch.randn(8, 4, 5, generator=generator, dtype=torch.float64)
    return images, texts, F.normalize(torch.stack(teacher), dim=-1), logits


def clip(loss, image, text, scale, bias, rows):
    return loss(image, text, scale, bias)


def grouped(loss, image, text, scale, bias, rows):
    return loss(image, text, scale, bias, groups=IDS[rows])


def distill(loss, image, text, scale, bias, rows):
    contrastive, distillation = loss(image, text, scale, *inputs()[2][:, rows], 5.0)
    return contrastive + 2 * distillation + 0 * bias


def coca(loss, image, text, scale, bias, rows):
    captions = inputs()[3][rows]
    return sum(loss(image, text, captions, torch.full(captions.shape[:2], 3), scale)) + 0 * bias


def dense_distill(image, text, scale, bias):
    teacher_image, teacher_text = inputs()[2]
    student, teacher = scale * image @ text.T, 5 * teacher_image @ teacher_text.T
    terms = [-(t.softmax(1) * s.log_softmax(1)).sum(1).mean() for s, t in ((student, teacher), (student.T, teacher.T))]
    return dense(image, text, scale, PAIRED) + sum(terms)


def dense_coca(image, text, scale, bias):
    captions = F.cross_entropy(inputs()[3].flatten(0, 1), torch.full((32,), 3))
    return dense(image, text, scale, PAIRED) + captions


# Per case: the loss, its call, and the definition of the global loss.
CASES = {
    "clip": (ClipLoss, clip, lambda i, t, s, b: dense(i, t, s, PAIRED)),
    "clip, chunks": (partial(ClipLoss, chunk_size=3), clip, lambda i, t, s, b: dense(i, t, s, PAIRED)),
    "clip, smoothing": (partial(ClipLoss, label_smoothing=0.1), clip, smoothed),
    "clip, hardness": (partial(ClipLoss, hardness=3.0), clip, lambda i, t, s, b: dense(i, t, s, PAIRED, 3.0)),
    "clip, groups": (ClipLoss, grouped, lambda i, t, s, b: dense(i, t, s, GROUPED)),
    "siglip": (SigLipLoss, clip, lambda *features: dense_siglip(*features, PAIRED)),
    "siglip, smoothing": (partial(SigLipLoss, label_smoothing=0.1), clip, siglip_smoothed),
    "siglip, groups": (SigLipLoss, grouped, lambda *features: dense_siglip(*features, GROUPED)),
    "coca": (partial(CoCaLoss, 1.0, 1.0), coca, dense_coca),
    "distill": (DistillClipLoss, distill, dense_distill),
}
KERNELS = [name for name in CASES if name != "distill"]


def features_of(rows=slice(None), dtype=torch.float64):
    """The leaves (a weight, a scale, a bias) and the features of these rows."""
    images, texts, *_ = inputs()
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaves = [weight, torch.tensor(3.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    return leaves, [F.normalize(part[rows].to(dtype) @ leaves[0], dim=-1) for part in (images, texts)]


def penalized(call, leaves, features, num_ranks=1):
    """The gradients of the loss with a penalty on its gradients, as data-parallel training with R ranks takes them.

    A rank's gradient is R times that of the global loss, and its objective R times its part of the penalty.
    """
    scale, bias = leaves[1:]
    loss = call(*features, scale, bias)
    gradients = torch.autograd.grad(loss, features, create_graph=True)
    penalty = sum((gradient / num_ranks).pow(power).sum() for power, gradient in zip((2, 3), gradients, strict=True))
    return torch.autograd.grad(loss + 100 * num_ranks * penalty, leaves, allow_unused=True, materialize_grads=True)


def results_of(rank, num_ranks):
    rows = slice(8 // num_ranks * rank, 8 // num_ranks * (rank + 1))
    results = {}
    for name, (make, call, _) in CASES.items():
        leaves, features = features_of(rows)
        loss = make(rank=rank, world_size=num_ranks, backend="reference")
        results[name] = penalized(lambda *f, call=call, loss=loss: call(loss, *f, rows), leaves, features, num_ranks)
    return results


def assert_equal_definitions(results):
    for name, (_, _, definition) in CASES.items():
        leaves, features = features_of()
        truth = penalized(definition, leaves, features)
        mean = [sum(parts) / len(results) for parts in zip(*(result[name] for result in results), strict=True)]
        for ours, true in zip(mean, truth, strict=True):
            torch.testing.assert_close(ours, true, msg=lambda text, name=name: f"{name}: {text}")


def test_gradient_penalty_of_reference_equals_definition():
    assert_equal_definitions([results_of(0, 1)])


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_of_reference_equals_definition(name):
    make, call, definition = CASES[name]
    loss = make(backend="reference")
    leaves, features = features_of()
    values = [each.detach() for each in (*features, *leaves[1:])]
    ours = lambda *f: call(loss, *f, slice(None))  # noqa: E731
    for function, true in ((ours, definition), (grad(ours), grad(definition))):
        pair = jvp(function, tuple(values), tuple(values)), jvp(true, tuple(values), tuple(values))
        torch.testing.assert_close(*pair)


def test_compiled_forward_mode_of_distillation_equals_definition():
    """Dynamo would trace an autograd function to a zero tangent."""
    leaves, features = features_of(dtype=torch.float32)
    values = tuple(each.detach() for each in (*features, *leaves[1:]))
    teacher = inputs()[2].float()
    loss = DistillClipLoss()

    def tangent(*features):
        return jvp(lambda i, t, s: sum(loss(i, t, s, *teacher, 5.0)), features, features)[1]

    torch.testing.assert_close(torch.compile(tangent, backend="aot_eager")(*values[:3]), tangent(*values[:3]))


def refusals(loss, call, rows, words):
    """The errors of a gradient penalty, of forward mode and of torch.func.grad that don't hold the words."""
    leaves, features = features_of(rows, torch.float32)
    values = tuple(each.detach() for each in (*features, *leaves[1:]))
    attempts = {
        "penalty": lambda: penalized(lambda *f: call(loss, *f, rows), leaves, features),
        "jvp": lambda: jvp(lambda *f: call(loss, *f, rows), values, values),
        "grad": lambda: grad(lambda *f: call(loss, *f, rows))(*values),
    }
    unnamed = []
    for kind, attempt in attempts.items():
        try:
            attempt()
            unnamed.append(f"{kind}: no error")
        except NotImplementedError as error:
            unnamed += [] if words in str(error) else [f"{kind}: {error}"]
    return unnamed


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_refuse_by_name(name):
    make, call, _ = CASES[name]
    # Not "auto": the fastest backend for these small batches may be the reference, which refuses nothing.
    assert refusals(make(backend="cpu"), call, slice(None), 'backend="reference"') == []


def logits_penalty(rank):
    """The gradient of a penalty on the gradient of open_clip's logits, averaged over the ranks."""
    leaves, features = features_of(slice(4 * rank, 4 * rank + 4))
    loss = ClipLoss(rank=rank, world_size=2)

    def by_logits(image, text, scale, bias):
        return loss.get_logits(image, text, scale, bias)[0].sin().mean()

    return penalized(by_logits, leaves, features, 2)


def on_two(rank):
    rows = slice(4 * rank, 4 * rank + 4)
    unnamed = {}
    for name in KERNELS:
        make, call, _ = CASES[name]
        # The first attempt takes a second derivative: cpu kernels refuse it, and nothing over ranks has the others.
        unnamed[name] = refusals(make(rank=rank, world_size=2, backend="cpu"), call, rows, 'backend="reference"')
    return {"reference": results_of(rank, 2), "unnamed": unnamed, "logits": logits_penalty(rank)}


def test_two_ranks_equal_definition_or_refuse_by_name():
    results = on_ranks(2, on_two)
    assert_equal_definitions([result["reference"] for result in results])
    assert [result["unnamed"] for result in results] == [{name: [] for name in KERNELS}] * 2
    leaves, features = features_of()
    truth = penalized(lambda i, t, s, b: (s * i @ t.T + b).sin().mean(), leaves, features)
    for ours, true in zip(map(sum, zip(*(result["logits"] for result in results), strict=True)), truth, strict=True):
        torch.testing.assert_close(ours / 2, true)

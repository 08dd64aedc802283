from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from judged import judge_clip_loss, judge_siglip_loss
from oracle import every_backend, every_backend_and
from pairwise import pairwise

from bclip_fast import ops
from bclip_fast.ops.contrastive import reference
from bclip_fast.ops.contrastive.clip_op import clip_loss
from bclip_fast.ops.contrastive.siglip_op import siglip_loss

BACKENDS = every_backend_and("contrastive", torch.float32, torch.bfloat16)
SHAPES = [(64, 512), (1, 8), (37, 13)]  # (B, D)


def features(rows, width, dtype=torch.float32):
    return [F.normalize(torch.randn(rows, width, dtype=torch.float64)).to(dtype) for _ in range(2)]


@pairwise(backend_and_dtype=BACKENDS, shape=SHAPES, scale=[14.3, 100.0])
def test_clip_loss_is_as_accurate_as_eager(backend, dtype, shape, scale, nan_filled):
    judge_clip_loss(
        lambda *inputs: ops.clip_loss(*inputs, chunk_size=10, backend=backend),
        lambda: [*features(*shape, dtype), torch.tensor(scale), torch.tensor(-3.0)],
    )


@pytest.mark.parametrize("backend", every_backend("contrastive"))
def test_losses_over_many_draws_are_as_accurate_as_eager(backend):
    """A loss and the gradient of its scale are single numbers, so only many draws show the size of their errors."""
    scalars = [torch.tensor(50.0), torch.tensor(-10.0)]
    for judge, loss in ((judge_clip_loss, ops.clip_loss), (judge_siglip_loss, ops.siglip_loss)):
        judge(lambda *inputs, loss=loss: loss(*inputs, backend=backend), lambda: features(7, 5) + scalars, draws=100)


@pytest.mark.parametrize("chunk_size", [1, 7, 37, 1000])
def test_chunk_size_does_not_change_the_float64_loss(chunk_size):
    image, text = features(37, 13, torch.float64)
    scale = torch.tensor(50.0, dtype=torch.float64)
    assert torch.isclose(
        ops.clip_loss(image, text, scale, chunk_size=chunk_size), reference.dense(image, text, scale), atol=1e-14
    )


def test_gradients_equal_finite_differences():
    image, text = (tensor.requires_grad_() for tensor in features(5, 3, torch.float64))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: ops.clip_loss(*a, chunk_size=2), [image, text, scale])


def test_clip_loss_opcheck_accepts_the_registration():
    image, text = (tensor.requires_grad_() for tensor in features(9, 4))
    scale = torch.tensor(10.0, requires_grad=True)
    torch.library.opcheck(clip_loss, (image, text, scale, None, None, 9, 0.0, 4, torch.float32, False, "reference"))
    torch.library.opcheck(clip_loss, (image, text, scale, None, None, 9, 0.0, 4, torch.float32, True, "cpu"))
    ids = torch.arange(9) // 2
    torch.library.opcheck(clip_loss, (image, text, scale, ids, ids, 9, 0.0, 4, torch.bfloat16, False, "reference"))
    torch.library.opcheck(clip_loss, (image, text, scale, None, None, 6, 3.0, 4, torch.float32, False, "reference"))


def test_clip_loss_compile_has_no_graph_break():
    image, text = (tensor.requires_grad_() for tensor in features(9, 4))
    compiled = torch.compile(lambda *a: ops.clip_loss(*a), fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(ops.clip_loss(image, text, 20.0), [image, text])
    for ours, theirs in zip(torch.autograd.grad(compiled(image, text, 20.0), [image, text]), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("image", "text", "words"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 5), r"\(b, D\)"),
        (
            torch.zeros(3, 4),
            torch.zeros(2, 4),
            "at least as many rows as image, got 3 images and 2 texts: pass positive=",
        ),
        (torch.zeros(0, 4), torch.zeros(0, 4), "at least one row"),
        (torch.zeros(3, 0), torch.zeros(3, 0), "one column"),
        (torch.zeros(3, 4).to(torch.float8_e5m2), torch.zeros(3, 4).to(torch.float8_e5m2), "float8"),
        (torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.half), "dtype"),
    ],
)
def test_bad_argument_raises_an_error_that_names_it(image, text, words):
    with pytest.raises(ValueError, match=words):
        ops.clip_loss(image, text, 1.0)


@pairwise(backend_and_dtype=BACKENDS, shape=SHAPES)
def test_siglip_loss_is_as_accurate_as_eager(backend, dtype, shape, nan_filled):
    judge_siglip_loss(
        lambda *inputs: ops.siglip_loss(*inputs, chunk_size=10, backend=backend),
        lambda: [*features(*shape, dtype), torch.tensor(10.0), torch.tensor(-10.0)],
    )


def test_siglip_loss_registers_and_compiles():
    image, text = (tensor.requires_grad_() for tensor in features(9, 4))
    scale = torch.tensor(10.0, requires_grad=True)
    torch.library.opcheck(siglip_loss, (image, text, scale, None, None, None, 4, torch.float32, True, "reference"))
    compiled = torch.compile(lambda *a: ops.siglip_loss(*a), fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(ops.siglip_loss(image, text, scale, -5.0), [image, text, scale])
    for ours, theirs in zip(
        torch.autograd.grad(compiled(image, text, scale, -5.0), [image, text, scale]), eager, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_siglip_loss_registration_without_gradients_passes(dtype):
    image, text = features(9, 4, dtype)
    for backend in ("cpu", "reference"):
        options = (None, None, None, 4, torch.bfloat16, False, backend)
        torch.library.opcheck(siglip_loss, (image, text, torch.tensor(10.0), *options))


def test_clip_loss_compiles_with_dynamic_sizes():
    compiled = torch.compile(lambda *a: ops.clip_loss(*a), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (9, 12):
        image, text = features(rows, 4)
        torch.testing.assert_close(compiled(image, text, 20.0), ops.clip_loss(image, text, 20.0))


def test_siglip_loss_without_gradients_equals_the_dense_loss():
    image, text = features(9, 4)
    with torch.no_grad():
        loss = ops.siglip_loss(image, text, 10.0, -10.0)
    torch.testing.assert_close(loss, reference.dense_siglip(image, text, 10.0, -10.0))


def pairs(cosine, rows=150, width=96):
    """float32 images and texts, with the given cosine of each pair (float64 until the last rounding)."""
    image, other = features(rows, width, torch.float64)
    across = F.normalize(other - (other * image).sum(1, keepdim=True) * image)
    return image.float(), (cosine * image + (1 - cosine**2) ** 0.5 * across).float()


def exact(image, text, scale):
    """`reference.dense`, but accurate to the last digits even if float64 rounds the softmax to 1."""
    logits = scale * image @ text.T
    positive = logits.diagonal()
    negatives = logits.masked_fill(torch.eye(len(image), dtype=torch.bool), float("-inf"))
    return sum(F.softplus(negatives.logsumexp(dim) - positive).mean() for dim in (0, 1)) / 2


def gradients_of(function, inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def errors(ours, truth):
    return [((actual.double() - true).norm() / true.norm()).item() for actual, true in zip(ours, truth, strict=True)]


@pytest.mark.parametrize("backend", every_backend("contrastive"))
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.55, 0.95])
def test_float32_gradients_have_five_digits(backend, scale, cosine):
    """Random, aligned and, at scale 100, saturated pairs: 1 - p is 1e-7 at a cosine of 0.55, and 1e-24 at 0.95."""
    inputs = [*pairs(cosine), torch.tensor(scale)]
    wide = [tensor.double() for tensor in inputs]
    truth = gradients_of(exact, wide)
    if scale == 100 and cosine >= 0.55:
        logits = wide[2] * wide[0] @ wide[1].T
        wrong = -torch.expm1(logits.diagonal() - logits.logsumexp(1)).mean()
        assert wrong < 1e-6
    assert max(errors(gradients_of(lambda *a: ops.clip_loss(*a, backend=backend), inputs), truth)) <= 1e-5


@pytest.mark.parametrize("backend", every_backend("contrastive"))
def test_negatives_below_the_smallest_float_give_exact_zeros(backend):
    """The pairs are antipodal at scale 100, so a negative is exp(-200) of its positive."""
    image = F.normalize(torch.ones(1, 8)) * torch.tensor([[1.0], [-1.0]])
    inputs = [image, image, torch.tensor(100.0)]
    assert ops.clip_loss(*inputs, backend=backend) == 0
    for gradient in gradients_of(lambda *a: ops.clip_loss(*a, backend=backend), inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    # At a scale of 40 nothing underflows: exp(-80) is 1.8e-35.
    inputs[2] = torch.tensor(40.0)
    truth = gradients_of(exact, [tensor.double() for tensor in inputs])
    assert truth[2].abs() > 1e-38
    actual = gradients_of(lambda *a: ops.clip_loss(*a, backend=backend), inputs)
    assert ((actual[2].double() - truth[2]) / truth[2]).abs() <= 1e-5


@pytest.mark.parametrize("backend", every_backend("contrastive"))
def test_cone_of_low_cosines_gives_accurate_gradients(backend):
    """All cosines are near -0.8 at scale 100, so an offset by the scale makes every exponential zero."""
    axis = F.normalize(torch.randn(1, 96))
    across = torch.randn(150, 96)
    across = F.normalize(across - (across @ axis.T) * axis)
    inputs = [-0.8 * axis + 0.6 * across, F.normalize(axis + 0.01 * torch.randn(150, 96)), torch.tensor(100.0)]
    assert (inputs[0] @ inputs[1].T).max() < -0.6
    truth = gradients_of(exact, [tensor.double() for tensor in inputs])
    # Triton's kernels hold log-sum-exps in float32, with a step of 8e-6 at 80. Here all rows have the same error.
    allowed = 5e-5 if backend == "triton" else 1e-5
    assert max(errors(gradients_of(lambda *a: ops.clip_loss(*a, backend=backend), inputs), truth)) <= allowed


@pytest.mark.parametrize("backend", every_backend("contrastive", torch.bfloat16))
@pytest.mark.parametrize("cosine", [0.0, 0.3])
def test_bfloat16_features_at_scale_100_beat_autocast(backend, cosine):
    """open_clip's step under autocast rounds its logits to bfloat16, whose step is a quarter at 64."""
    image, text = (part.bfloat16() for part in pairs(cosine))
    inputs = [image, text, torch.tensor(100.0)]
    truth = gradients_of(exact, [tensor.double() for tensor in inputs])

    def autocast_step(image, text, scale):
        with torch.autocast(image.device.type, torch.bfloat16):
            return reference.dense(image, text, scale)

    ours = errors(gradients_of(lambda *a: ops.clip_loss(*a, backend=backend), inputs), truth)
    theirs = errors(gradients_of(autocast_step, inputs), truth)
    assert all(actual <= 0.4 * other for actual, other in zip(ours[:2], theirs[:2], strict=True)), (ours, theirs)


@pairwise(backend_and_dtype=every_backend_and("contrastive", torch.float16, torch.bfloat16))
def test_siglip_gradients_survive_until_the_gradient_scaler(backend, dtype):
    """float16 would lose gradients of 1e-8 if they were rounded before the scaler's factor is known."""
    image, text = features(64, 32, dtype)
    inputs = [image, text, torch.tensor(1e-5), torch.tensor(-7.0)]
    upstream = torch.tensor(65536.0)
    truth = gradients_of(lambda *a: upstream * reference.dense_siglip(*a), [tensor.double() for tensor in inputs])
    assert truth[0].abs().max() / upstream < 2e-7
    ours = gradients_of(lambda *a: upstream * ops.siglip_loss(*a, backend=backend), inputs)
    assert ours[0].dtype == dtype
    assert max(errors(ours, truth)[:2]) <= (2.0**-11 if dtype == torch.float16 else 2.0**-7)

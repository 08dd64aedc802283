"""Second and forward-mode derivatives: kernels refuse them by name, and the backend "reference" has them all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operators import OPERATORS
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp

from bclip_fast import ops

every_operator = pytest.mark.parametrize("name", OPERATORS)


def dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


def twice(function, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)


def scalar(function):
    return lambda x: function(x).sum()


# Each takes a derivative that kernels lack: the first, beyond reverse mode or by a transform, or the second.
BEYOND = {
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "dual tensor": dual,
    "grad": lambda f, x: grad(scalar(f))(x),
    "create_graph": twice,
    "hessian": lambda f, x: torch.autograd.functional.hessian(scalar(f), x),
    "torch.func.hessian": lambda f, x: hessian(scalar(f))(x),
    "jvp of grad": lambda f, x: jvp(grad(scalar(f)), (x,), (x,)),
    "grad of jvp": lambda f, x: grad(lambda x: jvp(f, (x,), (x,))[1].sum())(x),
    "vmap of jvp": lambda f, x: torch.vmap(lambda t: jvp(f, (x,), (t,))[1])(torch.stack([x, x])),
    "jvp of vmap": lambda f, x: jvp(torch.vmap(f), (torch.stack([x, x]),), (torch.stack([x, x]),)),
    "jacrev of grad": lambda f, x: jacrev(grad(scalar(f)))(x),
}


@every_operator
def test_kernels_refuse_further_derivatives_by_name(name):
    function, shape = OPERATORS[name]
    x = torch.randn(shape)
    for kind, derivative in BEYOND.items():
        with pytest.raises(NotImplementedError, match=f'bclip::{name} is .* pass backend="reference"'):
            pytest.fail(f"{kind}: {derivative(function, x)}")


@pytest.mark.parametrize("loss", [ops.clip_loss, ops.siglip_loss])
def test_kernels_refuse_second_derivative_by_scale(loss):
    image, text = F.normalize(torch.randn(2, 6, 8), dim=-1)
    with pytest.raises(NotImplementedError, match='pass backend="reference"'):
        torch.autograd.functional.hessian(lambda scale: loss(image, text, scale, backend="cpu"), torch.tensor(3.0))


def test_compiled_forward_mode_of_a_kernel_is_refused():
    function, shape = OPERATORS["clip_loss"]
    x = torch.randn(shape)
    with pytest.raises(Exception, match='pass backend="reference"'):
        torch.compile(lambda x: jvp(function, (x,), (x,))[1], backend="aot_eager")(x)


def test_torchs_attention_refuses_further_derivatives_by_name():
    bounds, rows = torch.tensor([0, 4, 7], dtype=torch.int32), torch.tensor([1, 5])
    calls = {
        "fused_attention": (lambda x: ops.fused_attention(x[None], backend="torch"), (7, 3, 2, 8)),
        "varlen_attention": (lambda x: ops.varlen_attention(x, bounds, 4, backend="torch"), (7, 3, 2, 8)),
        "pooled_attention": (
            lambda x: ops.single_query_attention(x[:2, 0], x[:, 1:], rows, bounds, backend="torch"),
            (7, 3, 2, 8),
        ),
    }
    for name, (function, shape) in calls.items():
        x = torch.randn(shape, dtype=torch.float64)
        for derivative in (BEYOND["jvp"], BEYOND["grad"], BEYOND["create_graph"]):
            with pytest.raises(NotImplementedError, match=f'{name} is .* pass backend="reference"'):
                derivative(function, x)
        torch.autograd.gradcheck(function, x.requires_grad_())


IDS, TEXT_IDS = torch.tensor([0, 1, 0, 2]), torch.tensor([2, 0, 1, 5, 0])
PARTS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
SCALE = torch.tensor(2.0)
REFERENCE = {
    "clip_loss": (lambda i, t, s: ops.clip_loss(i, t, s, backend="reference"), (4, 3), (4, 3), ()),
    "clip_loss, texts": (lambda i, t: ops.clip_loss(i, t, 2.0, chunk_size=2, backend="reference"), (4, 3), (6, 3)),
    "clip_loss, positive": (
        lambda i, t, s: ops.clip_loss(i, t, s, positive=torch.tensor([3, -1, 0, 1]), backend="reference"),
        (4, 3), (5, 3), (),
    ),
    "clip_loss, groups": (
        lambda i, t, s: ops.clip_loss(i, t, s, groups=(IDS, TEXT_IDS), backend="reference"), (4, 3), (5, 3), (),
    ),
    "siglip_loss": (lambda i, t, s, b: ops.siglip_loss(i, t, s, b, backend="reference"), (4, 3), (4, 3), (), ()),
    "siglip_loss, positive": (
        lambda i, t: ops.siglip_loss(i, t, 2.0, positive=torch.tensor([3, -1, 0, 1]), backend="reference"),
        (4, 3), (5, 3),
    ),
    "siglip_loss, groups": (
        lambda i, t, b: ops.siglip_loss(i, t, 2.0, b, groups=(IDS, TEXT_IDS), backend="reference"), (4, 3), (5, 3), (),
    ),
    "fused_attention": (lambda x: ops.fused_attention(x, causal=True, backend="reference"), (2, 3, 3, 1, 2)),
    "fused_attention, mask and dropout": (
        lambda x: ops.fused_attention(
            x, torch.tensor([[True, False, True], [False] * 3]), dropout_p=0.5, seed=1, backend="reference"
        ),
        (2, 3, 3, 1, 2),
    ),
    "varlen_attention": (lambda x: ops.varlen_attention(x, PARTS, 3, backend="reference"), (5, 3, 1, 2)),
    "single_query_attention": (
        lambda q, kv: ops.single_query_attention(
            q, kv, torch.tensor([1, 3]), PARTS[[0, 1, 3]], causal=True, backend="reference"
        ),
        (2, 1, 2), (5, 2, 1, 2),
    ),
    "linear": (lambda x, w, b: ops.linear(x, w, b, backend="reference"), (3, 2), (4, 2), (4,)),
    "linear_gelu": (lambda x, w, b: ops.linear_gelu(x, w, b, backend="reference"), (3, 2), (4, 2), (4,)),
    "gelu": (lambda x: ops.gelu(x, backend="reference"), (3, 2)),
    "add_norm": (
        lambda x, y, w, b: ops.add_norm(x, y, w, b, 1e-6, backend="reference"), (2, 3), (2, 3), (3,), (3,),
    ),
    # Plain torch code, which autograd differentiates like the reference.
    "gelu, torch": (lambda x: ops.gelu(x, backend="torch"), (3, 2)),
    "add_norm, torch": (
        lambda x, y, w, b: ops.add_norm(x, y, w, b, 1e-6, post=True, dropout_p=0.5, seed=3, backend="torch"),
        (2, 3), (2, 3), (3,), (3,),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", REFERENCE)
def test_reference_has_first_and_second_derivatives_in_both_modes(name):
    """The truth is torch's check: finite differences in float64."""
    function, *shapes = REFERENCE[name]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


def close(derivative, function, definition, x):
    torch.testing.assert_close(derivative(function, x), derivative(definition, x), check_dtype=False)


@pytest.mark.parametrize("kind", BEYOND)
def test_reference_under_every_transform_equals_plain_torch(kind):
    text = F.normalize(torch.randn(6, 8), dim=-1)

    def plain(image):
        logits, labels = 10 * image @ text.T, torch.arange(len(image))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    x = F.normalize(torch.randn(6, 8), dim=-1)
    close(BEYOND[kind], lambda image: ops.clip_loss(image, text, 10.0, backend="reference"), plain, x)


def test_reference_third_derivative_and_checkpoint_are_right():
    x = torch.randn(4, 3, dtype=torch.float64)
    text = torch.randn(5, 3, dtype=torch.float64)

    def loss(image):
        return ops.clip_loss(image, text, 2.0, backend="reference")

    def checkpointed(image):
        return torch.utils.checkpoint.checkpoint(loss, image, use_reentrant=False)

    def third(function):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = gradient.square().sum()
        return gradient

    truth = grad(lambda x: grad(lambda x: grad(loss)(x).square().sum())(x).square().sum())(x)
    torch.testing.assert_close(third(loss), truth)
    torch.testing.assert_close(third(checkpointed), truth)


def test_reference_in_half_precision_has_float32_second_derivatives():
    """`operand_dtype` rounds the operands only, as in the first derivative."""
    image, text = F.normalize(torch.randn(2, 6, 8), dim=-1)
    rounded = [part.bfloat16().float() for part in (image, text)]

    def second(image, text, **options):
        return twice(lambda image: ops.clip_loss(image, text, 10.0, backend="reference", **options), image)[0]

    torch.testing.assert_close(second(image, text, operand_dtype=torch.bfloat16), second(*rounded))

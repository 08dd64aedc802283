"""The registration that all operators share: what compilers, modes and transforms see, and which derivatives exist."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from bclip_fast import ops

BOUNDS, ROWS = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([2])
WEIGHT, KEY_VALUE, TEXT = torch.randn(3, 16), torch.randn(5, 2, 2, 16), F.normalize(torch.randn(6, 8), dim=1)

# Per operator: a function of one tensor, that tensor's shape, and the operator's name in torch.
OPERATORS = {
    "gelu": (lambda x: ops.gelu(x, backend="cpu"), (4, 16)),
    "add_norm": (
        lambda x: ops.add_norm(x, 2 * x, torch.ones(16), torch.zeros(16), 1e-6, backend="cpu")[0],
        (4, 16),
    ),
    "linear": (lambda x: ops.linear(x.bfloat16(), WEIGHT, backend="cpu").float(), (4, 16)),
    "attention": (lambda qkv: ops.fused_attention(qkv, backend="cpu"), (1, 5, 3, 2, 16)),
    "pooled_attention": (
        lambda query: ops.single_query_attention(query, KEY_VALUE, ROWS, BOUNDS, backend="cpu"),
        (1, 2, 16),
    ),
    "clip_loss": (lambda image: ops.clip_loss(image, TEXT, 10.0, backend="cpu"), (6, 8)),
    "siglip_loss": (lambda image: ops.siglip_loss(image, TEXT, 10.0, backend="cpu"), (6, 8)),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


@every_operator
def test_forward_mode_derivative_raises_an_error(name):
    function, shape = OPERATORS[name]
    x, tangent = torch.randn(shape), torch.ones(shape)
    with pytest.raises(NotImplementedError, match=f"bclip::{name} has no forward-mode derivative"):
        torch.func.jvp(function, (x,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        function(forward_ad.make_dual(x, tangent))


def test_forward_mode_derivative_of_the_reference_is_torchs():
    x, tangent = torch.randn(4, 16), torch.randn(4, 16)
    ours = torch.func.jvp(lambda x: ops.gelu(x, backend="reference"), (x,), (tangent,))
    assert all(map(torch.equal, ours, torch.func.jvp(F.gelu, (x,), (tangent,))))


@every_operator
def test_second_derivative_raises_an_error(name):
    function, shape = OPERATORS[name]
    x = torch.randn(shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hessian(lambda x: function(x).sum(), x)


@pytest.mark.parametrize("loss", [ops.clip_loss, ops.siglip_loss])
def test_second_derivative_of_a_loss_by_its_scale_raises_an_error(loss):
    image = F.normalize(torch.randn(6, 8), dim=1)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hessian(lambda scale: loss(image, TEXT, scale), torch.tensor(3.0))


@every_operator
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_calls_the_operator_for_each_element(name):
    function, shape = OPERATORS[name]
    x = torch.randn(2, *shape)
    assert torch.equal(torch.vmap(function)(x), torch.stack([function(part) for part in x]))


@every_operator
def test_dispatch_mode_sees_the_operator(name):
    function, shape = OPERATORS[name]
    calls = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        function(torch.randn(shape))
    assert f"bclip.{name}.default" in calls


@every_operator
def test_fake_tensors_have_the_shapes_of_real_ones(name):
    function, shape = OPERATORS[name]
    x = torch.randn(shape)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert function(mode.from_tensor(x)).shape == function(x).shape


def test_torchs_check_for_aliased_results_raises_in_every_process():
    """Without CI in the environment, torch only warns. conftest.py makes both environments equal."""
    assert functorch_config.error_on_custom_op_aliasing
    assert "CI" not in os.environ
    assert os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] == "1"

"""The registration that all operators share, and what compilers, modes and transforms see of it."""

from __future__ import annotations

import os

import pytest
import torch
from operators import OPERATORS
from torch._functorch import config as functorch_config
from torch.utils._python_dispatch import TorchDispatchMode

every_operator = pytest.mark.parametrize("name", OPERATORS)


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


@pytest.mark.skipif(
    not hasattr(functorch_config, "error_on_custom_op_aliasing"), reason="this torch has no check for aliased results"
)
def test_torchs_check_for_aliased_results_raises_in_every_process():
    """Without CI in the environment, torch only warns. conftest.py makes both environments equal."""
    assert functorch_config.error_on_custom_op_aliasing
    assert "CI" not in os.environ
    assert os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] == "1"

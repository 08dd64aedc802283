from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bclip_fast import ops
from bclip_fast.ops import attention, contrastive, dispatch, image, matmul, pointwise

QKV = torch.randn(1, 3, 3, 2, 8)


def test_auto_takes_the_first_backend_without_a_refusal():
    limits = {"cuda": lambda x: "not on this device", "cpu": lambda x: None, "reference": lambda x: None}
    assert dispatch.choose("op", limits, "auto", QKV) == "cpu"


def test_named_backend_is_never_replaced():
    with pytest.raises(ops.BackendError, match="triton: "):
        ops.fused_attention(QKV, backend="triton")
    with pytest.raises(ops.BackendError, match="unknown backend 'gpu'"):
        ops.fused_attention(QKV, backend="gpu")


def test_nearest_name_wins():
    limits = {"cpu": lambda x: None, "reference": lambda x: None}
    with ops.use_backend("reference"):
        assert dispatch.choose("op", limits, "auto", QKV) == "reference"
        assert dispatch.choose("op", limits, "cpu", QKV) == "cpu"
    assert dispatch.choose("op", limits, "auto", QKV) == "cpu"


def test_name_for_all_operators_leaves_other_calls_to_the_library():
    limits = {"cpu": lambda x: "too small", "reference": lambda x: None}
    with ops.use_backend("cpu"):
        assert dispatch.choose("op", limits, "auto", QKV, library=True) == "reference"
        with pytest.raises(ops.BackendError, match="cpu: too small"):
            dispatch.choose("op", limits, "cpu", QKV, library=True)
        with pytest.raises(ops.BackendError, match="cpu: too small"):
            dispatch.choose("op", limits, "auto", QKV)


def test_error_lists_every_refusal():
    with pytest.raises(
        ops.BackendError, match=r"triton: .*cuda: .*cpu: too small; torch: .*reference: not implemented"
    ):
        dispatch.choose("op", {"cpu": lambda x: "too small"}, "auto", QKV)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_autocast_does_not_change_attention(backend):
    qkv = torch.randn(2, 9, 3, 2, 16, requires_grad=True)
    bounds, rows = torch.tensor([0, 9, 18], dtype=torch.int32), torch.tensor([0, 9])
    calls = {
        "dense": lambda: ops.fused_attention(qkv, backend=backend),
        "packed": lambda: ops.varlen_attention(qkv.flatten(0, 1), bounds, 9, backend=backend),
        "pooled": lambda: ops.single_query_attention(
            qkv[:, 0, 0], qkv.flatten(0, 1)[:, 1:].contiguous(), rows, bounds, backend=backend
        ),
    }
    for name, call in calls.items():
        plain = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), plain), name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("loss", [ops.clip_loss, ops.siglip_loss])
def test_autocast_does_not_change_a_loss_and_its_gradients(backend, loss):
    image, text = (torch.nn.functional.normalize(part, dim=1).requires_grad_() for part in torch.randn(2, 40, 16))

    def results():
        value = loss(image, text, 20.0, operand_dtype=torch.float32, backend=backend)
        return [value, *torch.autograd.grad(value, (image, text))]

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(*pair) for pair in zip(results(), plain, strict=True))


def test_environment_variable_names_a_backend():
    code = "import torch; from bclip_fast import ops; ops.fused_attention(torch.zeros(1, 2, 3, 1, 4))"
    for name, words in [("triton", "fused_attention cannot run"), ("gpu", "BCLIP_BACKEND names the unknown backend")]:
        environment = {**os.environ, "BCLIP_BACKEND": name}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode != 0
        assert words in done.stderr


def test_required_backends_are_present():
    """With BCLIP_REQUIRE_BACKENDS=cuda,triton, a missing backend fails, so that no test is skipped silently."""
    required = [name for name in os.environ.get("BCLIP_REQUIRE_BACKENDS", "cpu").split(",") if name]
    missing = {name: dispatch.MISSING[name] for name in required if name in dispatch.MISSING}
    assert not missing
    # On a device that a backend refuses, for example an old one, its tests would all be skipped.
    qkv = torch.zeros(1, 3, 1, 64, dtype=torch.bfloat16)
    assert [reason for name in required if (reason := attention.LIMITS[name](qkv))] == []


@pytest.mark.parametrize(
    "operator", [attention, contrastive, image, matmul, pointwise], ids=lambda module: module.__name__
)
def test_operator_has_a_reference_and_known_backends(operator):
    assert "reference" in operator.LIMITS
    assert set(operator.LIMITS) <= set(dispatch.BACKENDS)

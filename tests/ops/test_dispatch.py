from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bclip_fast import ops
from bclip_fast.ops import affine, attention, contrastive, dispatch, image, pointwise

QKV = torch.randn(1, 3, 3, 2, 8)


def test_auto_takes_the_first_that_gives_no_reason_against():
    limits = {"cuda": lambda x: "not on this device", "cpu": lambda x: None, "reference": lambda x: None}
    assert dispatch.choose("op", limits, "auto", QKV) == "cpu"


def test_a_named_backend_is_never_replaced():
    with pytest.raises(ops.BackendError, match="triton: "):
        ops.fused_attention(QKV, backend="triton")
    with pytest.raises(ops.BackendError, match="unknown backend 'gpu'"):
        ops.fused_attention(QKV, backend="gpu")


def test_the_nearest_name_wins():
    limits = {"cpu": lambda x: None, "reference": lambda x: None}
    with ops.use_backend("reference"):
        assert dispatch.choose("op", limits, "auto", QKV) == "reference"
        assert dispatch.choose("op", limits, "cpu", QKV) == "cpu"
    assert dispatch.choose("op", limits, "auto", QKV) == "cpu"


def test_a_name_for_all_operators_leaves_the_librarys_calls_to_it():
    limits = {"cpu": lambda x: "too small", "reference": lambda x: None}
    with ops.use_backend("cpu"):
        assert dispatch.choose("op", limits, "auto", QKV, library=True) == "reference"
        with pytest.raises(ops.BackendError, match="cpu: too small"):
            dispatch.choose("op", limits, "cpu", QKV, library=True)
        with pytest.raises(ops.BackendError, match="cpu: too small"):
            dispatch.choose("op", limits, "auto", QKV)


def test_every_refusal_is_told():
    with pytest.raises(ops.BackendError, match="triton: .*cuda: .*cpu: too small; torch: .*reference: not implemented"):
        dispatch.choose("op", {"cpu": lambda x: "too small"}, "auto", QKV)


def test_the_environment_names_a_backend():
    code = "import torch; from bclip_fast import ops; ops.fused_attention(torch.zeros(1, 2, 3, 1, 4))"
    for name, words in [("triton", "fused_attention cannot run"), ("gpu", "BCLIP_BACKEND names the unknown backend")]:
        environment = {**os.environ, "BCLIP_BACKEND": name}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode != 0 and words in done.stderr


def test_required_backends_are_there():
    """BCLIP_REQUIRE_BACKENDS=cuda,triton: a missing one is a failure, so that green never means "skipped"."""
    required = [name for name in os.environ.get("BCLIP_REQUIRE_BACKENDS", "cpu").split(",") if name]
    missing = {name: dispatch.MISSING[name] for name in required if name in dispatch.MISSING}
    assert not missing
    # A device that a backend refuses as such, an old one say, would skip its tests one by one.
    qkv = torch.zeros(1, 3, 1, 64, dtype=torch.bfloat16)
    assert [reason for name in required if (reason := attention.LIMITS[name](qkv))] == []


@pytest.mark.parametrize(
    "operator", [affine, attention, contrastive, image, pointwise], ids=lambda module: module.__name__
)
def test_every_operator_has_a_reference_and_known_backends(operator):
    assert "reference" in operator.LIMITS
    assert set(operator.LIMITS) <= set(dispatch.BACKENDS)

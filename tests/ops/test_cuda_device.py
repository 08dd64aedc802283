"""What the operators ask a GPU about itself, on any machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bclip_fast.ops import cuda_device
from bclip_fast.ops.contrastive import LIMITS as CONTRASTIVE
from bclip_fast.ops.pointwise import LIMITS as POINTWISE


@pytest.fixture
def asked(monkeypatch):
    """The GPUs whose capability the driver was asked for, in order. GPU 1 is too old for Triton's kernels."""
    asked = []

    def answer(device):
        asked.append(device)
        return (7, 5) if device == 1 else (9, 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", answer)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    cuda_device._capability.cache_clear()
    yield asked
    cuda_device._capability.cache_clear()


def on_gpu(index, *shape):
    """As much of a tensor on a GPU as the limits read."""
    return SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float16, shape=shape)


def test_each_gpu_is_asked_for_its_capability_once(asked):
    for _ in range(3):
        features, stream = on_gpu(0, 8, 64), [on_gpu(0, 8, 64)] * 5
        assert CONTRASTIVE["triton"](features, features) is None
        assert POINTWISE["triton"](*stream) is None
        assert "capability 8.0" in CONTRASTIVE["triton"](on_gpu(1, 8, 64), on_gpu(1, 8, 64))
    assert asked == [0, 1]


def test_capability_is_a_constant_of_a_compiled_graph(asked):
    """A graph break there would split every compiled tower."""
    compiled = torch.compile(
        lambda x: x * (2 if cuda_device.compute_capability(0) >= (8, 0) else 3), fullgraph=True, backend="aot_eager"
    )
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    assert asked == [0]

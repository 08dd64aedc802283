"""Losses and attention in CUDA graphs: a replay reads new inputs, and gives the bits of eager calls.

Without a GPU nothing can be captured. Then `Graph` runs the step again, under the emulator and Triton's interpreter.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cuda_emulator import ON_GPU
from judged import bounds_of, features
from oracle import collected_if, every_backend

from bclip_fast import ops


def gpu_backends(operator):
    return [name for name in every_backend(operator, torch.float16) if name in ("cuda", "triton")]


class Graph:
    """The captured results of a step, which `replay` renews in place."""

    def __init__(self, step):
        self.step = step
        if not ON_GPU:
            self.results = step()
            return
        # Kernels are compiled and memory is allocated before the capture.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = step()

    def replay(self):
        if ON_GPU:
            self.graph.replay()
        else:
            for result, new in zip(self.results, self.step(), strict=True):
                result.copy_(new)


def assert_replays_give_eager_bits(step, leaves):
    graph = Graph(step)
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(leaf.roll(1, 0))
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(graph.results, step(), strict=True))
    assert all(result.isfinite().all() for result in graph.results)


LOSSES = {
    "clip": lambda *a, **k: ops.clip_loss(*a, 20.0, **k),
    "siglip": lambda *a, **k: ops.siglip_loss(*a, 9.0, -9.0, **k),
}


@collected_if(bool(gpu_backends("contrastive")))
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", gpu_backends("contrastive"))
def test_replayed_loss_equals_eager(backend, name):
    leaves = [features(150, 64, torch.float16).requires_grad_() for _ in range(2)]

    def step():
        loss = LOSSES[name](*leaves, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    assert_replays_give_eager_bits(step, leaves)


@collected_if(bool(gpu_backends("attention")))
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("backend", gpu_backends("attention"))
def test_replayed_attention_equals_eager(backend, packed, dropout_p):
    """The seed is a tensor on the device, because a graph cannot copy a number from the host."""
    shape = (40, 3, 1, 32) if packed else (2, 20, 3, 1, 32)
    leaf, options = torch.randn(shape).half().requires_grad_(), {"dropout_p": dropout_p, "backend": backend}
    if dropout_p:
        options["seed"] = torch.tensor(7)
    bounds = bounds_of([23, 17])
    attend = partial(ops.varlen_attention, cu_seqlens=bounds, max_seqlen=23) if packed else ops.fused_attention

    def step():
        out = attend(leaf, **options)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaf)]

    assert_replays_give_eager_bits(step, [leaf])

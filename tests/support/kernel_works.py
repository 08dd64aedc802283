"""Works of made-up kernels, for tests of the bounds."""

from __future__ import annotations

from collections import Counter

from bclip_fast.benchmarks.bounds.model import Work


def work(phases, blocks=108, threads=128, registers=128, shared=0, **fields) -> Work:
    """Return the work of a kernel for an A100, whose phases are mixes of a warp."""
    fields = {"flops": 0.0, "l2_bytes": 0.0, "hbm_bytes": 0.0, "operator": "clip_loss", **fields}
    parts = tuple(Counter(phase) for phase in phases)
    sizes = {"threads": threads, "registers": registers, "shared": shared, "blocks": blocks}
    return Work(kernel="k", backend="cuda", architecture="80", shape="s", phases=parts, bodies={}, **sizes, **fields)

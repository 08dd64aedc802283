"""The bound of a form of attention's forward pass that we have not written: wgmma with 64 queries at a time, on sm_90.

It shows what such a kernel could gain over ours with mma.sync. Only instructions that it cannot avoid count.
"""

from __future__ import annotations

import math

from .model import Work, bound
from .rates import Gpu
from .shapes import HALF, Attention

STRIP = 64  # rows of a wgmma


def cycles(attention: Attention, gpu: Gpu) -> dict[str, float]:
    """Return the cycles of a sequence and head on a multiprocessor, by pipe.

    Four warps take 64 queries and multiply them with all keys. The number of keys is rounded to a multiple of 8 for
    the scores, and of 16 for the result. Q and the weights come from registers. K and V come from shared memory, into
    which TMA writes them once. A score takes a maximum, a product, an exponential, a sum, and half of a conversion to
    16 bits.
    """
    strips, dim = math.ceil(attention.tokens / STRIP), attention.dim
    keys, depth = 8 * math.ceil(attention.tokens / 8), 16 * math.ceil(attention.tokens / 16)
    scores = strips * STRIP * keys
    # An instruction of 64 x N x 16 takes N / 2 clocks.
    tensor = strips * (keys / 2 * dim / 16 + dim / 2 * depth / 16)
    read = strips * dim * HALF * (keys + depth)
    written = 2 * attention.tokens * dim * HALF
    return {
        "tensor": tensor,
        "shared memory": (read + written) / gpu.shared_bytes,
        "issue": scores * 4.5 / 32 / 4,
        "FP32": 2 * scores / gpu.fp32,
        "integer": 1.5 * scores / gpu.integer,
        "MUFU": scores / gpu.mufu,
    }


def comparison(work: Work, attention: Attention, gpu: Gpu) -> tuple[float, str, float, str, float]:
    """Return seconds and limiter of our kernel without HBM, seconds and limiter of this form, and seconds of HBM."""
    ours = bound(work, gpu._replace(hbm_bytes=math.inf, l2_bytes=2**40))
    form = cycles(attention, gpu)
    limiter = max(form, key=lambda pipe: form[pipe])
    rounds = math.ceil(attention.sequences * attention.heads / gpu.multiprocessors)
    seconds = rounds * form[limiter] / gpu.clock_hz
    return ours.seconds, ours.limiter, seconds, limiter, work.hbm_bytes / gpu.hbm_bytes

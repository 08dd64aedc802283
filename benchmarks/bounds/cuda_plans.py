"""Plans of the CUDA kernels: how often each part runs, from the loops in csrc/cuda."""

from __future__ import annotations

import math

from . import mix as mixes
from .paths import LoopCode, Plan, Turns, Variation


def contrastive(width: int, kernel: str) -> Plan:
    """Return the plan of a tile of 128 x 128 in csrc/cuda/contrastive, with features of `width` elements."""

    def role(loop: LoopCode) -> str:
        if mixes.matrix(loop.own):
            return "main" if mixes.count(loop.own, "LDGSTS") else "last"
        return "store" if mixes.count(loop.own, "STG") else "other"

    # 4 warps compute 64 x 64 each: 64 instructions for a step of 32 of the width. The last two steps copy nothing, and
    # the very last one is straight code. Each thread stores 16 times 8 elements.
    steps = math.ceil(width / 32)
    turns = {"main": ("HMMA", 64.0 * max(steps - 2, 0)), "last": ("HMMA", 64.0 * (steps > 1)), "store": ("STG", 16.0)}
    loop = {"HMMA": math.inf, "LDGSTS": math.inf}
    stores = {"STG": math.inf} if kernel == "forward" else {"STG.128": 16.0}
    # The first two steps are copied before the loops.
    return Plan(
        role,
        turns,
        requires={"main": loop, "last": loop, "": {**stores, "LDGSTS": math.inf}},
        optional=frozenset({"store"}),
    )


def hopper(width: int, kernel: str) -> tuple[Plan, Plan]:
    """Return the plans of a tile of 128 x 256 in csrc/cuda/contrastive/hopper_*.cu: of a warp that multiplies, and of
    the warp that copies.

    A block stays on a multiprocessor and loops over tiles. Both plans are for one iteration of that loop, "tile".
    """
    steps = math.ceil(width / 64)

    def multiplies(loop: LoopCode) -> str:
        if mixes.matrix(loop.total):
            return "tile" if loop.depth == 0 else "main"
        return "other"

    def copies(loop: LoopCode) -> str:
        if mixes.count(loop.total, "UTMALDG"):
            return "tile" if loop.depth == 0 else "copy"
        return "other"

    # 4 instructions for 64 of the width. The first ones stand before the loop, because they overwrite the sums.
    turns: Turns = {"tile": 1.0, "main": ("HGMMA", 4.0 * (steps - 1))}
    # A thread holds 128 elements. In gradients, it stores 16 times 8 elements.
    stores = {"STG": math.inf} if kernel == "forward" else {"STG.128": 16.0}
    needs = {"tile": {"HGMMA": 4.0, **stores}}
    return Plan(multiplies, turns, requires=needs), Plan(copies, {"tile": 1.0, "copy": ("UTMALDG", 2.0 * steps)})


def attention_forward(tokens: int, dim: int, keys: int) -> Plan:
    """Return the plan of a sequence and head in csrc/cuda/attention/attention_forward.cu, without splits or a mask.

    keys: number of keys that a block holds at once.
    """

    # This kernel only takes sequences that fit, so it has no loop over chunks of keys.
    fits = dim == 64 and keys == 128

    def role(loop: LoopCode) -> str:
        if mixes.matrix(loop.total):
            return "chunk" if mixes.matrix(loop.own) and not fits else "strip"
        if mixes.count(loop.total, "LDGSTS"):
            return "keys"
        return "zeros" if mixes.count(loop.total, "STS.128") else "other"

    chunks = math.ceil(tokens / keys)
    busy = _tiles(tokens) / 4  # strips with queries, on average over the warps of several blocks
    # The warps of a sequence that fits don't wait for each other. Otherwise, all of them copy the keys for each strip.
    strips = busy if chunks == 1 else math.ceil(tokens / 64)
    copied = 1.0 if chunks > 1 else min(1.0, 1 / strips)  # a sequence that fits is copied for the first strip only
    followed = max(0.0, busy - 1) / strips  # strips that copy the queries of a next one
    variations = []
    for chunk in range(chunks):
        rows = min(keys, tokens - chunk * keys)
        pairs = math.ceil(rows / 32)
        moves = dim / 8 / 128  # accesses of 16 bytes of a thread for each row
        turns = {"keys": ("LDGSTS", rows * moves), "zeros": ("STS", (32 * pairs - rows) * moves)}
        # The first chunk of the first strip has one barrier less, which is one slot of a sequence.
        barriers = 2.0 if chunks == 1 else 3.0
        next_of_chunk = followed if chunk == 0 else 0.0
        both = min(copied, next_of_chunk)
        for share, is_copied, has_next, is_busy in (
            (both, True, True, True),
            (copied - both - (1 - busy / strips), True, False, True),
            (next_of_chunk - both, False, True, True),
            (1 - copied - next_of_chunk + both, False, False, True),
            (1 - busy / strips, True, False, False),
        ):
            # A warp's 16 queries and 32 keys take d / 4 products for the scores and as many for the result, and 16
            # exponentials. Another chunk takes two more.
            needed = {
                "HMMA": pairs * dim / 2 * is_busy,
                "MUFU.EX2": (16.0 * pairs + 2.0 * (chunk > 0)) * is_busy,
                "LDGSTS": 2 * rows * moves * is_copied + dim / 16 * has_next,
                "BAR": barriers * is_copied,
            }
            if share > 1e-9:
                variations.append(Variation(share / chunks, turns if is_copied else {}, {"chunk": needed}))
    if fits:
        strips_that_fit = [
            Variation(one.share, one.turns, {"strip": {**one.requires["chunk"], "STG.128": dim / 16}})
            for one in variations
        ]
    # Only strips with queries store results.
    stores = [(busy / strips, dim / 16), (1 - busy / strips, 0.0)]
    return Plan(
        role,
        {"strip": float(strips), "chunk": float(chunks), "keys": 0.0, "zeros": 0.0},
        copies={"keys": 2, "zeros": 2},
        requires={"": {"LDGSTS": math.inf}},
        variations={"strip": strips_that_fit}
        if fits
        else {
            "strip": [Variation(share, {}, {"strip": {"STG.128": each}}) for share, each in stores if share > 1e-9],
            "chunk": variations,
        },
    )


def attention_backward(tokens: int, dim: int, warps: int) -> Plan:
    """Return the plan of a sequence and head in csrc/cuda/attention/attention_backward.cu, without a mask."""

    def role(loop: LoopCode) -> str:
        if mixes.matrix(loop.total):
            if loop.depth < 2:
                return ("chunk", "strip")[loop.depth]
            return "products" if mixes.count(loop.own, "MUFU") else "query_grad"
        if mixes.count(loop.total, "LDGSTS"):
            return "copy" if loop.parent == "strip" else "first_copy"
        if mixes.count(loop.total, "SHFL"):
            return "delta" if loop.parent == "strip" else "first_delta"
        return "store" if mixes.count(loop.total, "STG") else "other"

    threads, warp_keys = 32 * warps, 32 if dim <= 64 else 16
    # Queries of a strip, and of a part of its dQ. A part has half of the columns.
    part_rows = 32 if dim in (64, 96) else 16
    keys, strip = warps * warp_keys, warps // 2 * part_rows
    tiles, strips, chunks = _tiles(tokens), math.ceil(tokens / strip), math.ceil(tokens / keys)
    first_rows = 16 * min(strip // 16, tiles)
    rows_of_others = (16 * tiles - first_rows) / strips  # an average over all strips
    key_moves = tiles * 16 * dim / 8 / threads / chunks
    pairs = tiles * tiles / strips / chunks / warps  # tiles of 16 x 16 scores of a warp in a strip
    # Longer sequences accumulate dQ, with stores of other widths.
    requires = {"strip": {"STG.32": dim // 2 // 4 * tiles / (strip // 16 * strips)}} if chunks == 1 else {}
    return Plan(
        role,
        {
            "chunk": float(chunks),
            "strip": float(strips),
            # Q and dO of the first strip, K and V.
            "first_copy": ("LDGSTS", (first_rows * dim / 8 / threads + key_moves) / 2),
            "copy": ("LDGSTS", rows_of_others * dim / 8 / threads),
            "first_delta": ("SHFL", 2 * strip * 4 / threads),
            "delta": ("SHFL", 2 * strip * 4 / threads * (strips - 1) / strips),
            # Four of the five products: d / 8 instructions each.
            "products": ("HMMA", pairs * dim / 2),
            "query_grad": ("HMMA", pairs * dim / 8),
            "store": ("STG", tokens * dim / 8 / threads / chunks),
        },
        copies={"first_copy": 4, "copy": 2, "store": 2},
        requires=requires,
    )


def image_resize(from_size: int, to_size: int) -> Plan:
    """Return the plan of a tile of 16 x 16 pixels in csrc/cuda/image/image.cu, for bicubic weights."""

    def role(loop: LoopCode) -> str:
        if loop.depth == 0:
            return "chunk"
        if loop.depth == 1:
            return "sum" if mixes.count(loop.own, "LDS") else "line"
        return "tap"

    scale = max(1.0, from_size / to_size)
    taps = 4 * scale
    lines = 15 * scale + taps
    chunks = math.ceil(lines / 32)
    return Plan(
        role,
        {
            "chunk": float(chunks),
            "line": lines * 16 / 256 / chunks,
            # Three bytes and a coefficient.
            "tap": ("LDG", 4 * taps),
            "sum": ("LDS", taps / chunks),
        },
    )


def image_weigh(from_size: int, to_size: int) -> Plan:
    """Return the plan of the kernel that computes the weights of image_resize. Only its loop of stores counts."""

    def role(loop: LoopCode) -> str:
        return "store" if mixes.count(loop.total, "STG") else "other"

    return Plan(role, {"store": ("STG", 4 * max(1.0, from_size / to_size))})


def _tiles(tokens: int) -> int:
    return math.ceil(tokens / 16)

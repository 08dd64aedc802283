"""Plans of the CUDA kernels: how often each part runs, from the loops in csrc/cuda."""

from __future__ import annotations

import math

from . import mix as mixes
from .paths import LoopCode, Plan, Turns, Variation


def contrastive(width: int, kernel: str) -> Plan:
    """Return the plan of a tile of 128 x 128 in csrc/cuda/contrastive, with features of `width` elements."""

    def role(loop: LoopCode) -> str:
        if mixes.matrix(loop.own):
            return "main"
        return "store" if mixes.count(loop.own, "STG") else "other"

    # 4 warps compute 64 x 64 each: 32 instructions for 16 of the width. Each thread stores 16 times 8 elements.
    turns = {"main": ("HMMA", 32 * 2 * math.ceil(width / 32)), "store": ("STG", 16.0)}
    main = {"HMMA": math.inf, "LDGSTS": math.inf}
    stores = {"STG": math.inf} if kernel == "forward" else {"STG.128": 16.0}
    return Plan(role, turns, requires={"main": main, "": stores}, optional=frozenset({"store"}))


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

    def role(loop: LoopCode) -> str:
        if mixes.matrix(loop.total):
            return "chunk" if mixes.matrix(loop.own) else "strip"
        if mixes.count(loop.total, "LDGSTS"):
            return "keys" if loop.parent == "chunk" else "queries"
        if mixes.count(loop.total, "STG"):
            return "store"
        return "visible" if mixes.count(loop.total, "STS") else "other"

    tiles, strips, chunks = _tiles(tokens), math.ceil(tokens / 64), math.ceil(tokens / keys)
    turns_of_warp = tiles / 4  # an average, since the last strip can leave warps without queries
    rounded = [_tiles(min(keys, tokens - first)) for first in range(0, tokens, keys)]
    # A sequence that fits is copied once, and a longer one for each strip.
    copied_share = min(1.0, (1 if chunks == 1 else strips) / turns_of_warp)
    chunk_variations = []
    for tiles_of_chunk in rounded:
        # 16 queries with 16 keys take d / 8 products for the scores and as many for the result, and 8 exponentials.
        needs = {"chunk": {"HMMA": tiles_of_chunk * dim / 4, "MUFU.EX2": tiles_of_chunk * 8 + 2.0}}
        copies = {"keys": ("LDGSTS", tiles_of_chunk * 16 * dim / 8 / 128)}
        chunk_variations.append(Variation(copied_share / chunks, copies, needs))
        if copied_share < 1:
            chunk_variations.append(Variation((1 - copied_share) / chunks, {"keys": 0.0}, needs))
    moves = 16 * dim / 8 / 32  # accesses of 16 bytes to a warp's queries, and as many to its results
    return Plan(
        role,
        {
            "strip": turns_of_warp,
            "chunk": float(chunks),
            "keys": 0.0,
            "queries": ("LDGSTS", moves),
            "store": ("STG", moves),
        },
        copies={"keys": 2},
        variations={"chunk": chunk_variations},
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

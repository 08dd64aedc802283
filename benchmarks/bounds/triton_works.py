"""The Triton kernels at named shapes, compiled ahead of time for sm_80 and sm_90."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from . import rates, shapes
from .cache import BANDS_OF_8
from .model import Work
from .paths import LoopCode, Plan, execute
from .triton_code import Code, Launch, compiled, recorded

# A launch, the turns of its loop, and the work's fields.
_Case = tuple[Launch, float, dict[str, Any]]

HALF, FLOAT, DOUBLE = torch.float16, torch.float32, torch.float64


def works(capability: tuple[int, int]) -> Iterator[Work]:
    """Yield the work of each Triton kernel at each of its shapes, in float16."""
    codes: dict[tuple[Any, ...], Code] = {}
    architecture = 10 * capability[0] + capability[1]
    for launch, turns, shape in _launches(capability):
        constants = {name: str(value) for name, value in launch.arguments.items() if not isinstance(value, Tensor)}
        key = (launch.title, *sorted(constants.items()))
        if key not in codes:
            codes[key] = compiled(launch, architecture)
        code = codes[key]
        execution = execute(code.function, Plan(_role, {"main": turns}))
        # One warp of a program starts the copies, and a predicate disables them in the others.
        for mix in (*execution.phases, *execution.bodies.values()):
            if "UTMALDG" in mix:
                mix["UTMALDG"] /= code.threads / 32  # type: ignore[assignment]
        yield Work(
            kernel=launch.title,
            backend="triton",
            architecture=str(architecture),
            phases=execution.phases,
            # The kernels with descriptors write G in equal slices, and the longest part of the epilogue is one of them.
            section=execution.longest_section * shape.pop("slices", 1),
            bodies=execution.bodies,
            threads=code.threads,
            registers=code.registers,
            shared=code.shared,
            **shape,
        )


def _role(loop: LoopCode) -> str:
    return "main" if loop.depth == 0 else "other"


def _launches(capability: tuple[int, int]) -> Iterator[_Case]:
    """Yield a launch of each kernel, the turns of its loop, and the work's fields."""
    for loss in shapes.LOSSES:
        yield from _losses(loss, capability)
    for attention in shapes.ATTENTION:
        yield from _attention(attention, capability)
    yield from _single_query(shapes.POOL, capability)
    yield from _pointwise(capability)


def _empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _titled(launch: Launch, family: str, name: str = "") -> Launch:
    return replace(launch, title=f"{family}_{name or launch.name}")


def _losses(loss: shapes.Loss, capability: tuple[int, int]) -> Iterator[_Case]:
    from bclip_fast.ops.contrastive import triton, triton_kernels, triton_tma_gradients, triton_tma_kernels
    from bclip_fast.ops.contrastive.call import ContrastiveCall, SoftmaxGradient

    cache = rates.of_architecture(f"{capability[0]}{capability[1]}").l2_mib << 20
    batch, scalar = loss.batch, _empty(dtype=FLOAT)
    features = _empty(batch, loss.width), _empty(batch, loss.width)
    call = ContrastiveCall(*features, scalar, 0, loss.chunk)
    lse = _empty(batch, dtype=DOUBLE), _empty(batch, dtype=DOUBLE)
    upstream = SoftmaxGradient(*lse, scalar, _empty(batch, dtype=FLOAT))
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: triton.forward(call),
        "softmax": lambda: triton.backward(call, upstream, HALF),
        "sigmoid": lambda: triton.siglip(replace(call, bias=scalar), 1 / batch, HALF, True),
    }
    for kernel, run in calls.items():
        # The launches of all chunks of rows are equal.
        # The tensors are on the meta device, which has no capability.
        own = patch.object(triton, "_capability", lambda call: capability)
        modules = [triton, triton_kernels, triton_tma_kernels, triton_tma_gradients]
        # The second kernel of the forward pass leaves at once if no tile voted.
        with own, recorded(modules, capability, limit=1) as launches:
            run()
        [launch] = launches
        rows, columns = launch.arguments["BLOCK_ROWS"], launch.arguments["BLOCK_COLUMNS"]
        elements = rows * columns // (32 * launch.options["num_warps"])
        turns = loss.width / launch.arguments["BLOCK_WIDTH"]
        fields = loss.work(kernel, rows, columns, elements, BANDS_OF_8, cache)
        if triton.takes_descriptors(HALF, capability):
            fields["tma_bytes"] = float((rows + columns) * loss.width * shapes.HALF)
            fields["slices"] = 1 if kernel == "forward" else triton.SLICES
        yield _titled(launch, "contrastive", kernel), turns, fields


def _attention(shape: shapes.Attention, capability: tuple[int, int]) -> Iterator[_Case]:
    from bclip_fast.ops.attention import triton, triton_kernels
    from bclip_fast.ops.attention.call import AttentionCall

    rows = shape.sequences * shape.tokens
    qkv, out = _empty(rows, 3, shape.heads, shape.dim), _empty(rows, shape.heads, shape.dim)
    call = AttentionCall(qkv, None, None, shape.tokens, False, 0.0, None, shape.dim**-0.5)
    with recorded([triton, triton_kernels], capability) as launches:
        triton.forward(call)
        triton.backward(call, out, out, _empty(shape.heads, rows, dtype=FLOAT))
    for launch in launches:
        size = launch.arguments.get("QUERIES") or launch.arguments["TILE"] // launch.arguments["KEYS"]
        if launch.name in ("block_forward", "query_backward"):
            size = launch.arguments["KEYS"]
        turns = math.ceil(shape.tokens / size)
        direction = "forward" if launch.name.endswith("forward") else "backward"
        # dQ takes three of seven products, and dK and dV take four. Each kernel computes the scores and dP again.
        flops, parts = {"query_backward": (3.0, 6.0), "key_backward": (4.0, 6.0)}.get(launch.name, (None, None))
        yield _titled(launch, "attention"), turns, shape.work(direction, launch.programs, flops, parts)


def _single_query(shape: shapes.Attention, capability: tuple[int, int]) -> Iterator[_Case]:
    from bclip_fast.ops.attention.call import SingleQueryCall
    from bclip_fast.ops.attention.single_query import triton

    count, rows = shape.sequences, shape.sequences * shape.tokens
    query, key_value = _empty(count, shape.heads, shape.dim), _empty(rows, 2, shape.heads, shape.dim)
    bounds = _empty(count + 1, dtype=torch.int32)
    call = SingleQueryCall(
        query, key_value, _empty(count, dtype=torch.int64), bounds, False, 0.0, None, shape.dim**-0.5
    )
    with recorded([triton], capability) as launches:
        triton.forward(call)
        triton.backward(call, query, query, _empty(count, shape.heads, dtype=FLOAT))
    for launch, parts in zip(launches, (2.0, 4.0), strict=True):
        fields = shape.work(launch.name, launch.programs, parts=parts)
        fields |= {"operator": "pooled_attention", "flops": 0.0}
        yield _titled(launch, "single_query"), math.ceil(shape.tokens / launch.arguments["KEYS"]), fields


def _pointwise(capability: tuple[int, int]) -> Iterator[_Case]:
    from bclip_fast.ops.pointwise import triton
    from bclip_fast.ops.pointwise.call import AddNormCall, AddNormGradientCall

    norm, gelu = shapes.NORM, shapes.GELU
    stream, branch = _empty(norm.rows, norm.width, dtype=FLOAT), _empty(norm.rows, norm.width)
    weight = _empty(norm.width, dtype=FLOAT)
    inner = _empty(gelu.rows, gelu.width)
    # The bytes of an element: a stream of float32, and branch, result and their gradients of float16.
    calls: list[tuple[Callable[[], Any], str, shapes.Rows, float]] = [
        (
            lambda: triton.add_norm(AddNormCall(stream, branch, weight, weight, 1e-6, 0.0, None, HALF, False)),
            "add_norm",
            norm,
            4 + 2 + 4 + 2,
        ),
        (
            lambda: triton.add_norm_backward(
                AddNormGradientCall(branch, stream, None, stream, weight, 1e-6, 0.0, None, HALF)
            ),
            "add_norm",
            norm,
            2 + 4 + 4 + 4 + 2,
        ),
        (lambda: triton.gelu(inner), "gelu", gelu, 2 + 2),
        (lambda: triton.gelu_backward(inner, inner), "gelu", gelu, 2 + 2 + 2),
    ]
    for run, operator, rows, moved in calls:
        with recorded([triton], capability) as launches:
            run()
        for launch in launches:
            turns = rows.rows / launch.programs if launch.name == "add_norm_backward" else 0.0
            yield _titled(launch, "pointwise"), turns, rows.work(operator, launch.programs, moved)

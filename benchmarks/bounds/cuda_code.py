"""The CUDA kernels of the built module at named shapes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bclip_fast.benchmarks import cuda_resources

from . import cuda_plans, rates, shapes
from . import mix as mixes
from .cache import Order
from .machine_code import MachineCode
from .model import Work
from .paths import Execution, Plan, execute

# The emulator's counts of each kernel.
COUNTS = Path(__file__).parents[1] / "results" / "kernel_counts.json"


def works(codes: Sequence[MachineCode], kernel: str = "") -> Iterator[Work]:
    """Yield the work of each CUDA kernel at each of its shapes, in float16.

    codes: machine code of the module.
    kernel: prefix of the names of the kernels. "" takes all.
    """
    conflicts = bank_conflicts()
    by_name = {(code.architecture, cuda_resources.kernel_name(code.symbol)): code for code in codes}
    for architecture in sorted({code.architecture for code in codes}):
        cache = rates.of_architecture(architecture.rstrip("af")).l2_mib << 20
        for name, plan, shape in _cases(cache):
            if (architecture, name) not in by_name or not name.startswith(kernel):
                continue
            code = by_name[architecture, name]
            shared, threads = cuda_resources.launch_of(name)
            run = _of_hopper(code, plan, threads) if isinstance(plan, tuple) else execute(code.function, plan)
            yield Work(
                kernel=name.partition("<")[0],
                backend="cuda",
                architecture=architecture.rstrip("af"),
                phases=run.phases,
                section=run.longest_section,
                bodies=run.bodies,
                threads=threads,
                registers=code.registers,
                shared=shared,
                conflicts=conflicts.get(name, {}),
                **shape,
            )


@functools.cache
def _order(width: int) -> Order:
    """Return the order of the contrastive kernels' tiles in the built module."""
    from bclip_fast import _cuda as module  # type: ignore[attr-defined]

    return lambda block, rows, columns: module.contrastive_tile(block, rows, columns, width)


def _of_hopper(code: MachineCode, plans: tuple[Plan, Plan], threads: int) -> Execution:
    """Return the instructions of an average warp for a tile of a kernel for Hopper.

    The last two groups of 4 warps multiply, and one warp of the first group copies.
    """
    products, copies = (execute(code.function, plan, "tile") for plan in plans)
    warps = threads // 32
    phases = [mixes.total([]) for _ in range(3)]
    for phase, part in zip(phases, products.phases, strict=True):
        mixes.add(phase, part, 8 / warps)
    # It copies ahead, during all phases.
    mixes.add(phases[1], copies.total, 1 / warps)
    sections = [mixes.total([]) for _ in products.sections]
    for section, part in zip(sections, products.sections, strict=True):
        mixes.add(section, part, 8 / warps)
    return Execution((phases[0], phases[1], phases[2]), sections, {**products.bodies, **copies.bodies})


def bank_conflicts() -> dict[str, dict[str, float]]:
    """Return the emulator's wavefronts over the least number of them, by kernel and unit. Leave out ratios of 1."""
    if not COUNTS.exists():
        return {}
    units = {"shared_load": "LDS", "shared_store": "STS", "ldmatrix": "LDSM", "copy": "LDGSTS"}
    factors: dict[str, dict[str, float]] = {}
    for case in json.loads(COUNTS.read_text()).values():
        tile = case["tiles"][0]
        least = tile.get("least_wavefronts", {})
        found = {
            units[kind]: round(number / least[kind], 3)
            for kind, number in tile.get("wavefronts", {}).items()
            if least.get(kind) and number != least[kind]
        }
        # A kernel's first case is a full tile, or a sequence without a mask.
        factors.setdefault(case["kernel"], found)
    return factors


def _cases(cache: int) -> Iterator[tuple[str, Plan | tuple[Plan, Plan], dict[str, Any]]]:
    for loss in shapes.LOSSES:
        for kernel in ("forward", "softmax", "sigmoid"):
            plan = cuda_plans.contrastive(loss.width, kernel)
            yield f"contrastive_{kernel}<Half>", plan, loss.work(kernel, 128, 128, 128, _order(loss.width), cache)
            # The elements of a tile for each of the 384 threads, of which 256 have any. The order of the tiles is
            # CUTLASS's.
            wide = loss.work(kernel, 128, 256, 128 * 256 // 384, None, cache, multicast=2)
            wide["tma_bytes"] = float((128 + 256) * loss.width * shapes.HALF)
            # A ring of 4 stages of 64 columns.
            wide["ahead"] = min(1.0, 4 * 64 / loss.width)
            yield f"hopper_{kernel}<Half>", cuda_plans.hopper(loss.width, kernel), wide
    for attention in shapes.ATTENTION:
        dim, tokens = attention.dim, attention.tokens
        keys = {32: 256, 64: 128 if tokens <= 128 else 256}.get(dim, 128)
        blocks = attention.heads * attention.sequences
        plan = cuda_plans.attention_forward(tokens, dim, keys)
        yield f"attention_forward<Half, {dim}, {keys}, false>", plan, attention.work("forward", blocks)
        warps = 4 if dim == 64 and tokens <= 128 else 8
        plan = cuda_plans.attention_backward(tokens, dim, warps)
        yield f"attention_backward<Half, {dim}, {warps}, false>", plan, attention.work("backward", blocks)
    for image in shapes.IMAGES:
        tiles = image.count * -((-image.size // 16) ** 2)
        yield "image_resize<Half>", cuda_plans.image_resize(image.height, image.size), image.work(tiles)
        outputs = image.count * 2 * image.size
        plan = cuda_plans.image_weigh(image.height, image.size)
        yield "image_weigh<>", plan, image.work_of_weights(-(-outputs // 256))

"""Tables of the bounds: `bclip bench --model`, and results/bounds.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bclip_fast.benchmarks.table import print_table

from . import designs, goals, shapes, store
from . import mix as mixes
from .model import Bound, Work, loop_cycles
from .rates import GPUS, SOURCES, Gpu


def show(gpu: str, fresh: bool) -> int:
    """Print the bounds of all kernels on a GPU. Returns the exit status.

    fresh: whether to analyse this machine's build instead of reading the stored analysis.

    Raises:
        UserError: the stored analysis is missing or damaged, or a fresh one lacks its tools or the CUDA module.
    """
    analysis = store.analyse([GPUS[gpu].architecture]) if fresh else store.load()
    rows = [
        (work.kernel, work.backend, work.shape, each.limiter, f"{1e3 * each.seconds:.3f}", share_of(work, each))
        for work, each in store.bounds(analysis.works, gpu)
        if work.shape not in shapes.SMALL
    ]
    print_table(
        f"{GPUS[gpu].name}: lower bounds from machine code and published rates, not times",
        ["kernel", "backend", "shape", "limiter", "bound, ms", "share of peak"],
        rows,
        4,
    )
    here = store.current_build()
    # An installation has no CUDA sources to compare.
    differs = "" if analysis.build.endswith(here) else f". This machine has {here}: --fresh analyses it"
    print(f"Machine code of {analysis.build}{differs}")
    return 0


def share_of(work: Work, each: Bound) -> str:
    """Return the share of the peak with its unit."""
    return f"{each.share:.0%} {'FLOP' if work.flops else 'HBM'}"


def markdown(analysis: store.Analysis) -> str:
    """Return the text of results/bounds.md."""
    commit, before = store.load_before()
    lines = [
        "# Bounds of the GPU kernels",
        "",
        "`python -m benchmarks.bounds` made this file without a GPU. The numbers are lower bounds and not times. No",
        "kernel can be faster than its bound on a GPU with these rates, and it can be several times slower.",
        "",
        "The machine code gives the instructions of a block along the cheapest path. The plans in `benchmarks/bounds/`",
        "give the turns of its loops. Published rates give the cycles of each pipe, and the pipe with the most cycles",
        "limits a block. The busiest multiprocessor runs ceil(blocks / multiprocessors) blocks of a launch. If only",
        "one block fits on a multiprocessor, its phases don't overlap, and its limiter ends with `(1 block)`. `stall",
        "counts` is the time of one warp that issues in order and waits only for the fixed latencies in its code. The",
        "bytes of L2 and HBM give two more bounds. The bound is the largest of these times.",
        "",
        "The shapes of attention are sequences x tokens, heads x head dimension. The bytes of HBM count each input and",
        "each result once. The features of a loss count each time that L2 lost them. The model's cache first forgets",
        "the part whose last use is the oldest, and sees the tiles in the order of the blocks. The bytes of L2 count",
        "the features of a loss for each block that reads them.",
        "The bounds of the CUDA kernels include the bank conflicts that the emulator counts. Those of the Triton",
        "kernels assume none. Cache misses, the latency of memory and launches are left out.",
        "",
        "Nobody has compared a published time with a bound yet, so the method's error is unknown. The stall counts",
        "are the least certain part. They follow arXiv 2503.20481, and assume that a warp never issues before its",
        "stall count ends.",
        "",
        f"The digests of the kernels' sources are {analysis.build}. All inputs are float16.",
        "",
        "| column | meaning |",
        "|---|---|",
        _row("bound before", f"the bound of commit {commit}. Newer kernels and shapes have none."),
        _row(
            "share of peak",
            "part of the peak rate of dense matrix FLOP, or of HBM's rate for kernels without matrix products",
        ),
        _row("limiter", "the resource with the largest time"),
        _row("blocks", "number of blocks that fit on a multiprocessor"),
        _row("slots", "issue slots of a thread for each element of its tile, in the part with the exponentials"),
        _row("all slots", "the same for all code after the products, such as loads, sums and stores"),
        "",
        f"An arrow leads from the slots of commit {commit} to the present ones.",
    ]
    for gpu in ("a100", "h100"):
        lines += ["", f"## {GPUS[gpu].name}", "", *_table(analysis, gpu, before)]
    lines += [
        "",
        "## H200",
        "",
        "It has the H100's multiprocessors, and HBM of 4.8 TB/s. Only these bounds differ from the H100's:",
        "",
    ]
    lines += _h200(analysis)
    lines += ["", "## The loss at B = 65536, D = 512", "", *_goals(analysis)]
    lines += ["", "## Designs that are not compiled", "", *_designs(analysis)]
    lines += ["", "## Main loops", "", *_loops(analysis)]
    lines += [
        "",
        "## Rates",
        "",
        "| rate | A100 | H100 | source of the A100's | source of the H100's |",
        "|---|---|---|---|---|",
    ]
    for field, (meaning, ampere, hopper) in SOURCES.items():
        rates = (f"{getattr(GPUS[gpu], field):g}" for gpu in ("a100", "h100"))
        lines.append(_row(meaning, *rates, ampere, hopper))
    return "\n".join(lines) + "\n"


def _table(analysis: store.Analysis, gpu: str, before: Mapping[store.Key, Mapping[str, Any]]) -> list[str]:
    columns = "kernel", "backend", "shape", "bound before, ms", "bound, ms", "share of peak", "limiter"
    lines = _header(*columns, "L2, GB", "HBM, GB", "blocks", "slots", "all slots")
    for work, each in store.bounds(analysis.works, gpu):
        if work.shape in shapes.SMALL:
            continue
        old = before.get((gpu, work.backend, work.kernel, work.shape), {})
        slots = [f"{number:.1f}" for number in store.slots_of(work)] or ["", ""]
        if slots[0] and old:
            slots = [f"{number:.1f} → {new}" for number, new in zip(old["slots"], slots, strict=True)]
        ms = f"{old['ms']:.3f}" if old else ""
        cells = work.kernel, work.backend, work.shape, ms, f"{1e3 * each.seconds:.3f}", share_of(work, each)
        moved = (f"{number / 1e9:.3g}" for number in (work.l2_bytes, work.hbm_bytes))
        lines.append(_row(*cells, each.limiter, *moved, str(each.resident), *slots))
    return lines


def _h200(analysis: store.Analysis) -> list[str]:
    lines = _header("kernel", "backend", "shape", "bound, ms", "share of peak", "limiter")
    pairs = zip(store.bounds(analysis.works, "h100"), store.bounds(analysis.works, "h200"), strict=True)
    for (_, older), (work, each) in pairs:
        if each.seconds < older.seconds:
            cells = (
                work.kernel,
                work.backend,
                work.shape,
                f"{1e3 * each.seconds:.3f}",
                share_of(work, each),
                each.limiter,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _goals(analysis: store.Analysis) -> list[str]:
    columns = "GPU", "kernels", "forward", "in step", "gradient", "in step", "products", "sum", "goal", "the goal is"
    return [
        "Forward and backward pass in ms. The kernels' times are their bounds. The products of the gradient G with the",
        "features run in cuBLAS, at the rate in the table below. The sum leaves out launches and small reductions, so",
        "it is a bound too. Nobody has measured these kernels. The last column says how close to their bounds they",
        "must run.",
        "",
        "In the kernels for Hopper, two groups of warps multiply, and one can be ahead of the other by the stages of",
        "the ring. Then a group's epilogue runs beside the products of the other. `in step` is the bound if both",
        "groups always reach the epilogue together. The code allows both.",
        "",
        *_header(*columns),
        *(_row(*cells) for cells in goals.rows(analysis.works)),
    ]


def _designs(analysis: store.Analysis) -> list[str]:
    """Compare hand-counted designs with the compiled kernels on an H100."""
    compiled: dict[tuple[str, str], dict[str, float]] = {}
    for work, each in store.bounds(analysis.works, "h100"):
        if work.operator == "fused_attention":
            way = "forward" if "forward" in work.kernel else "backward"
            times = compiled.setdefault((way, work.shape), {})
            times[work.backend] = times.get(work.backend, 0.0) + each.seconds
    lines = [
        "`benchmarks/bounds/designs.py` counts attention with wgmma by hand, for an H100. Its tiles have 64 rows, so",
        "197 tokens take the products of 256. A design has no prologue and no address arithmetic, and everything",
        "overlaps. So a compiled kernel has a larger bound than its design. The last column is the least bound of a",
        "compiled kernel, of CUDA or Triton, over that of the design.",
        "",
        *_header("pass", "shape", "cuda, ms", "triton, ms", "design, ms", "limiter of the design", "gain at most"),
    ]
    for work, each in store.bounds(list(designs.works()), "h100"):
        way = work.kernel.removeprefix("attention_")
        times = compiled[way, work.shape]
        ms = [f"{1e3 * times[backend]:.3f}" if backend in times else "" for backend in ("cuda", "triton")]
        gain = f"{min(times.values()) / each.seconds:.2f}"
        lines.append(_row(way, work.shape, *ms, f"{1e3 * each.seconds:.3f}", each.limiter, gain))
    return [
        *lines,
        "",
        "These bounds decided against a backward kernel with wgmma. For images and captions of BiomedCLIP (64 elements",
        "a head, up to 256 tokens), HBM limits the design, and the CUDA kernel's bound is at most 1.2 times as large.",
        "With 577 tokens the gain can be larger. A tuning record can choose cuDNN (`sdpa_cudnn`) there. It uses wgmma.",
    ]


def _loops(analysis: store.Analysis) -> list[str]:
    lines = [
        "A main loop is the code from the first matrix instruction to the last one. Cycles are those of the slowest",
        "pipe of a multiprocessor, for each MFLOP. Slots and LDSM are issue slots and `ldmatrix` instructions for each",
        "matrix instruction.",
        "",
        *_header("kernel", "backend", "GPU", "shape", "slots", "LDSM", "cycles", "pipe"),
    ]
    for gpu in (GPUS["a100"], GPUS["h100"]):
        for work in main_loops(analysis.works, gpu):
            cycles, loop = loop_cycles(work, gpu), work.phases[1]
            pipe = max(cycles, key=lambda name: cycles[name])
            counts = (number / mixes.matrix(loop) for number in (mixes.slots(loop), mixes.count(loop, "LDSM")))
            numbers = (f"{number:.2f}" for number in counts)
            lines.append(_row(work.kernel, work.backend, gpu.name, work.shape, *numbers, f"{cycles[pipe]:.0f}", pipe))
    return lines


def _header(*columns: str) -> list[str]:
    return [_row(*columns), _row(*("---" for _ in columns))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main_loops(works: list[Work], gpu: Gpu) -> list[Work]:
    """Return one work for each kernel that multiplies matrices on a GPU, at its first shape."""
    first: dict[tuple[str, ...], Work] = {}
    for work in works:
        if work.architecture == gpu.architecture and mixes.matrix(work.total):
            head = work.shape.rpartition(" x ")[2] if work.operator == "fused_attention" else ""
            first.setdefault((work.backend, work.kernel, head), work)
    return list(first.values())

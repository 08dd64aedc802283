"""The bound of a kernel's time: cycles of each pipe, whole rounds of blocks, and the bytes of L2 and HBM."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from . import mix as mixes
from .mix import Mix
from .rates import Gpu


@dataclass(frozen=True)
class Work:
    """The launches of a kernel for one call of its operator, from its machine code.

    phases: instructions of an average warp before, in and after the part that multiplies matrices.
    bodies: instructions of one iteration of each loop, by role.
    blocks: blocks of a launch.
    flops: least matrix FLOP of the call.
    l2_bytes, hbm_bytes: bytes of the whole call. For HBM, each input and each result counts once.
    elements: elements of the epilogue per thread. 0 without an epilogue.
    section: issue slots of one part of the epilogue. Barriers of the block divide it into parts, and this one has the
        most exponentials.
    ahead: part of a main loop by which one group of warps of a block can be ahead of the others. 0 if all of them wait
        for its end.
    tma_bytes: bytes that the tensor memory accelerator (TMA) writes to the shared memory of a block.
    conflicts: wavefronts of shared memory over the least number of them, by unit, such as "LDS". 1 by default.
    """

    kernel: str
    backend: str
    operator: str
    architecture: str
    shape: str
    phases: tuple[Mix, Mix, Mix]
    bodies: dict[str, Mix]
    blocks: int
    threads: int
    registers: int
    shared: int
    flops: float
    l2_bytes: float
    hbm_bytes: float
    launches: int = 1
    elements: int = 0
    section: float = 0.0
    ahead: float = 0.0
    tma_bytes: float = 0.0
    conflicts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> Mix:
        """Instructions of an average warp."""
        return mixes.total(self.phases)

    @property
    def epilogue_slots(self) -> float:
        """Issue slots for each element of all code after the products."""
        return mixes.slots(self.phases[2]) / self.elements

    @property
    def element_slots(self) -> float:
        """Issue slots for each element of the epilogue's longest part, which includes rounding and staging."""
        return self.section / self.elements


@dataclass(frozen=True)
class Bound:
    """A lower bound. It isn't a measurement, and a kernel can be several times slower.

    limiter: resource that sets the bound.
    share: matrix FLOP that the call needs, over those of the GPU's peak rate in this time. For a kernel without such
        FLOP, least bytes of HBM over those of the GPU's rate.
    resident: number of blocks that fit on a multiprocessor.
    cycles: cycles of one block, by pipe.
    """

    seconds: float
    limiter: str
    share: float
    resident: int
    cycles: dict[str, float] = field(default_factory=dict)


def pipes(mix: Mix, warps: int, gpu: Gpu, conflicts: Mapping[str, float] = MappingProxyType({})) -> dict[str, float]:
    """Return the cycles that a multiprocessor needs for a block of warps that each run `mix`, by pipe.

    A multiprocessor has four sub-cores, and each issues one instruction a clock. The warps spread evenly over them.

    conflicts: as in `Work`.
    """
    per_core = warps / 4
    tensor = shared = copies = 0.0
    for kind, number in mix.items():
        unit, _, detail = kind.partition(".")
        if unit == "HMMA":
            rows, columns, depth = _hmma_shape(detail)
            tensor += number * per_core * gpu.hmma_clocks * rows * columns * depth / (16 * 8 * 16)
        elif unit == "HGMMA":
            columns = int(detail.split("x")[1])
            # The four warps of a group issue one instruction together.
            tensor += number * per_core * columns / 2
            bytes_read = columns * 16 * 2 + (0 if detail.endswith(".R") else 64 * 16 * 2)
            shared += number * warps / 4 * bytes_read / gpu.shared_bytes
        elif unit == "UTMALDG":
            copies += number * warps * gpu.tma_clocks
        else:
            wavefronts = _wavefronts(unit, detail) * conflicts.get(unit, 1.0)
            shared += number * warps * wavefronts * 128 / gpu.shared_bytes
    lane_pipes = {"FP32": gpu.fp32, "integer": gpu.integer, "FP64": gpu.fp64, "MUFU": gpu.mufu}
    kinds = {"integer": "INT"}
    cycles = {pipe: mixes.count(mix, kinds.get(pipe, pipe)) * warps * 32 / rate for pipe, rate in lane_pipes.items()}
    return {"tensor": tensor, "shared memory": shared, "issue": mixes.slots(mix) * per_core, "TMA": copies, **cycles}


def _hmma_shape(detail: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(16)(8)(4|8|16)", detail)
    if match is None:
        raise ValueError(f"unknown shape of HMMA: {detail}")
    return int(match[1]), int(match[2]), int(match[3])


def _wavefronts(unit: str, detail: str) -> float:
    """Return the wavefronts of 128 bytes of a warp instruction without bank conflicts."""
    if unit == "LDSM":
        return float(detail)
    if unit in ("LDS", "STS", "LDG", "STG", "LDGSTS"):
        # A request of less than 4 bytes a lane takes a wavefront too.
        return max(1.0, int(detail) / 32)
    return {"SHFL": 1.0, "REDUX": 2.0, "STSM": 4.0, "MOVM": 1.0}.get(unit, 0.0)


def matrix_flops(mix: Mix) -> float:
    """Return the FLOP of the matrix instructions of a warp."""
    flops = 0.0
    for kind, number in mix.items():
        unit, _, detail = kind.partition(".")
        if unit == "HMMA":
            flops += number * 2 * math.prod(_hmma_shape(detail))
        elif unit == "HGMMA":
            flops += number * 2 * 16 * int(detail.split("x")[1]) * 16
    return flops


def resident_blocks(registers: int, shared: int, threads: int, gpu: Gpu) -> int:
    """Return the number of blocks that fit on a multiprocessor."""
    # The hardware allocates registers to a warp in units of 256, and takes 1 KiB of shared memory for each block.
    allocated = -(-registers * 32 // 256) * 256 * (threads // 32)
    return max(
        1, min(gpu.registers // allocated, gpu.shared_kib * 1024 // (shared + 1024), gpu.max_threads // threads, 32)
    )


def bound(work: Work, gpu: Gpu) -> Bound:
    """Return the bound of a kernel on a GPU of its architecture.

    The busiest multiprocessor gets ceil(blocks / multiprocessors) blocks of each launch. Resident blocks overlap
    perfectly, so the pipe with the most cycles limits them. If only one block fits on a multiprocessor, its phases
    don't overlap, because all its warps wait for the main loop's end. In a block with two groups of warps that fill
    their buffers by TMA, one group can multiply for `ahead` of a main loop while the other is in its epilogue. A warp
    issues in order and waits for each stall count.
    """
    warps = work.threads // 32
    resident = resident_blocks(work.registers, work.shared, work.threads, gpu)
    rounds = math.ceil(work.blocks / gpu.multiprocessors)
    cycles = pipes(work.total, warps, gpu, work.conflicts)
    # The copies write 128 bytes a clock to shared memory, beside its readers.
    cycles["TMA"] = max(cycles["TMA"], work.tma_bytes / gpu.shared_bytes)
    if resident == 1:
        before, within, after = (max(pipes(phase, warps, gpu, work.conflicts).values()) for phase in work.phases)
        block = max(before + within + after - min(after, work.ahead * within), *cycles.values())
    else:
        block = max(cycles.values())
    limiter = max(cycles, key=lambda pipe: cycles[pipe])
    if resident == 1 and block > 1.005 * cycles[limiter]:
        limiter += " (1 block)"
    stalls = work.total[mixes.STALL] * math.ceil(rounds / resident)
    seconds = {
        limiter: work.launches * rounds * block / gpu.clock_hz,
        "stall counts": work.launches * stalls / gpu.clock_hz,
        "L2": work.l2_bytes / (gpu.l2_bytes * gpu.clock_hz),
        "HBM": work.hbm_bytes / gpu.hbm_bytes,
    }
    slowest = max(seconds, key=lambda name: seconds[name])
    time = seconds[slowest]
    share = work.flops / time / gpu.peak_flops if work.flops else seconds["HBM"] / time
    return Bound(time, slowest, share, resident, cycles)


def loop_cycles(work: Work, gpu: Gpu) -> dict[str, float]:
    """Return the cycles of each pipe for the part that multiplies matrices, per MFLOP of a block."""
    flops = matrix_flops(work.phases[1]) * work.threads / 32 / 1e6
    return {
        pipe: cycles / flops for pipe, cycles in pipes(work.phases[1], work.threads // 32, gpu, work.conflicts).items()
    }

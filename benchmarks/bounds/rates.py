"""Published rates of GPUs, each with its source."""

from __future__ import annotations

from typing import NamedTuple

_CONFIG = "FlashGPU-Sim, configs/SM90_H100/gpgpusim.config@1769662, calibrated on an H100 SXM"
_AMPERE = "NVIDIA, Ampere architecture in depth (2020)"
_GUIDE = "CUDA C++ programming guide, technical specifications"


class Gpu(NamedTuple):
    """A GPU's rates, of one multiprocessor per clock unless the name says otherwise.

    hmma_clocks: clocks of a sub-core for one HMMA.16816.
    dense_flops: matrix FLOP in float16 with float32 sums.
    fp32, integer, fp64, mufu: operations of lanes.
    shared_bytes: bytes read from or written to shared memory or the L1 cache.
    l2_bytes: bytes of the whole GPU per clock.
    l2_mib: MiB of L2 for data that all multiprocessors read.
    hbm_bytes: bytes of the whole GPU per second.
    tma_clocks: least clocks between two copies of the tensor memory accelerator (TMA). 0 without one.
    matmul_flops: FLOP per second that the library's matrix products reach in float16.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock_hz: float
    dense_flops: int
    hmma_clocks: float
    fp32: int
    integer: int
    fp64: int
    mufu: int
    shared_bytes: int
    l2_bytes: int
    l2_mib: int
    hbm_bytes: float
    registers: int
    shared_kib: int
    max_threads: int
    tma_clocks: int
    matmul_flops: float

    @property
    def peak_flops(self) -> float:
        """Dense matrix FLOP per second of the whole GPU."""
        return self.multiprocessors * self.clock_hz * self.dense_flops


_H100 = Gpu(
    *("H100 SXM", "90", 132, 1.83e9, 4096, 6.0, 128, 128, 64, 16, 128, 5120, 25, 3.35e12, 65536, 228, 2048),
    *(32, 790e12),
)
GPUS = {
    "a100": Gpu(
        *("A100 SXM 40 GB", "80", 108, 1.41e9, 2048, 8.0, 64, 64, 32, 16, 128, 5120, 20, 1.555e12, 65536, 164, 2048),
        *(0, 250e12),
    ),
    "h100": _H100,
    "h200": _H100._replace(name="H200", hbm_bytes=4.8e12),
}


def of_architecture(architecture: str) -> Gpu:
    """Return the first GPU of an architecture, such as "80"."""
    return next(gpu for gpu in GPUS.values() if gpu.architecture == architecture)


# The meaning of each row of the table, and the sources for the A100 and for the H100.
SOURCES = {
    "multiprocessors": ("multiprocessors", _AMPERE, "cudnn-frontend issue 650"),
    "clock_hz": ("clock of the data sheet's rate, Hz", _AMPERE, "cudnn-frontend issue 650"),
    "dense_flops": ("dense float16 FLOP a clock and multiprocessor", _AMPERE, _CONFIG),
    "hmma_clocks": ("clocks of a sub-core for mma.m16n8k16", "full rate, from the row above", _CONFIG),
    "fp32": ("FP32 operations a clock and multiprocessor", _AMPERE, _CONFIG),
    "integer": ("integer operations a clock and multiprocessor", _AMPERE, _CONFIG),
    "fp64": ("FP64 operations a clock and multiprocessor", _AMPERE, "NVIDIA, Hopper architecture in depth (2022)"),
    "mufu": ("exponentials and other special functions a clock and multiprocessor", "as the H100, unverified", _CONFIG),
    "shared_bytes": (
        "bytes of shared memory a clock and multiprocessor",
        "as the H100, unverified",
        "QuACK, notes@c8ec317, measured",
    ),
    "l2_bytes": ("bytes of L2 a clock", "2.3 times a V100: " + _AMPERE, _CONFIG),
    "l2_mib": (
        "MiB of L2 for data that all multiprocessors read",
        "half of 40, because each of two partitions caches what its multiprocessors read: " + _AMPERE,
        "half of 50, as on the A100, unverified",
    ),
    "hbm_bytes": ("bytes of HBM a second", "data sheet", "data sheet; H200: 4.8e12"),
    "tma_clocks": ("clocks between two copies of the TMA", "has none", "FlashGPU-Sim, sass/PARAMETERS.md@580352d"),
    "matmul_flops": (
        "float16 FLOP a second that large products of cuBLAS reach",
        "80 % of the peak, unverified",
        "torch-performance-test-data issue 79: 760e12 in float16 and 798e12 in bfloat16",
    ),
    "shared_kib": ("KiB of shared memory of a multiprocessor", _GUIDE, _GUIDE),
}
# wgmma reads a left operand of 64 x 16 and a right one of 16 x N from shared memory, and takes N / 2 clocks.
WGMMA_SOURCE = _CONFIG

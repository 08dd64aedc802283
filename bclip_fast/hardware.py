"""Data sheets of devices, the cluster of a plan, and a report of this process's environment."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import re
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from bclip_fast.errors import UserError, first_line
from bclip_fast.io import system
from bclip_fast.ops.processor import native_precision

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16", "fp8"]

GIB = 1 << 30
_VERSIONS = ("bclip_fast", "torch", "numpy", "pillow", "tokenizers", "deepspeed")
_TERA = 1e12
# Prefix of torch.cuda.get_device_name -> peak FLOP/s of dense matmuls. The first matching prefix counts.
# The first rate is for bf16 and fp16 on tensor cores. The second is for fp32 without them, which is torch's default.
# Source: NVIDIA's data sheets. A100: June 2021. H100: whitepaper v1.04, table 2. H100 NVL: data sheet of 2024, half of
# the rates "with sparsity". H200: data sheet of 2024.
_PEAKS = {
    "NVIDIA A100": (312 * _TERA, 19.5 * _TERA),
    "NVIDIA H100 PCIe": (756 * _TERA, 51.2 * _TERA),
    "NVIDIA H100 NVL": (835.5 * _TERA, 60 * _TERA),
    "NVIDIA H100": (989.4 * _TERA, 66.9 * _TERA),
    "NVIDIA H200 NVL": (835.5 * _TERA, 60 * _TERA),
    "NVIDIA H200": (989.4 * _TERA, 66.9 * _TERA),
}


@dataclass(frozen=True)
class Device:
    """A device as a plan sees it."""

    name: str
    """torch's name, which also names the file in benchmarks/results."""
    memory: float
    """Bytes that a process can use."""
    link: float
    """Bytes per second that a rank sends in a collective within a node."""
    network: float
    """Bytes per second of a network card, in one direction."""
    memory_rate: float = 0.0
    """Bytes per second of the device's memory. 0: unknown."""
    cores: int = 0
    """CPU cores for each device in the usual node of 8 devices."""


# Memory as the driver reports it. NVLink: half of the data sheets' 600 and 900 GB/s count one direction. NCCL reaches
# 235 GB/s of the A100's 300 (NVIDIA/nccl, src/graph/tuning.cc at 01afd20a) and 370 GB/s of the H100's 450
# (NVIDIA/nccl-tests#212). Network: a card of 200 Gbit/s (HDR, A100) or 400 Gbit/s (NDR, H100 and H200) for each GPU.
# Memory rates: NVIDIA's data sheets. Cores: those of DGX A100 (2 x EPYC 7742) and DGX H100 (2 x Xeon 8480C), by 8.
DEVICES = {
    "a100-40": Device("NVIDIA A100-SXM4-40GB", 39.4 * GIB, 235e9, 25e9, 1.555e12, 16),
    "a100-80": Device("NVIDIA A100-SXM4-80GB", 79.2 * GIB, 235e9, 25e9, 2.039e12, 16),
    "h100": Device("NVIDIA H100 80GB HBM3", 79.1 * GIB, 370e9, 50e9, 3.35e12, 14),
    "h200": Device("NVIDIA H200", 139.8 * GIB, 370e9, 50e9, 4.8e12, 14),
}


@dataclass(frozen=True)
class ClusterConfig:
    """The cluster of `bclip plan`. Training uses the ranks of its launcher instead."""

    nodes: int = 1
    """Number of nodes."""
    devices_per_node: int = 0
    """Ranks per node. 0: one rank per GPU of this machine, or one rank without a GPU."""
    device: str = ""
    """a100-40, a100-80, h100, h200 or cpu. Empty: the device of this machine."""
    memory_gib: float = 0.0
    """Memory of a device in GiB, or of all ranks of a node together on a CPU. 0: the device's memory."""
    host_memory_gib: float = 0.0
    """Host memory of a node in GiB. 0: this machine's memory if `device` is empty or cpu. Otherwise nothing checks host
    memory."""
    network_gbit: float = 0.0
    """Rate of a network card in Gbit/s, such as 200 (HDR) or 400 (NDR). 0: 200 for A100, 400 for H100 and H200."""
    nics_per_node: int = 0
    """Network cards of a node. 0: one for each GPU."""
    cores_per_node: int = 0
    """CPU cores of a node. 0: 16 for each A100, 14 for each H100 or H200, or this machine's if `device` is empty."""
    core_images_per_s: float = 0.0
    """Images that a core of the nodes reads, decodes and resizes per second. 0: the measured rate of our loader, for
    the bytes of the dataset's images."""
    storage_gb_per_s: float = 0.0
    """Bytes that a node reads from its storage, in GB/s. 0: unknown, so nothing checks the storage."""
    allow_slow_loader: bool = False
    """Plan a run although its loader or its storage is slower than the GPUs. Without it, such a plan is refused."""

    def __post_init__(self) -> None:
        """Check the fields. Raises UserError."""
        rates = ("network_gbit", "nics_per_node", "cores_per_node", "core_images_per_s", "storage_gb_per_s")
        for name in rates:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"cluster.{name}={getattr(self, name)} must be a finite number of at least 0")
        if self.nodes < 1 or min(self.devices_per_node, self.memory_gib, self.host_memory_gib) < 0:
            raise UserError(
                f"cluster.nodes={self.nodes}, devices_per_node={self.devices_per_node}, memory_gib={self.memory_gib}, "
                f"host_memory_gib={self.host_memory_gib}: nodes must be at least 1, the others must not be negative"
            )
        if self.device not in ("", "cpu", *DEVICES):
            raise UserError(
                f"cluster.device={self.device} is unknown; choose one of cpu, {', '.join(DEVICES)}, or leave it empty"
            )


@dataclass(frozen=True)
class Cluster:
    """Nodes with one rank for each device."""

    nodes: int
    ranks_per_node: int
    device: Device
    cpu: bool
    """Whether the ranks compute on the CPU. Then the device memory is the host's."""
    host_memory: float
    """Host memory of one rank in bytes. 0: unknown."""
    precision: Precision
    """The precision that `auto` selects on this cluster."""
    precision_reason: str
    """Reason of that selection, for messages."""
    nics_per_node: int = 1
    """Network cards of a node."""
    cores: float = 0.0
    """CPU cores for each rank. 0: unknown."""

    @property
    def ranks(self) -> int:
        """Number of ranks on all nodes."""
        return self.nodes * self.ranks_per_node


def cluster_of(config: ClusterConfig) -> Cluster:
    """Return the cluster of a configuration. This machine provides the values that the configuration leaves empty."""
    is_local = not config.device
    cpu = config.device == "cpu" or (is_local and not torch.cuda.is_available())
    ranks = config.devices_per_node or (torch.cuda.device_count() if is_local and not cpu else 1)
    host = config.host_memory_gib * GIB or (system.host_memory() if is_local or cpu else 0.0)
    if cpu:
        # Rates of gloo between processes of one machine, and over a network of 10 Gbit/s. They are rough values.
        device = Device(device_name(torch.device("cpu")), (config.memory_gib * GIB or host) / ranks, 2e9, 1.2e9)
        if config.network_gbit:
            device = replace(device, network=config.network_gbit / 8 * 1e9)
        cores = (config.cores_per_node or os.cpu_count() or 1) / ranks
        precision = native_precision(torch.device("cpu"))
        return Cluster(config.nodes, ranks, device, True, device.memory, *precision, config.nics_per_node or 1, cores)
    if is_local:
        name = device_name(torch.device("cuda", 0))
        memory = torch.cuda.get_device_properties(0).total_memory
        similar = next((device for device in DEVICES.values() if device.name == name), None)
        if similar is None:
            similar = DEVICES["a100-80"]
            log.warning("no data sheet of %s: the plan assumes the link and network of %s", name, similar.name)
        device = replace(similar, name=name, memory=memory)
        precision = native_precision(torch.device("cuda", 0))
    else:
        device = DEVICES[config.device]
        precision = "bf16", f"{device.name} multiplies bfloat16 in hardware"
    if config.memory_gib:
        device = replace(device, memory=config.memory_gib * GIB)
    if config.network_gbit:
        device = replace(device, network=config.network_gbit / 8 * 1e9)
    local_cores = (os.cpu_count() or 1) / ranks if is_local else device.cores
    cores = config.cores_per_node / ranks or local_cores
    nics = config.nics_per_node or ranks
    return Cluster(config.nodes, ranks, device, False, host / ranks, *precision, nics, cores)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def results_name(device: str) -> str:
    """Return the name of the device's file in benchmarks/results."""
    return re.sub(r"\W+", "-", device).strip("-") + ".jsonl"


def has_float8(device_name: str) -> bool:
    """Whether a device may have FP8 matrix units: a GPU that isn't one of the data sheets' without them."""
    return device_name.startswith("NVIDIA") and not device_name.startswith("NVIDIA A100")


def peak_flops_per_second(device_name: str, precision: str) -> float | None:
    """Return the peak rate of a device in "fp32", "bf16", "fp16" or "fp8".

    None if it has no data sheet here, or no FP8. By the same data sheets, Hopper's FP8 has twice the rate of bf16.
    """
    rates = next((rates for name, rates in _PEAKS.items() if device_name.startswith(name)), None)
    if rates is None or (precision == "fp8" and not has_float8(device_name)):
        return None
    return 2 * rates[0] if precision == "fp8" else rates[precision == "fp32"]


def device_peak(device: torch.device, precision: str) -> float | None:
    """Return `peak_flops_per_second` of a GPU of this machine, or None for a CPU."""
    return peak_flops_per_second(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: torch's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return system.peak_memory()


def pick_device(name: str) -> torch.device:
    """Return the device of this name. "auto" is the GPU if there is one. Raises UserError if torch cannot use it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used ({first_line(error)}); use auto, cpu or cuda") from error


def environment_report(device: torch.device) -> dict[str, str]:
    """Return Python, system, package versions and device, so that a result can be interpreted later."""
    report = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            report[name] = version(name)
    report["device"] = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    return report

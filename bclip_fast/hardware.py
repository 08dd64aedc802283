"""Devices: names, memory, links, peak rates. Clusters of them, as a plan assumes. What runs here, for reports."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from .errors import UserError, first_line
from .ops.processor import native_precision

Precision = Literal["fp32", "bf16", "fp16"]

GIB = 1 << 30
_VERSIONS = ("bclip_fast", "torch", "numpy", "pillow", "tokenizers", "deepspeed")
_TERA = 1e12
# Largest rates of dense matmuls, by the start of what torch.cuda.get_device_name says; the first that fits counts.
# bf16 and fp16 on the tensor cores, then fp32 outside them: what torch does with float32 unless told.
# From NVIDIA's data sheets: A100 (June 2021), H100 (whitepaper v1.04, table 2, and data sheet 2024 for the NVL, half of
# its figures "with sparsity"), H200 (data sheet 2024).
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
    """name: what torch calls it, also that of its file in benchmarks/results. memory: bytes that a process can have.
    link, network: bytes a second of one direction, of a device to the others in its node, and to other nodes."""

    name: str
    memory: float
    link: float
    network: float


# Memory as the driver counts it. NVLink: half of the 600 and 900 GB/s that the data sheets give for both directions;
# network: the usual node of 8 with a card of 200 Gbit/s (A100) or 400 Gbit/s (H100 and H200) for each.
DEVICES = {
    "a100-40": Device("NVIDIA A100-SXM4-40GB", 39.4 * GIB, 300e9, 25e9),
    "a100-80": Device("NVIDIA A100-SXM4-80GB", 79.2 * GIB, 300e9, 25e9),
    "h100": Device("NVIDIA H100 80GB HBM3", 79.1 * GIB, 450e9, 50e9),
    "h200": Device("NVIDIA H200", 139.8 * GIB, 450e9, 50e9),
}


@dataclass(frozen=True)
class ClusterConfig:
    """What `bclip plan` plans for; training itself takes the ranks that the launcher gives it."""

    nodes: int = 1
    devices_per_node: int = 0
    """Ranks on a node; 0: this machine's GPUs, or one rank."""
    device: str = ""
    """a100-40, a100-80, h100, h200 or cpu; empty: what this machine has."""
    memory_gib: float = 0.0
    """Of a device, or of a node's ranks together where they compute on its CPU; 0: what the device has."""
    host_memory_gib: float = 0.0
    """Of a node; 0: not checked, but this machine's where the device is this machine's."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or min(self.devices_per_node, self.memory_gib, self.host_memory_gib) < 0:
            raise UserError(
                f"cluster.nodes={self.nodes}, devices_per_node={self.devices_per_node}, memory_gib={self.memory_gib}, "
                f"host_memory_gib={self.host_memory_gib}: need at least 1, and nothing negative"
            )
        if self.device not in ("", "cpu", *DEVICES):
            raise UserError(f"cluster.device={self.device}: choose one of cpu, {', '.join(DEVICES)}, or none")


@dataclass(frozen=True)
class Cluster:
    """ranks over nodes; cpu: they compute there, and device memory is the host's. Bytes of one rank; 0: not known.
    precision: what engine.precision auto stands for there, and the reason."""

    nodes: int
    ranks_per_node: int
    device: Device
    cpu: bool
    host_memory: float
    precision: Precision
    precision_reason: str

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def link(self) -> float:
        """Bytes a second that a ring of all ranks moves through each."""
        return min(self.device.link, self.device.network) if self.nodes > 1 else self.device.link


def cluster_of(config: ClusterConfig) -> Cluster:
    """The cluster of a configuration. This machine's values stand for what the configuration leaves empty."""
    own = not config.device
    cpu = config.device == "cpu" or (own and not torch.cuda.is_available())
    ranks = config.devices_per_node or (torch.cuda.device_count() if own and not cpu else 1)
    host = config.host_memory_gib * GIB or (_host_memory() if own or cpu else 0.0)
    if cpu:
        # What gloo moves between processes of one machine, and over a network of 10 Gbit/s: orders of magnitude.
        device = Device(device_name(torch.device("cpu")), (config.memory_gib * GIB or host) / ranks, 2e9, 1.2e9)
        return Cluster(config.nodes, ranks, device, True, device.memory, *native_precision(torch.device("cpu")))
    if own:
        name = device_name(torch.device("cuda", 0))
        memory = torch.cuda.get_device_properties(0).total_memory
        known = next((device for device in DEVICES.values() if device.name == name), DEVICES["a100-80"])
        device = Device(name, memory, known.link, known.network)
        precision = native_precision(torch.device("cuda", 0))
    else:
        device = DEVICES[config.device]
        precision = "bf16", f"{device.name} multiplies bfloat16 in hardware"
    if config.memory_gib:
        device = Device(device.name, config.memory_gib * GIB, device.link, device.network)
    return Cluster(config.nodes, ranks, device, False, host / ranks, *precision)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), os.uname().machine)


def results_name(device: str) -> str:
    """Of the file in benchmarks/results."""
    return re.sub(r"\W+", "-", device).strip("-") + ".jsonl"


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def peak_flops_per_second(device_name: str, precision: str) -> float | None:
    """The rate of one device in "fp32", "bf16" or "fp16". None if no data sheet is known, as for a CPU."""
    rates = next((rates for name, rates in _PEAKS.items() if device_name.startswith(name)), None)
    return None if rates is None else rates[precision == "fp32"]


def device_peak(device: torch.device, precision: str) -> float | None:
    """`peak_flops_per_second` of a GPU of this machine; None for a CPU."""
    return peak_flops_per_second(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: by torch on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the GPU if there is one. Raises UserError if torch can't use it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {first_line(error)}") from error


def environment_report(device: torch.device) -> dict[str, str]:
    """Python, system, package versions and device: what a result needs beside it to be understood later."""
    report = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _VERSIONS:
        try:
            report[name] = version(name)
        except PackageNotFoundError:
            continue
    report["device"] = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    return report

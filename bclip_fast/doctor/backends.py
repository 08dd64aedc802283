"""The backends that are installed, and the one that each operator takes on each device, with reasons."""

from __future__ import annotations

import datetime
import itertools
import os
import shutil
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from bclip_fast import threads
from bclip_fast.errors import BackendError, UserError
from bclip_fast.ops import BACKENDS, build_info, cuda_device, fingerprint, record_files, trials, tuning
from bclip_fast.ops.backend_names import SDPA
from bclip_fast.ops.dispatch import MISSING, Decision
from bclip_fast.ops.dtypes import dtype_name
from bclip_fast.ops.record_files import Record

from .packages import version

_SDPA = {
    "sdpa_cudnn": "cuDNN",
    "sdpa_flash": "FlashAttention-2",
    "sdpa_efficient": "xFormers' memory-efficient kernel",
}
_HOW_TO_COMPILE = "on Linux, install a C++ compiler and the headers of libjpeg-turbo, and reinstall from source"


def lines() -> list[str]:
    """Return the lines of the report about backends and devices."""
    out = [
        f"Threads: {torch.get_num_threads()}. Waiting ones: {threads.describe()}",
        "",
        "Backends" + (f" (BCLIP_BACKEND={os.environ['BCLIP_BACKEND']})" if "BCLIP_BACKEND" in os.environ else ""),
    ]
    out += [f"  {name:<15}{_backend(name)}" for name in BACKENDS]
    for device in _devices():
        out += ["", f"Backends of the next call on {device}", *(f"  {line}" for line in _choices(device))]
    out += ["", "CUDA"]
    out += [f"  {line}" for line in _cuda()]
    return out


def report() -> dict[str, Any]:
    """Return the same as `lines`, as the values of a JSON file."""
    devices = {}
    for device in _devices():
        record = tuning.of_device(device.type, device.index or 0)
        operators = [
            {
                "operator": decision.operator,
                "dtype": dtype_name(decision.dtype),
                "shapes": decision.shapes,
                "backend": decision.chosen,
                "refusals": decision.refusals,
            }
            for decision in trials.decisions(device)
        ]
        devices[str(device)] = {
            "record": {"origin": record.origin, "path": None if record.path is None else str(record.path)},
            "fingerprint": record.fingerprint,
            "operators": operators,
        }
    return {
        "threads": torch.get_num_threads(),
        "backends": {name: _backend(name) for name in BACKENDS},
        "devices": devices,
        "cuda": _cuda(),
    }


def _backend(name: str) -> str:
    if name in MISSING:
        hint = {"cuda": _why_no_cuda_module(), "triton": "comes with torch's CUDA build", "cpu": _HOW_TO_COMPILE}
        return f"missing: {MISSING[name]}; {hint[name]}"
    if name == "triton":
        interpreted = " (interpreted: TRITON_INTERPRET=1)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
        return f"installed, triton {version('triton')}{interpreted}"
    if name == "cuda":
        return "installed" if torch.cuda.is_available() else "installed, but torch finds no device"
    if name == "torch":
        return "always available: torch's own kernels"
    if name in SDPA:
        return f"torch's attention by {_SDPA[name]}" + (
            "" if torch.version.cuda else ", but torch is built without CUDA"
        )
    return _instruction_set() if name == "cpu" else "always available: plain PyTorch"


def _instruction_set() -> str:
    from bclip_fast import _cpu

    forced = " (BCLIP_CPU_ISA)" if "BCLIP_CPU_ISA" in os.environ else ""
    try:
        return f"installed, {_cpu.instruction_set()}{' and AMX' if _cpu.has_amx() else ''}{forced}"
    except ValueError as error:
        return f"installed, but {error}"


def _why_no_cuda_module() -> str:
    if "cpu" in MISSING:
        return "see cpu"
    if shutil.which("nvcc"):
        return "nvcc is on the PATH: reinstall with BCLIP_CUDA=1"
    return "it was built without nvcc: install the CUDA toolkit and reinstall"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _choices(device: torch.device) -> list[str]:
    """Describe the tuning record in use, and the backends of each operator and dtype by class of shapes."""
    try:
        record = tuning.of_device(device.type, device.index or 0)
        out = _record(record)
        decided = [*trials.decisions(device), *trials.other_head_decisions(device)]
        all_decisions = sorted(decided, key=lambda decision: decision.key[:2])
    except UserError as error:
        return [str(error)]
    except torch.OutOfMemoryError:
        return ["the device has no free memory"]
    for (operator, dtype), group in itertools.groupby(all_decisions, key=lambda decision: decision.key[:2]):
        decisions, name = list(group), f"{operator:<31}{dtype:<10}"
        pairs = [(decision.chosen or "nothing", _times(decision, record)) for decision in decisions]
        for chosen, times in dict.fromkeys(pairs):
            same = [each.shapes for each, pair in zip(decisions, pairs, strict=True) if pair == (chosen, times)]
            shapes = "; ".join(name or "any" for name in same) if any(same) else ""
            out.append(f"{name}{chosen:<15}{shapes:<19}{times}".rstrip())
            name = " " * len(name)
        out += [f"{name}not {', '.join(names)}: {reason}" for reason, names in _refusals(decisions).items()]
    return out


def _times(decision: Decision, record: Record) -> str:
    entry = record.entries.get(decision.key)
    if entry is None or not record.made:
        return ""
    return ", ".join(f"{name} {entry.ms[name]:.3g} ms" for name in entry.order if name in entry.ms)


def _refusals(decisions: list[Decision]) -> dict[str, list[str]]:
    """Refused backends by reason, except those that don't implement the operator."""
    refused: dict[str, list[str]] = {}
    for decision in decisions:
        for name, reason in decision.refusals.items():
            names = refused.setdefault(reason, [])
            if reason != "not implemented" and name not in names:
                names.append(name)
    return {reason: names for reason, names in refused.items() if names}


def _record(record: Record) -> list[str]:
    facts = ", ".join(value for key, value in record.fingerprint.items() if key not in ("device", "kernels") and value)
    out = [f"by {record.origin}{_age(record.made)}"]
    if record.path is not None:
        out.append(str(record.path))
    elif tuning.mode() == "":
        out.append("`bclip tune` measures this machine" + _outdated(record.fingerprint))
    return [*out, f"fingerprint: {facts}, kernels {record.fingerprint.get('kernels', 'none')}", ""]


def _age(made: str) -> str:
    if not made:
        return ""
    try:
        age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(made)
    except (ValueError, TypeError):
        return f", made {made}"
    days = age.days
    return f", made {made}, {days} day{'' if days == 1 else 's'} ago" if days > 0 else f", made {made}, today"


def _outdated(current: dict[str, str]) -> str:
    """Name the newest record of this device that no longer applies, and its differences."""
    try:
        paths = sorted(tuning.folder().glob("*.json"), key=lambda path: path.stat().st_mtime)
    except (OSError, RuntimeError):
        return ""
    for path in reversed(paths):
        try:
            other = record_files.load(path)
        except UserError:
            continue
        if other.made and all(other.fingerprint[key] == current[key] for key in ("name", "device")):
            differences = fingerprint.differences(other.fingerprint, current)
            return f"; its record {path.name} doesn't apply (there / now): {differences}"
    return ""


def _cuda() -> list[str]:
    out = [f"torch: CUDA {torch.version.cuda}" if torch.version.cuda else "torch: a CPU build"]
    if find_spec("bclip_fast._cuda") is None:
        return [*out, f"_cuda: not built ({_why_no_cuda_module()})"]
    from bclip_fast import _cuda  # type: ignore[attr-defined]

    out.append(f"_cuda: built for sm_{_cuda.architectures.replace(';', ', sm_')}, {_hopper_kernels(_cuda)}")
    try:
        devices = [_cuda.device(index) for index in range(_cuda.count_devices())]
    except RuntimeError as error:
        return [*out, f"no device: {error}"]
    for index, device in enumerate(devices):
        major, minor = device["capability"]
        memory, state = device["memory_bytes"] / 2**30, device["refusal"] or "ready"
        out.append(f"device {index}: {device['name']}, sm_{major}{minor}, {memory:.1f} GiB, {state}")
        out.append(f"{'':<10}the CUDA losses take {_loss_kernels(index)}")
    return out


def _hopper_kernels(module: ModuleType) -> str:
    """Say whether the CUDA module has the kernels for Hopper, and how to get them."""
    if getattr(module, "CONTRASTIVE_HOPPER", None) is not None:
        return f"with kernels for Hopper from CUTLASS {module.CUTLASS}"
    reason = build_info.why_no_hopper() or "CUTLASS was missing"
    return (
        f"without kernels for Hopper: {reason}. To get them, `pip install --no-deps nvidia-cutlass` and reinstall from "
        "source for sm_90a"
    )


def _loss_kernels(index: int) -> str:
    try:
        refusal = cuda_device.hopper_refusal(torch.device("cuda", index))
    except BackendError as error:
        return f"no kernel: {error}"
    return f"the kernels for all GPUs: {refusal}" if refusal else "the kernels for Hopper"

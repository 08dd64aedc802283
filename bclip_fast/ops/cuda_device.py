"""GPUs: the module of our CUDA kernels, and the reasons why a device or dtype cannot run CUDA or Triton kernels."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from bclip_fast.errors import BackendError

from .build_info import why_no_hopper

# Shared memory that a thread block may use, in bytes, by compute capability (CUDA C++ programming guide, technical
# specifications per compute capability). Other GPUs count as the smallest from sm_80 on: sm_86, sm_89 and sm_120.
_BLOCK_BYTES = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448, (11, 0): 232448}
_LEAST_BLOCK_BYTES = 101376

# The file of a module that runs the CUDA kernels on the CPU, for tests (csrc/cuda/emulator/emulator.h).
CUDA_HOST = os.environ.get("BCLIP_CUDA_HOST")


@cache
def cuda_module() -> ModuleType:
    """The CUDA kernels: `bclip_fast._cuda`, or the file that BCLIP_CUDA_HOST names."""
    if CUDA_HOST is None:
        return importlib.import_module("bclip_fast._cuda")
    spec = importlib.util.spec_from_file_location("_cuda_emulator", CUDA_HOST)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _cuda_device(index: int) -> tuple[int, str]:
    """(bytes of shared memory for a thread block of the device, the reason why it is unusable or "")."""
    try:
        # torch's own guard makes no context on another device when it switches back.
        with torch.cuda.device(index if CUDA_HOST is None else -1):
            device = cuda_module().device(index)
    except RuntimeError as error:
        # For example, the driver is older than the toolkit that built the module. Other backends may still work.
        return 0, str(error)
    return device["block_bytes"], device["refusal"]


def cuda_block_bytes(tensor: Tensor) -> int:
    """Shared memory that a thread block may use on the tensor's device, in bytes."""
    return _cuda_device(tensor.device.index or 0)[0]


def _cuda_limits(index: int) -> tuple[int, str]:
    """`_cuda_device`, as a constant to torch.compile, which cannot trace the compiled module."""
    return _cuda_device(index)


# The mark that torch.compiler.assume_constant_result sets. That function also imports Dynamo and Triton: two seconds.
_cuda_limits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cuda_refusal(tensor: Tensor, dtype: torch.dtype | None = None, block_bytes: int = 0) -> str | None:
    """The reason why none of our CUDA kernels can take this tensor, or None.

    Args:
        dtype: dtype in which the kernel takes the tensor. By default the tensor's dtype.
        block_bytes: shared memory that a thread block of the kernel needs. sm_90 has 227 KiB, sm_80 has 163 KiB, and
            sm_86, sm_89 and sm_120 have 99 KiB (CUDA C++ programming guide, technical specifications per compute
            capability).
    """
    dtype = dtype or tensor.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if tensor.device.type != ("cuda" if CUDA_HOST is None else "cpu"):
        return f"device is {tensor.device.type}, not cuda"
    available, refusal = _cuda_limits(tensor.device.index or 0)
    if not refusal and available < block_bytes:
        return f"a thread block needs {block_bytes} bytes of shared memory, but this device gives it {available}"
    return refusal or None


def hopper_refusal(device: torch.device) -> str | None:
    """The reason why the CUDA losses on a device don't take the kernels for Hopper, or None.

    Only this function decides. BCLIP_HOPPER=0 leaves out these kernels, so that a test can compare both sets.
    BCLIP_HOPPER=1 demands them, also in the emulator.

    Raises:
        BackendError: BCLIP_HOPPER demands them, and they are missing here, or it has another value.
    """
    requested = os.environ.get("BCLIP_HOPPER") or "auto"
    if requested not in ("auto", "0", "1"):
        raise BackendError(f"BCLIP_HOPPER={requested!r} is unknown; set it to 0, 1 or auto")
    if requested == "0":
        return "BCLIP_HOPPER=0"
    reason = None
    if CUDA_HOST is None and importlib.util.find_spec("bclip_fast._cuda") is None:
        reason = "the CUDA module is missing"
    elif getattr(cuda_module(), "CONTRASTIVE_HOPPER", None) is None:
        reason = f"the CUDA module is built without them: {why_no_hopper() or 'CUTLASS or sm_90a is missing'}"
    elif CUDA_HOST is not None:
        reason = None if requested == "1" else "the emulator takes them only with BCLIP_HOPPER=1"
    elif device.type != "cuda":
        reason = f"device is {device.type}, not cuda"
    elif (capability := compute_capability(device.index or 0)) != (9, 0):
        reason = f"the device is sm_{capability[0]}{capability[1]}, and they need sm_90"
    if reason and requested == "1":
        raise BackendError(f"BCLIP_HOPPER=1, but the kernels for Hopper cannot run: {reason}")
    return reason


def cuda_stream(tensor: Tensor) -> int:
    """The handle of the current stream on the tensor's device, or 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def compute_capability(index: int) -> tuple[int, int]:
    """(major, minor) of GPU `index`. The driver is asked once, because every call of an operator needs the answer."""
    return _capability(index)


# A constant to torch.compile, as `_cuda_limits`.
compute_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


# By value of BCLIP_INTERPRET_CAPABILITY.
_INTERPRETED = {"80": (8, 0), "90": (9, 0)}


def interpreted_capability() -> tuple[int, int]:
    """The compute capability whose kernels Triton's interpreter runs: BCLIP_INTERPRET_CAPABILITY, by default 80.

    Raises:
        ValueError: the variable has another value than 80 or 90.
    """
    value = os.environ.get("BCLIP_INTERPRET_CAPABILITY", "80")
    if value not in _INTERPRETED:
        raise ValueError(f"BCLIP_INTERPRET_CAPABILITY={value!r} is unknown; set it to {' or '.join(_INTERPRETED)}")
    return _INTERPRETED[value]


def triton_refusal(tensor: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """The reason why no Triton kernel can take this tensor in `dtype` (by default the tensor's), or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    dtype = dtype or tensor.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {dtype}"
    if interpreted and dtype == torch.bfloat16:
        return "the interpreter (TRITON_INTERPRET=1) cannot multiply bfloat16"
    if not interpreted and tensor.device.type != "cuda":
        return f"device is {tensor.device.type}, not cuda"
    if not interpreted and compute_capability(tensor.device.index or 0) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def triton_block_bytes(tensor: Tensor) -> int:
    """Shared memory, in bytes, that a Triton program may use on the tensor's device. Triton's interpreter has plenty.

    Only the compute capability decides, so torch.compile can trace it.
    """
    if tensor.device.type != "cuda":
        return max(_BLOCK_BYTES.values())
    return _BLOCK_BYTES.get(compute_capability(tensor.device.index or 0), _LEAST_BLOCK_BYTES)

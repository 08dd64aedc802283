"""What every call into compiled code must check first: it takes bare addresses and would write anywhere."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# The file of a module in which the CUDA kernels run on the emulator, for tests (csrc/cuda/emulator/emulator.h).
CUDA_HOST = os.environ.get("BCLIP_CUDA_HOST")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, inside which autocast is off on the device of its first tensor.

    For what computes in a precision of its own: autocast would round the operands of torch's products in there. A
    backward pass may be called under autocast, too.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(value for value in args if isinstance(value, Tensor)).device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


class _Refusal(torch.autograd.Function):
    """Passes gradients on and refuses to differentiate them."""

    @staticmethod
    def forward(ctx: Any, num_gradients: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return tuple(None if each is None else each.view_as(each) for each in tensors[:num_gradients])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError(
            "operators of bclip_fast are differentiable once: for second derivatives (create_graph=True, Hessians, "
            "gradient penalties) use plain torch operations"
        )


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The backward of an autograd function whose gradients raise RuntimeError where they are differentiated.

    torch's `once_differentiable` detaches them from the inputs wherever the incoming gradient needs none itself, as
    that of a loss: second derivatives are then zero without a word. The inputs must be among the saved tensors.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        sources = [each for each in (*grads, *ctx.saved_tensors) if isinstance(each, Tensor) and each.requires_grad]
        return _Refusal.apply(len(gradients), *gradients, *sources)

    return run


def address(tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """The address of a contiguous tensor in the memory of this process, of just this dtype and shape.

    Raises:
        ValueError: anything else; it is the wrapper's mistake, not the user's.
    """
    if tensor.device.type != "cpu" or tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"compiled code expects a contiguous {dtype} CPU tensor of shape {shape}, got "
            f"{tensor.dtype}, {tensor.device}, shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def triton_refusal(tensor: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """The reason why no Triton kernel can take this tensor, in its own dtype unless given, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    dtype = dtype or tensor.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {dtype}"
    if interpreted and dtype == torch.bfloat16:
        return "the interpreter (TRITON_INTERPRET=1) cannot multiply bfloat16"
    if not interpreted and tensor.device.type != "cuda":
        return f"device is {tensor.device.type}, not cuda"
    if not interpreted and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


@cache
def cuda_module() -> ModuleType:
    """The CUDA kernels: `bclip_fast._cuda`, or what BCLIP_CUDA_HOST names."""
    if CUDA_HOST is None:
        return importlib.import_module("bclip_fast._cuda")
    spec = importlib.util.spec_from_file_location("_cuda_emulator", CUDA_HOST)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _cuda_device(index: int) -> tuple[int, str]:
    """What a block of threads may have of the device's shared memory, in bytes, and what speaks against the device."""
    try:
        # By torch's own guard, that makes no context on another device when it goes back.
        with torch.cuda.device(index if CUDA_HOST is None else -1):
            device = cuda_module().device(index)
    except RuntimeError as error:
        # A driver older than the toolkit that built us, say: other backends may do without it.
        return 0, str(error)
    return device["block_bytes"], device["refusal"]


def cuda_block_bytes(tensor: Tensor) -> int:
    """What a block of threads may have of the shared memory of the tensor's device."""
    return _cuda_device(tensor.device.index or 0)[0]


def _cuda_limits(index: int) -> tuple[int, str]:
    """`_cuda_device`, into which torch.compile would otherwise look, past the cache: its module is none of torch's."""
    return _cuda_device(index)


# All that torch.compiler.assume_constant_result does, but for importing Dynamo: two seconds, and Triton.
_cuda_limits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cuda_refusal(tensor: Tensor, dtype: torch.dtype | None = None, block_bytes: int = 0) -> str | None:
    """The reason why no CUDA kernel of ours can take this tensor, in its own dtype unless given, or None.

    `block_bytes` is what a block of the kernel's threads needs of shared memory: sm_90 has 227 KiB for it, sm_80 163,
    sm_86, sm_89 and sm_120 have 99 (CUDA C++ programming guide, technical specifications per compute capability).
    """
    dtype = dtype or tensor.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if tensor.device.type != ("cuda" if CUDA_HOST is None else "cpu"):
        return f"device is {tensor.device.type}, not cuda"
    available, refusal = _cuda_limits(tensor.device.index or 0)
    if not refusal and available < block_bytes:
        return f"a block of threads needs {block_bytes} bytes of shared memory, this device gives it {available}"
    return refusal or None


def cuda_address(tensor: Tensor, dtype: torch.dtype, device: torch.device, *shape: int) -> int:
    """The address of a contiguous tensor on `device`, of just this dtype and shape; ValueError as in `address`."""
    if tensor.device != device or tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"compiled code expects a contiguous {dtype} tensor on {device} of shape {shape}, got {tensor.dtype}, "
            f"{tensor.device}, shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def cuda_stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def aligned(tensor: Tensor) -> Tensor:
    """With the last dimension's elements side by side, and address and other strides multiples of 16 bytes."""
    size = tensor.element_size()
    if tensor.stride(-1) != 1 or any(stride * size % 16 for stride in tensor.stride()[:-1]):
        tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)

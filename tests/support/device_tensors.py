"""The tensors of the simulated GPU in fake_cuda.py, and the mode in which operators take them."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten

# Operators whose results have a shape that depends on numbers, or which return a number.
_READS = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_consecutive, aten.unique_dim, aten.bincount, aten.repeat_interleave,
}  # fmt: skip
_METHODS_THAT_READ = ("tolist", "numpy", "__array__", "__index__")


@dataclass(frozen=True)
class Transfer:
    """A transfer or a wait: its kind, the operator, the innermost line of bclip_fast that asked for it, the stream."""

    kind: str
    operator: str
    where: str
    stream: str = "default"

    @property
    def blocks(self) -> bool:
        """Whether the host waits."""
        return not self.kind.startswith("async")


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated GPU."""

    memory: Tensor

    @staticmethod
    def __new__(cls, memory: Tensor) -> DeviceTensor:
        # torch refuses views of a normal tensor that are inference tensors.
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(
                cls, memory.size(), strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype
            )

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.allocated_on = current_stream()
        self.recorded_streams: list[Stream] = []

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.memory})"

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        """Note a stream that uses the tensor."""
        self.recorded_streams.append(stream)

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name in _METHODS_THAT_READ:
            if name in ("numpy", "__array__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            active().record("read", name)
            return getattr(args[0].memory, name)(*args[1:], **kwargs)
        if name == "new_tensor":
            active().record("to device", name)
            return DeviceTensor(args[0].memory.new_tensor(*args[1:], **kwargs))
        if name in ("to", "cpu", "cuda"):
            return _to(function, name, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return active().__torch_dispatch__(function, types, args, kwargs)


def _to(function: Any, name: str, args: Any, kwargs: Any) -> Any:
    """`Tensor.to` and its short forms. C++ would take a copy to the CPU for no copy, because it sees CPU tensors."""
    tensor, *rest = args
    if name != "to":
        rest, kwargs = [CPU if name == "cpu" else CUDA], {}
    rest = [other.device if isinstance(other, Tensor) else other for other in rest]
    device = next((torch.device(value) for value in rest if isinstance(value, str | torch.device)), None)
    device = device or kwargs.get("device")
    if device is None or torch.device(device).type == "cuda":
        dtype = next((value for value in rest if isinstance(value, torch.dtype)), None)
        options = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
        rest = [] if dtype is None else [dtype]
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.to(*rest, **options) if rest or options else tensor
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), kwargs.get("dtype"))
    is_async = kwargs.get("non_blocking", False)
    with torch._C.DisableTorchFunctionSubclass():
        return aten._to_copy(tensor, dtype=dtype or tensor.dtype, device=torch.device(device), non_blocking=is_async)


class FakeCuda(TorchDispatchMode):
    """The simulated GPU, and the transfers since `clear`."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: list[Transfer] = []
        self._queue: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._pinned: dict[int, Any] = {}

    def clear(self) -> None:
        """Forget the recorded transfers."""
        self.transfers = []

    def record(self, kind: str, operator: str, stream: Stream | None = None) -> None:
        """Record a transfer."""
        frames = traceback.extract_stack()
        ours = [frame for frame in frames if "/bclip_fast/" in frame.filename]
        where = f"{ours[-1].filename.rpartition('/bclip_fast/')[2]}:{ours[-1].name}" if ours else ""
        self.transfers.append(Transfer(kind, operator, where, (stream or current_stream()).name))

    def wait(self, operator: str, stream: Stream | None = None) -> None:
        """Let the host wait: all queued copies take place."""
        self.record("wait", operator, stream)
        self._run_queue()

    def _run_queue(self) -> None:
        with self._lock:
            while self._queue:
                self._queue.pop(0)()

    @property
    def blocking(self) -> list[Transfer]:
        """The transfers for which the host waits."""
        return [transfer for transfer in self.transfers if transfer.blocks]

    def pin(self, tensor: Tensor) -> Tensor:
        """Mark the memory of a CPU tensor as pinned. It stays alive, so that no other tensor gets its address."""
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a CPU tensor is in pinned memory."""
        return not isinstance(tensor, DeviceTensor) and tensor.untyped_storage().data_ptr() in self._pinned

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet, name = function.overloadpacket, function.name()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        device = kwargs.get("device")
        to_device = bool(on_device) if device is None else torch.device(device).type == "cuda"
        if device is not None and not to_device and (on_device or not tensors):
            to_device = _is_called_by_autograd()
        if device is not None:
            kwargs["device"] = CPU
        if packet is aten._to_copy:
            return self._copy(function, args[0], to_device, kwargs)
        if packet is aten.copy_ and len({isinstance(tensor, DeviceTensor) for tensor in args[:2]}) == 2:
            return self._copy_into(args[0], args[1], (len(args) > 2 and args[2]) or kwargs.get("non_blocking", False))
        if packet in _READS and on_device and not (packet is aten.repeat_interleave and "output_size" in kwargs):
            self.record("read", name)
        if packet in (aten.index, aten.index_put_, aten.index_put, aten._unsafe_index):
            self._check_indices(args[1], name, bool(on_device))
        elif on_device:
            others = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.dim() > 0]
            if others and not name.startswith("c10d::"):
                raise RuntimeError(
                    f"{name}: expected all tensors on one device, got cuda:0 and a CPU tensor {tuple(others[0].shape)}"
                )
        wrappers = {id(tensor.memory): tensor for tensor in on_device}
        memory_args, memory_kwargs = tree_map(_memory_of, (args, kwargs))
        result = function(*memory_args, **memory_kwargs)

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in wrappers:
                return wrappers[id(value)]
            return DeviceTensor(value) if to_device else value

        return tree_map(wrap, result)

    def _check_indices(self, indices: Any, name: str, on_device: bool) -> None:
        for index in indices:
            if index is None or not on_device:
                continue
            if not isinstance(index, DeviceTensor):
                self.record("to device", name)
            if index.dtype in (torch.bool, torch.uint8):
                self.record("read", name)

    def _copy(self, function: Any, source: Tensor, to_device: bool, kwargs: dict[str, Any]) -> Tensor:
        is_async = kwargs.pop("non_blocking", False)
        kwargs.pop("pin_memory", None)
        if to_device:
            # The device takes its copies in order, so it has made those to the host already.
            self._run_queue()
        memory = function(_memory_of(source), **kwargs)
        if isinstance(source, DeviceTensor) == to_device:
            return DeviceTensor(memory) if to_device else memory
        if to_device:
            is_async = is_async and (self.is_pinned(source) or source.dim() == 0)
            self.record("async to device" if is_async else "to device", function.name())
            return DeviceTensor(memory)
        if is_async:
            self.record("async to host", function.name())
            return self._queue_copy(self.pin(memory), memory.clone())
        self.record("to host", function.name())
        return memory

    def _copy_into(self, target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        if isinstance(target, DeviceTensor):
            is_async = non_blocking and (self.is_pinned(source) or source.dim() == 0)
            self._run_queue()
            self.record("async to device" if is_async else "to device", "aten::copy_")
            target.memory.copy_(source)
        elif non_blocking and self.is_pinned(target):
            self.record("async to host", "aten::copy_")
            self._queue_copy(target, _memory_of(source).clone())
        else:
            self.record("to host", "aten::copy_")
            target.copy_(_memory_of(source))
        return target

    def _queue_copy(self, target: Tensor, values: Tensor) -> Tensor:
        target.fill_(torch.nan if target.is_floating_point() else 99)
        self._queue.append(lambda: target.copy_(values))  # type: ignore[arg-type]
        return target


def _is_called_by_autograd() -> bool:
    """Whether a gradient formula in C++ calls the operator. Its results belong to the GPU, but C++ sees CPU tensors."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename.endswith(("_compile.py", "eval_frame.py")):
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def _memory_of(value: Any) -> Any:
    return value.memory if isinstance(value, DeviceTensor) else value


RUNNING: list[FakeCuda] = []
THREAD = threading.local()


def active() -> FakeCuda:
    return RUNNING[-1]


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device: Any = None, name: str = "") -> None:
        self.name = name or str(id(self))

    def synchronize(self) -> None:
        """Wait for the stream."""
        active().wait("Stream.synchronize", self)

    def __repr__(self) -> str:
        return self.name


DEFAULT_STREAM = Stream(name="default")


def current_stream(device: Any = None) -> Stream:
    return getattr(THREAD, "stream", DEFAULT_STREAM)

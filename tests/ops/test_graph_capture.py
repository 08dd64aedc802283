"""The host code of GPU operators under CUDA-graph capture: no copy from the CPU, and no wait for the GPU.

Fake tensors take the place of a GPU, and recorders the place of its kernels.
"""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bclip_fast import ops
from bclip_fast.errors import BackendError
from bclip_fast.ops import cuda_device, philox
from bclip_fast.ops.attention import reference, sdpa
from bclip_fast.ops.attention.call import AttentionCall, SingleQueryCall
from bclip_fast.ops.attention.single_query import aten
from bclip_fast.ops.pointwise.call import AddNormCall, AddNormGradientCall

DEVICE = torch.device("cuda", 0)


class Copies(TorchDispatchMode):
    """Records the operators that copy between devices. `item` and `tolist` of a fake tensor raise an exception."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
        copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if copies and len({tensor.device.type for tensor in tensors}) > 1:
            self.found.append(str(function))
        return result


def meta(value):
    """A tensor without data or device, of the same shape and strides. Other values stay."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def part(tensor, index):
    """`tensor[index]`. torch's own function needs a build with CUDA."""
    indices = index if isinstance(index, tuple) else (index,)
    assert not any(isinstance(each, list) for each in indices), "a list would be copied to the GPU"
    assert all(each.device == tensor.device for each in indices if isinstance(each, torch.Tensor))
    result = torch.Tensor.__getitem__(meta(tensor), tuple(map(meta, indices)))
    return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=tensor.device)


def set_part(tensor, index, value):
    assert not isinstance(value, torch.Tensor) or value.device == tensor.device
    torch.Tensor.__setitem__(meta(tensor), index, meta(value))


class Kernels:
    """Takes the place of a module of Triton kernels, and counts their launches."""

    def __init__(self):
        self.launches = 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        assert all(arg.device == DEVICE for arg in args if isinstance(arg, torch.Tensor))
        self.launches += 1

    def __getattr__(self, name):
        return self


@pytest.fixture
def gpu(monkeypatch):
    """Makes fake tensors on a GPU, and lets nothing reach a device. Returns the kernels' recorder."""
    kernels = Kernels()
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(cuda_device, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 0, raising=False)
    monkeypatch.setattr(FakeTensor, "__getitem__", part)
    monkeypatch.setattr(FakeTensor, "__setitem__", set_part)
    monkeypatch.setattr(FakeTensor, "__invert__", lambda self: torch.bitwise_not(self))
    with FakeTensorMode():
        yield kernels


def recorded(monkeypatch, name, kernels):
    """A Triton backend whose kernels are recorders."""
    module = pytest.importorskip(name)
    for attribute in list(vars(module)):
        if attribute == "kernels" or attribute.endswith("_kernel"):
            monkeypatch.setattr(module, attribute, kernels)
    return module


def new(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def seed():
    return new(dtype=torch.int64)


def assert_no_copies(function):
    copies = Copies()
    with copies:
        function()
    assert copies.found == []


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("causal", [False, True])
def test_triton_attention_can_be_captured(packed, dropout_p, causal, gpu, monkeypatch):
    ours = recorded(monkeypatch, "bclip_fast.ops.attention.triton", gpu)
    cu_seqlens, mask = (new(5, dtype=torch.int32), None) if packed else (None, new(40, dtype=torch.bool))
    options = causal, dropout_p, seed() if dropout_p else None, 0.1
    call = AttentionCall(new(40, 3, 2, 64), cu_seqlens, mask, 10, *options)

    def run():
        out, lse = ours.forward(call)
        ours.backward(call, torch.empty_like(out), out, lse)

    assert_no_copies(run)
    assert gpu.launches in (2, 3)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_triton_single_query_attention_can_be_captured(dropout_p, gpu, monkeypatch):
    ours = recorded(monkeypatch, "bclip_fast.ops.attention.single_query.triton", gpu)
    index = new(4, dtype=torch.int64), new(5, dtype=torch.int32)
    options = True, dropout_p, seed() if dropout_p else None, 0.1
    call = SingleQueryCall(new(4, 2, 64), new(40, 2, 2, 64), *index, *options)

    def run():
        out, lse = ours.forward(call)
        ours.backward(call, torch.empty_like(out), out, lse)

    assert_no_copies(run)
    assert gpu.launches == 2


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_triton_pointwise_operators_can_be_captured(dropout_p, gpu, monkeypatch):
    ours = recorded(monkeypatch, "bclip_fast.ops.pointwise.triton", gpu)
    options = 1e-6, dropout_p, seed() if dropout_p else None
    stream, branch, weight = new(6, 64, dtype=torch.float32), new(6, 64), new(64, dtype=torch.float32)

    def run():
        ours.add_norm(AddNormCall(stream, branch, weight, weight, *options, torch.bfloat16, True))
        ours.add_norm_backward(AddNormGradientCall(branch, stream, stream, stream, weight, *options, torch.bfloat16))
        ours.gelu_backward(branch, ours.gelu(branch))

    assert_no_copies(run)
    assert gpu.launches == 4


def test_cuda_attention_can_be_captured(gpu, monkeypatch):
    from bclip_fast.ops.attention import cuda

    done = []
    module = types.SimpleNamespace(
        Attention=lambda *_: None,
        attention_forward=lambda *_: done.append("forward"),
        attention_backward=lambda *_: done.append("backward"),
        attention_backward_keys=lambda *_: 128,
    )
    monkeypatch.setattr(cuda, "cuda_module", lambda: module)
    monkeypatch.setattr(cuda, "cuda_block_bytes", lambda tensor: 232448)
    monkeypatch.setattr(cuda, "cuda_stream", lambda tensor: 0)
    call = AttentionCall(new(40, 3, 2, 64), new(5, dtype=torch.int32), None, 300, False, 0.1, seed(), 0.1)

    def run():
        out, lse = cuda.forward(call)
        cuda.backward(call, torch.empty_like(out), out, lse)

    assert_no_copies(run)
    assert done == ["forward", "backward"]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_torch_and_the_reference_of_dense_operators_can_be_captured(dropout_p, gpu):
    options = {"dropout_p": dropout_p, "seed": seed() if dropout_p else None, "backend": "reference"}
    stream, branch, weight = new(6, 64, dtype=torch.float32), new(6, 64), new(64, dtype=torch.float32)
    call = AttentionCall(new(40, 3, 2, 64), None, new(40, dtype=torch.bool), 10, True, dropout_p, options["seed"], 0.1)
    packed = AttentionCall(new(40, 3, 2, 64), new(5, dtype=torch.int32), None, 10, True, 0.0, None, 0.1)
    index = new(4, dtype=torch.int64), new(5, dtype=torch.int32)

    def run():
        ops.add_norm(stream, branch, weight, weight, 1e-6, **options)
        out, lse = reference.forward(call)
        reference.backward(call, torch.empty_like(out), out, lse)
        sdpa.dense(new(4, 10, 3, 2, 64), new(4, 10, dtype=torch.bool), True, 0.1)
        sdpa.packed(packed)
        single = SingleQueryCall(new(4, 2, 64), new(40, 2, 2, 64), *index, True, dropout_p, options["seed"], 0.1)
        out, lse = aten.forward(single)
        aten.backward(single, torch.empty_like(out), out, lse)
        ops.add_norm(stream, branch, weight, weight, 1e-6, **{**options, "backend": "torch"})

    assert_no_copies(run)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_checks_of_every_operator_can_be_captured(backend, gpu):
    """The public functions, with fake results of the registered operators."""
    pytest.importorskip("triton")
    qkv, lengths, rows = new(40, 3, 2, 64), new(5, dtype=torch.int32), new(4, dtype=torch.int64)
    options = {"dropout_p": 0.1, "seed": seed(), "backend": backend}
    stream, weight = new(40, 64), new(64)
    image, text = new(8, 16), new(8, 16)

    def run():
        ops.fused_attention(qkv.unflatten(0, (4, 10)), **options)
        ops.varlen_attention(qkv, lengths, 10, **options)
        ops.single_query_attention(qkv[:4, 0], qkv[:, 1:], rows, lengths, **options)
        ops.gelu(stream, backend=backend)
        ops.add_norm(stream, stream, weight, weight, 1e-6, **options)
        ops.linear(stream, new(8, 64), new(8), backend="reference")
        for scale in (10.0, new(dtype=torch.float32)):
            ops.clip_loss(image, text, scale, backend=backend)
            ops.siglip_loss(image, text, scale, -10.0 if isinstance(scale, float) else scale, backend=backend)

    assert_no_copies(run)


@pytest.mark.parametrize("given", [None, 3, "cpu"], ids=str)
def test_capture_with_a_seed_on_the_cpu_is_refused_with_the_remedy(given, gpu, monkeypatch):
    attention = recorded(monkeypatch, "bclip_fast.ops.attention.triton", gpu)
    single_query = recorded(monkeypatch, "bclip_fast.ops.attention.single_query.triton", gpu)
    pointwise = recorded(monkeypatch, "bclip_fast.ops.pointwise.triton", gpu)
    on_cpu = philox.seed_tensor(torch.empty((), dtype=torch.int64) if given == "cpu" else given)
    index = new(4, dtype=torch.int64), new(5, dtype=torch.int32)
    norm = new(6, 64), new(6, 64), new(64), new(64), 1e-6, 0.1, on_cpu, torch.bfloat16, False
    calls = [
        lambda: attention.forward(AttentionCall(new(40, 3, 2, 64), None, None, 10, False, 0.1, on_cpu, 0.1)),
        lambda: single_query.forward(SingleQueryCall(new(4, 2, 64), new(40, 2, 2, 64), *index, True, 0.1, on_cpu, 0.1)),
        lambda: aten.forward(SingleQueryCall(new(4, 2, 64), new(40, 2, 2, 64), *index, True, 0.1, on_cpu, 0.1)),
        lambda: pointwise.add_norm(AddNormCall(*norm)),
    ]
    for call in calls:
        with pytest.raises(BackendError, match="pass seed=, a 0-dimensional int64 tensor on cuda:0"):
            call()
    assert gpu.launches == 0


def test_seed_of_the_wrong_kind_raises_an_error():
    stream, weight = torch.ones(2, 8), torch.ones(8)
    qkv = torch.ones(1, 2, 3, 1, 16)
    for wrong in (torch.tensor([3]), torch.tensor(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="0-dimensional int64"):
            ops.add_norm(stream, stream, weight, weight, 1e-6, dropout_p=0.5, seed=wrong)
        with pytest.raises(ValueError, match="0-dimensional int64"):
            ops.fused_attention(qkv, dropout_p=0.5, seed=wrong)


def test_seeds_on_cpu_and_device_give_the_same_key():
    for value in (0, 5, -(2**40) + 5, 2**62 + 3):
        words = [int(word) for word in philox.key_of(torch.tensor(value), torch.device("cpu"))]
        assert words == [value % 2**32, (value >> 32) % 2**32]
        assert philox.unsigned_seed(torch.tensor(value)) == value % 2**64

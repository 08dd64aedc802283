"""What the host code of the losses asks of a GPU: kernels, bytes, alignment and precision, on any machine."""

from __future__ import annotations

import pytest
import torch
from counted import Watch, watched_losses
from torch.nn.functional import normalize

from bclip_fast import ops
from bclip_fast.loss.clip import _GlobalClipLoss
from bclip_fast.loss.collectives import Ranks
from bclip_fast.loss.siglip import _GlobalSigLipLoss
from bclip_fast.ops.contrastive import cuda, gpu_tiles
from bclip_fast.ops.contrastive.loss_terms import positive_logits

WIDTH = 512
MOST = 100
GIB = 1 << 30
CASES = [
    ("cuda", torch.float16),
    ("cuda", torch.bfloat16),
    ("triton", torch.float16),
    ("triton", torch.bfloat16),
    ("triton", torch.float32),
]


@pytest.fixture
def watch(monkeypatch):
    return watched_losses(monkeypatch)


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def features(size, dtype):
    return [on_meta(size, WIDTH, dtype=dtype).requires_grad_() for _ in range(2)]


def most_launches(size, dtype):
    """`MOST` for up to 8 GiB of G, and the kernel and two matmuls of each further GiB: G is computed 1 GiB at a time.

    Above 65536 pairs, the positive logits take up to four slices of three kernels.
    """
    num_chunks = -(-(size**2) * (4 if dtype == torch.float32 else 2) // GIB)
    return MOST + 3 * max(0, num_chunks - 8) + (13 if size > 65536 else 0)


@pytest.mark.parametrize("size", [256, 65536, 131072])
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("operator", ["clip_loss", "siglip_loss"])
@pytest.mark.parametrize("grouped", [False, True], ids=["pairs", "groups"])
def test_loss_call_launches_few_kernels(operator, grouped, backend, dtype, size, watch):
    image, text = features(size, dtype)
    scale, bias = on_meta().requires_grad_(), None if operator == "clip_loss" else -10.0
    groups, one = on_meta(size, dtype=torch.int64) if grouped else None, torch.ones((), device="meta")
    with watch:
        loss = getattr(ops, operator)(image, text, scale, bias, groups=groups, backend=backend)
        torch.autograd.grad(loss, (image, text, scale), one)
    assert watch.names["aten.mm.dtype_out" if dtype != torch.float32 else "aten.mm.out"] >= 1
    assert len(watch.launches) < most_launches(size, dtype), watch.names


class SilentRanks(Ranks):
    """Ranks of equal batches whose collectives return tensors of the right shapes."""

    def batch_sizes(self, image, text):
        return [len(image)] * self.size, [len(text)] * self.size

    def start_gather(self, rows, sizes, name):
        return lambda: rows.new_empty(sum(sizes), rows.shape[1])

    def start_reduce(self, rows, sizes, name):
        return lambda: rows.new_empty(sizes[self.rank], rows.shape[1])

    def sum(self, value, name, operation=None):
        return value


@pytest.mark.parametrize("num_ranks", [8, 64])
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("loss", [_GlobalClipLoss, _GlobalSigLipLoss])
@pytest.mark.parametrize("grouped", [False, True], ids=["pairs", "groups"])
def test_loss_over_ranks_launches_few_kernels(loss, grouped, backend, dtype, num_ranks, watch, monkeypatch):
    """65536 pairs in all. A rank in the middle has two tiles: its texts, and those of all other ranks."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    (image, text), size = features(65536 // num_ranks, dtype), 65536 // num_ranks
    scale, ids = on_meta().requires_grad_(), on_meta(size, dtype=torch.int64) if grouped else None
    ranks, one = SilentRanks("loss", None, 3, num_ranks), torch.ones((), device="meta")
    with watch:
        if loss is _GlobalClipLoss:
            result = loss.apply(image, text, scale, ids, ids, 0.0, ranks, None, dtype, backend)
        else:
            result = loss.apply(image, text, scale, scale, ids, ids, ranks, None, dtype, True, backend)
        torch.autograd.grad(result, (image, text, scale), one)
    # The softmax loss reduces rows and columns of both tiles, and then over ranks.
    most = MOST if loss is _GlobalSigLipLoss else MOST + 52 if grouped else MOST + 20
    assert len(watch.launches) < most, watch.names
    if loss is _GlobalClipLoss:
        assert watch.names["forward"] + watch.names["_forward_kernel"] == 2


@pytest.mark.parametrize("size", [64, 65536, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_positive_logits_launch_few_kernels_on_a_gpu(dtype, size):
    (image, text), scale = features(size, dtype), on_meta()
    with torch.no_grad(), Watch() as counted:
        positive_logits(image, text, scale)
    assert len(counted.operations) <= 20


@pytest.mark.parametrize(("size", "width"), [(50, 24), (1 << 10, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_positive_logits_in_slices_are_accurate(dtype, size, width, monkeypatch):
    """Slices of a CPU and of a GPU give the same numbers, with the rounding error of one sum."""
    image, text = (normalize(torch.randn(size, width, dtype=torch.float64)).to(dtype) for _ in range(2))
    actual = positive_logits(image, text, torch.tensor(100.0))
    truth = 100 * (image.double() * text.double()).sum(1)
    tolerance = 1e-14 if dtype.itemsize > 2 else 1e-6
    torch.testing.assert_close(actual, truth, rtol=0, atol=100 * tolerance)

    class OnGpu:
        """The text as a tensor of another device: no slice of 64 rows."""

        device, shape = torch.device("cuda"), text.shape
        element_size, __len__ = text.element_size, text.__len__

        @staticmethod
        def split(rows):
            sizes.append(rows)
            return text.split(rows)

    sizes: list[int] = []
    OnGpu.__len__ = lambda _: len(text)
    assert torch.equal(positive_logits(image, OnGpu(), torch.tensor(100.0)), actual)
    assert sizes[0] >= -(-size // 4)


def test_sum_of_the_texts_gradients_is_read_and_written_once_a_chunk(watch):
    """Adding a product to a sum in a separate kernel would also write and read the product."""
    size = 65536
    image, text = features(size, torch.float16)
    with watch:
        loss = ops.clip_loss(image, text, 10.0, backend="cuda")
        torch.autograd.grad(loss, text)
    sums = (1, size, WIDTH)
    moved = sum(number for each in watch.launches for shape, number in each.read + each.written if shape == sums)
    num_chunks = watch.names["softmax"]
    assert num_chunks == 2 * size**2 // GIB == 8
    # The first chunk doesn't read the sum. 2.01 GB in all.
    assert moved == (2 * num_chunks - 1) * 4 * size * WIDTH


@pytest.fixture
def tf32_restored():
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_products_of_halves_use_tf32_on_older_torch(dtype, before, fails, watch, monkeypatch, tf32_restored):
    """torch below 2.8 multiplies halves into float32 as float32 numbers, which TF32 holds exactly."""
    matmul, allowed = torch.backends.cuda.matmul, []
    monkeypatch.setattr(gpu_tiles, "_HAS_WIDE_MATMUL", False)
    matmul.allow_tf32 = before

    def noted(function):
        def run(*args, **kwargs):
            allowed.append(matmul.allow_tf32)
            if fails:
                raise RuntimeError("out of memory")
            return function(*args, **kwargs)

        return run

    for name in ("mm", "baddbmm"):
        monkeypatch.setattr(torch, name, noted(getattr(torch, name)))
    image, text = features(300, dtype)
    with watch:
        loss = ops.clip_loss(image, text, 10.0, backend="triton")
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                torch.autograd.grad(loss, text)
        else:
            torch.autograd.grad(loss, text)
    assert allowed == [before or dtype != torch.float32] * (1 if fails else 2)
    assert matmul.allow_tf32 == before


def shifted(tensor):
    """A contiguous copy. Its address is not a multiple of 16 bytes."""
    memory = torch.empty(tensor.numel() + 3, dtype=tensor.dtype)
    return memory[3:].view_as(tensor).copy_(tensor)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("operator", ["clip_loss", "siglip_loss"])
def test_features_at_any_address_reach_kernels_and_matmuls_aligned(operator, backend, dtype, watch, monkeypatch):
    """Other addresses may select another algorithm of cuBLAS, which rounds differently."""
    addresses: list[int] = []

    def noted(function, count):
        def run(*args, **kwargs):
            addresses.extend(value if isinstance(value, int) else value.data_ptr() for value in args[:count])
            return function(*args, **kwargs)

        return run

    # Our kernels take the features first, as tensors or as addresses. The matmuls take their operands first.
    monkeypatch.setattr(watch, "arguments", noted(lambda *_: None, 2))
    monkeypatch.setattr(cuda.cuda_module(), "Features", noted(lambda *_: None, 2))
    for name, count in (("multiply", 2), ("add_product", 3)):
        monkeypatch.setattr(gpu_tiles, name, noted(getattr(gpu_tiles, name), count))
    inputs = [shifted(normalize(torch.randn(70, 32)).to(dtype)).requires_grad_() for _ in range(2)]
    assert all(tensor.data_ptr() % 16 for tensor in inputs)
    loss = getattr(ops, operator)(*inputs, 10.0, -10.0, backend=backend, chunk_size=16)
    torch.autograd.grad(loss, inputs)
    num_chunks = 5
    assert len(addresses) == (2 if operator == "clip_loss" else 0) + 7 * num_chunks
    assert not [address for address in addresses if address % 16]


@pytest.mark.parametrize("operator", ["clip_loss", "siglip_loss"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_scalars_of_float64_features_reach_kernels_in_float32(backend, operator, watch, monkeypatch):
    """With a float64 scale, a kernel of Triton would compute its logits in float64. A kernel of CUDA reads float32."""
    dtypes: list[torch.dtype] = []
    address = cuda.cuda_address

    def note(*args):
        dtypes.extend(each.dtype for each in args if isinstance(each, torch.Tensor) and each.dim() == 0)

    def noted_address(tensor, *args):
        note(tensor)
        return address(tensor, *args)

    monkeypatch.setattr(watch, "arguments", note)
    monkeypatch.setattr(cuda, "cuda_address", noted_address)
    inputs = [normalize(torch.randn(40, 24, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (10.0, -10.0)]
    loss = getattr(ops, operator)(*inputs, *scalars, operand_dtype=torch.float16, backend=backend)
    torch.autograd.grad(loss, inputs)
    # The scale in both kernels of the softmax loss, and scale and bias in the kernel of the sigmoid loss.
    assert dtypes == [torch.float32] * 2

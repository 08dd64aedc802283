"""Memory of all our Triton kernels, compiled without a GPU: what a program needs, and how it reads and writes."""

from __future__ import annotations

from functools import partial

import launches
import pytest
import torch
from interpreter import compiled
from launches import ATTENTION_KERNELS, ATTENTION_VARIANTS, CONTRASTIVE_VARIANTS
from resources import compiled_resources, memory_instructions, shared_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

from bclip_fast.ops import cuda_device, dispatch
from bclip_fast.ops.attention import LIMITS, triton_memory
from bclip_fast.ops.attention.call import AttentionCall

pytest.importorskip("triton")
ours = pytest.importorskip("bclip_fast.ops.attention.triton")

slow = partial(pytest.param, marks=pytest.mark.long)

CAPABILITIES = {80: (8, 0), 86: (8, 6), 89: (8, 9), 90: (9, 0), 120: (12, 0)}
KIB = 1024
AVAILABLE = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 120: 99 * KIB}
BLOCK_KERNELS = ATTENTION_KERNELS[2:]
DIMS = (32, 64, 80, 96, 128)
ROWS = [
    (kernel, width, keys)
    for kernel, widths in triton_memory.ROW_BYTES.items()
    for width, needs in widths.items()
    for keys in needs
]


def on_gpu(monkeypatch, capability, *shape, dtype=torch.bfloat16):
    """A tensor without data on a GPU of a compute capability."""
    monkeypatch.setattr(cuda_device, "_capability", lambda index: CAPABILITIES[capability])
    with FakeTensorMode():
        return torch.empty(*shape, dtype=dtype, device="cuda")


@compiled
def test_memory_of_a_program_follows_the_compute_capability(monkeypatch):
    found = {capability: cuda_device.triton_block_bytes(on_gpu(monkeypatch, capability, 1)) for capability in AVAILABLE}
    assert found == AVAILABLE


@compiled
def test_allocation_alone_equals_the_compiler(tmp_path):
    """The other tests stop the compiler after it has allocated shared memory."""
    launch = launches.attention("_row_forward", torch.bfloat16, 128, 64, "images")
    assert shared_bytes(*launch, 86) == compiled_resources(*launch, 86, tmp_path).shared == 40960


@compiled
@pytest.mark.parametrize(
    ("dtype", "dim", "tokens", "variant"),
    [
        (torch.bfloat16, 64, 197, "images"),  # the image tower
        (torch.bfloat16, 64, 256, "captions"),  # the text tower
        (torch.bfloat16, 128, 256, "images"),
        (torch.float32, 128, 256, "masks"),
    ],
    ids=str,
)
@pytest.mark.parametrize("capability", [86, slow(80), slow(89), slow(90), slow(120)])
def test_attention_call_fits_the_gpu(dtype, dim, tokens, variant, capability, monkeypatch):
    """The kernels that take the call's forward and backward pass fit."""
    qkv = on_gpu(monkeypatch, capability, tokens, 3, 12, dim, dtype=dtype)
    assert LIMITS["triton"](qkv) is None
    call = AttentionCall(qkv, None, None, tokens, variant == "masks", 0.0, None, 1.0)
    for row, blocks in (("_row_forward", BLOCK_KERNELS[:1]), ("_row_backward", BLOCK_KERNELS[1:])):
        for name in [row] if ours.takes_rows(row, call) else blocks:
            needed = shared_bytes(*launches.attention(name, dtype, dim, tokens, variant), capability)
            assert needed <= AVAILABLE[capability], name


@compiled
def test_large_gpus_keep_their_row_kernels(monkeypatch):
    """Results on sm_80 and sm_90 stay as they were, and sm_86 takes the row kernels that fit."""
    taken = {}
    for capability in (80, 86, 90):
        for dim, tokens in ((64, 197), (64, 128), (128, 256), (128, 128)):
            call = AttentionCall(
                on_gpu(monkeypatch, capability, 1, 3, 12, dim), None, None, tokens, False, 0.0, None, 1.0
            )
            taken[capability, dim, tokens] = [ours.takes_rows(row, call) for row in ("_row_forward", "_row_backward")]
    assert {key: rows for key, rows in taken.items() if key[0] == 86} == {
        (86, 64, 197): [True, False],
        (86, 64, 128): [True, True],
        (86, 128, 256): [False, False],
        (86, 128, 128): [True, False],
    }
    for capability in (80, 90):
        assert all(taken[capability, dim, tokens] == [True, dim == 64] for _, dim, tokens in taken)


@compiled
@pytest.mark.parametrize(("kernel", "width", "keys"), ROWS, ids=str)
def test_table_of_row_kernels_equals_the_compiler(kernel, width, keys):
    """These variants need the most. The next test compiles the others."""
    variant = "captions" if width == 32 else "images"
    needed = shared_bytes(*launches.attention(kernel, torch.bfloat16, width, keys, variant), 90)
    assert needed == triton_memory.ROW_BYTES[kernel][width][keys]


@compiled
@pytest.mark.long
@pytest.mark.parametrize("capability", AVAILABLE)
@pytest.mark.parametrize("variant", list(ATTENTION_VARIANTS)[:3])
def test_no_row_kernel_needs_more_than_the_table(variant, capability):
    for kernel, width, keys in ROWS:
        for dim in (dim for dim in DIMS if triton_memory.width_of(dim) == width):
            launch = launches.attention(kernel, torch.float16, dim, keys, variant)
            assert shared_bytes(*launch, capability) <= triton_memory.ROW_BYTES[kernel][width][keys], (
                kernel,
                dim,
                keys,
            )


@compiled
@pytest.mark.long
@pytest.mark.parametrize("capability", AVAILABLE)
@pytest.mark.parametrize("kernel", BLOCK_KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_block_kernel_needs_more_than_the_limit_asks_for(dtype, kernel, capability):
    for dim in DIMS:
        allowed = triton_memory.BLOCK_BYTES[triton_memory.width_of(dim)] if capability != 90 else 118784
        for variant in ATTENTION_VARIANTS:
            needed = shared_bytes(*launches.attention(kernel, dtype, dim, 256, variant), capability)
            assert needed <= allowed, (dim, variant)


@compiled
def test_limit_of_attention_is_what_the_largest_block_kernel_needs():
    launch = launches.attention("_block_forward", torch.bfloat16, 128, 256, "images")
    assert shared_bytes(*launch, 120) == triton_memory.BLOCK_BYTES[128] <= 99 * KIB


CONTRASTIVE = [("_backward_kernel", torch.bfloat16)]


@compiled
@pytest.mark.parametrize("capability", [86, 90, 120, slow(80), slow(89)])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *CONTRASTIVE,
        *(
            slow(name, dtype)
            for name in CONTRASTIVE_VARIANTS
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            if (name, dtype) not in CONTRASTIVE
        ),
    ],
    ids=str,
)
def test_contrastive_kernels_fit_the_gpu(name, dtype, capability):
    assert shared_bytes(*launches.contrastive(name, dtype, 512, capability), capability) <= AVAILABLE[capability]


@compiled
def test_single_query_and_pointwise_kernels_fit_every_gpu():
    needs = [shared_bytes(*launches.single_query("_backward_kernel", torch.float32, dim), 86) for dim in (64, 256)]
    needs += [shared_bytes(*launches.add_norm(f"_add_norm{name}_kernel", 8192), 86) for name in ("", "_backward")]
    assert max(needs) <= 16 * KIB


@compiled
def test_gpu_with_less_memory_is_refused_with_the_reason_and_auto_takes_cuda(monkeypatch):
    qkv = on_gpu(monkeypatch, 86, 5, 3, 12, 128)
    monkeypatch.setattr(cuda_device, "_LEAST_BLOCK_BYTES", 64 * KIB)
    assert LIMITS["triton"](qkv) == "a program needs 90112 bytes of shared memory, but this device gives it 65536"
    assert LIMITS["triton"](on_gpu(monkeypatch, 86, 5, 3, 12, 64)) is None
    monkeypatch.setattr("bclip_fast.ops.attention.cuda_refusal", lambda tensor, block_bytes: None)
    monkeypatch.setattr(dispatch, "MISSING", {})
    # The record of a device, and the check before first use, need the device.
    monkeypatch.setattr(dispatch.tuning, "order", lambda *_: dispatch.BACKENDS)
    monkeypatch.setattr(dispatch, "_fault", lambda *_: None)
    assert dispatch.choose("fused_attention", LIMITS, "auto", qkv, 0.0, False) == "cuda"


POINTWISE = {
    "gelu": lambda: launches.gelu("_gelu_kernel"),
    "gelu_backward": lambda: launches.gelu("_gelu_backward_kernel"),
    "add_norm": lambda: launches.add_norm("_add_norm_kernel", 768),
    "add_norm_backward": lambda: launches.add_norm("_add_norm_backward_kernel", 768),
}


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_kernels_access_16_bytes_at_a_time(name, capability, tmp_path):
    accesses, _ = memory_instructions(*POINTWISE[name](), capability, tmp_path)
    # Every thread also reads the seed of dropout, 8 bytes.
    seeds = accesses.pop("LDG.E.64", 0)
    assert seeds == ("norm" in name)
    assert set(accesses) == {"LDG.E.128", "STG.E.128"}, accesses


@compiled
@pytest.mark.parametrize(
    ("kernel", "variant"),
    [
        ("_row_forward", "images"),
        *(
            slow(kernel, variant)
            for kernel, variant in [("_row_backward", "images"), *((kernel, "captions") for kernel in BLOCK_KERNELS)]
        ),
    ],
)
@pytest.mark.parametrize("capability", [80, slow(90)])
def test_loops_of_attention_access_no_half_words(kernel, variant, capability, tmp_path):
    launch = launches.attention(kernel, torch.bfloat16, 64, 256, variant)
    accesses, in_loops = memory_instructions(*launch, capability, tmp_path)
    assert accesses
    assert not [name for name in in_loops if name.endswith(("U8", "U16", "S16"))], in_loops


@compiled
@pytest.mark.parametrize("capability", [80, slow(90)])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
@pytest.mark.parametrize("dim", [80, *(slow(dim) for dim in (64, 256))])
def test_single_query_kernels_access_16_bytes_at_a_time_without_spills(dim, kernel, capability, tmp_path):
    """Outside the loop, each thread reads and writes single elements of the query's row."""
    launch = launches.single_query(kernel, torch.bfloat16, dim)
    _, in_loops = memory_instructions(*launch, capability, tmp_path)
    in_loops.pop("LDG.E.64", 0)
    assert set(in_loops) <= {"LDG.E.128", "STG.E.128"}
    assert in_loops["LDG.E.128"] >= 8
    assert compiled_resources(*launch, capability, tmp_path).spilled == 0


@compiled
@pytest.mark.parametrize("columns", ["i32", slow("i32:16")])
@pytest.mark.parametrize("name", ["_siglip_kernel", "_backward_kernel of groups"])
def test_contrastive_kernels_write_16_bytes_of_the_gradient_at_a_time(name, columns, tmp_path):
    """For every number of texts, because rows of the gradient are padded. On sm_90, TMA writes it."""
    kernel, types, constants = launches.contrastive(name, torch.float16, 512, 80)
    accesses, _ = memory_instructions(kernel, types | {"num_columns": columns}, constants, 80, tmp_path)
    # A program also writes up to three sums.
    sums = accesses.pop("STG.E")
    assert sums == (3 if "siglip" in name else 1)
    assert {name for name in accesses if name.startswith("STG")} == {"STG.E.128"}, accesses
    assert accesses["STG.E.128"] >= 2

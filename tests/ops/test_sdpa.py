"""torch's attention as a backend: its results and its refusals. The functions for GPUs run on the CPU here."""

from __future__ import annotations

import pytest
import torch
from judged import bounds_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from bclip_fast import ops
from bclip_fast.ops.attention import LIMITS, reference, sdpa, sdpa_kernels
from bclip_fast.ops.attention.call import AttentionCall, SingleQueryCall
from bclip_fast.ops.attention.single_query import reference as single_query_reference


def assert_same_with_gradients(backend, definition, leaves):
    outputs = backend(*leaves), definition(*leaves)
    torch.testing.assert_close(*outputs)
    upstream = torch.randn_like(outputs[0])
    gradients = (torch.autograd.grad(output, leaves, upstream) for output in outputs)
    for mine, true in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_dense_attention_equals_the_definition(masked, causal):
    qkv = torch.randn(3, 11, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 11) < 0.6 if masked else None
    if mask is not None:
        mask[1] = False
        mask[2, :4] = False
    flat = None if mask is None else mask.flatten()
    assert_same_with_gradients(
        lambda qkv: ops.fused_attention(qkv, mask, causal=causal, scale=0.3, backend="torch").flatten(0, 1),
        lambda qkv: reference.attention(AttentionCall(qkv.flatten(0, 1), None, flat, 11, causal, 0.0, None, 0.3)),
        [qkv],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_one_by_one_equal_the_definition(causal):
    bounds, rows = bounds_of([5, 1, 0, 8]), torch.tensor([2, 5, 9])
    qkv = torch.randn(14, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(
        lambda qkv: ops.varlen_attention(qkv, bounds, 9, causal=causal, scale=0.3, backend="torch"),
        lambda qkv: reference.attention(AttentionCall(qkv, bounds, None, 9, causal, 0.0, None, 0.3)),
        [qkv],
    )
    query = torch.randn(3, 2, 16, dtype=torch.float64, requires_grad=True)
    pairs = torch.randn(14, 2, 2, 16, dtype=torch.float64, requires_grad=True)
    bounds = bounds_of([5, 1, 8])
    options = rows, bounds, causal, 0.0, None, 0.3
    assert_same_with_gradients(
        lambda *leaves: ops.single_query_attention(*leaves, rows, bounds, causal=causal, scale=0.3, backend="torch"),
        lambda query, pairs: single_query_reference.attention(SingleQueryCall(query, pairs, *options)),
        [query, pairs],
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[5, 1, 0, 8], [3], [0, 7, 0]], ids=str)
def test_padded_sequences_equal_the_definition(lengths, causal):
    bounds = bounds_of(lengths)
    qkv = torch.randn(sum(lengths), 3, 2, 16, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(
        lambda qkv: sdpa.packed_padded(AttentionCall(qkv, bounds, None, 9, causal, 0.0, None, 0.3)),
        lambda qkv: reference.attention(AttentionCall(qkv, bounds, None, 9, causal, 0.0, None, 0.3)),
        [qkv],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_masked_queries_equal_the_definition(causal):
    bounds, rows = bounds_of([5, 1, 8]), torch.tensor([2, 5, 9])
    options = rows, bounds, causal, 0.0, None, 0.3
    query = torch.randn(3, 2, 16, dtype=torch.float64, requires_grad=True)
    pairs = torch.randn(14, 2, 2, 16, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(
        lambda query, pairs: sdpa.single_query_masked(
            SingleQueryCall(query, pairs, rows, bounds, causal, 0.0, None, 0.3)
        ),
        lambda query, pairs: single_query_reference.attention(SingleQueryCall(query, pairs, *options)),
        [query, pairs],
    )


def test_empty_batch_gives_no_rows_and_a_gradient():
    qkv = torch.randn(0, 3, 2, 16, requires_grad=True)
    call = AttentionCall(qkv, bounds_of([0, 0]), None, 9, False, 0.0, None, 1.0)
    for out in (sdpa.packed_padded(call), sdpa.packed_one_by_one(call)):
        assert out.shape == (0, 2, 16)
        out.sum().backward()


def test_dropout_is_refused_and_auto_takes_another_backend():
    qkv = torch.randn(1, 7, 3, 2, 16)
    with pytest.raises(ops.BackendError, match="torch: torch's dropout cannot drop the weights that `seed` selects"):
        ops.fused_attention(qkv, dropout_p=0.1, seed=3, backend="torch")
    assert ops.fused_attention(qkv, dropout_p=0.1, seed=3).shape == (1, 7, 2, 16)


def test_bad_bounds_raise_the_usual_errors():
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T = 4"):
        ops.varlen_attention(torch.randn(4, 3, 2, 16), bounds_of([3]), 9, backend="torch")
    pairs, rows = torch.randn(4, 2, 2, 16), torch.tensor([4])
    with pytest.raises(ValueError, match="sequence 0 owns rows 0 to 4"):
        ops.single_query_attention(torch.randn(1, 2, 16), pairs, rows, bounds_of([4]), backend="torch")


def test_dense_compile_has_no_graph_break():
    qkv, mask = torch.randn(2, 7, 3, 2, 16), torch.rand(2, 7) < 0.6

    def attend(qkv):
        return ops.fused_attention(qkv, mask, causal=True, backend="torch")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(qkv), attend(qkv))


def test_packed_sequences_in_a_cpu_graph_are_refused():
    qkv, bounds = torch.randn(4, 3, 2, 16), bounds_of([3, 1])

    def attend(qkv, backend):
        return ops.varlen_attention(qkv, bounds, 9, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, "auto"), attend(qkv, "torch"))
    with pytest.raises(Exception, match="lengths a graph cannot hold"):
        compiled(qkv, "torch")


def test_padded_sequence_longer_than_max_seqlen_changes_no_other():
    """An index outside would stop a GPU's context, and only the GPU knows the lengths."""
    qkv, rows = torch.randn(20, 3, 2, 16), torch.tensor([0, 1, 2, 18, 19])
    call = AttentionCall(qkv, bounds_of([3, 15, 2]), None, 9, False, 0.0, None, 0.3)
    right = AttentionCall(qkv[rows], bounds_of([3, 0, 2]), None, 9, False, 0.0, None, 0.3)
    torch.testing.assert_close(sdpa.packed_padded(call)[rows], sdpa.packed_padded(right))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_fake_sequences_give_shapes_and_gradients_without_their_values(backend):
    """No C++ kernel takes a head dimension of 8, so `auto` takes torch's attention too."""
    with FakeTensorMode():
        qkv = torch.empty(6, 3, 2, 8, requires_grad=True)
        bounds, rows = torch.empty(3, dtype=torch.int32), torch.empty(2, dtype=torch.int64)
        out = ops.varlen_attention(qkv, bounds, 4, causal=True, backend=backend)
        single = ops.single_query_attention(qkv[:2, 0], qkv[:, 1:], rows, bounds, causal=True, backend=backend)
        (out.sum() + single.sum()).backward()
    assert out.shape == (6, 2, 8) and single.shape == (2, 2, 8) and qkv.grad.shape == qkv.shape


KERNELS = tuple(sdpa_kernels.KERNELS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_flash_kernel_of_a_cpu_equals_the_definition(masked, causal):
    qkv = torch.randn(3, 11, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(11) >= torch.tensor([[0], [4], [11]]) if masked else None
    flat = None if mask is None else mask.flatten()
    assert_same_with_gradients(
        lambda qkv: sdpa.dense(qkv, mask, causal, 0.3, "sdpa_flash").flatten(0, 1),
        lambda qkv: reference.attention(AttentionCall(qkv.flatten(0, 1), None, flat, 11, causal, 0.0, None, 0.3)),
        [qkv],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_of_cudnn_are_padded_and_equal_the_definition(monkeypatch, causal):
    """The masked call of the cuDNN and the memory-efficient kernel, by the CPU's flash kernel."""
    monkeypatch.setitem(sdpa_kernels.KERNELS, "sdpa_cudnn", sdpa_kernels.KERNELS["sdpa_flash"])
    qkv = torch.randn(14, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    call = bounds_of([5, 1, 0, 8]), None, 9, causal, 0.0, None, 0.3
    assert_same_with_gradients(
        lambda qkv: sdpa.packed(AttentionCall(qkv, *call), "sdpa_cudnn"),
        lambda qkv: reference.attention(AttentionCall(qkv, *call)),
        [qkv],
    )


def test_packed_sequences_of_flash_are_a_nested_tensor_and_equal_the_definition(monkeypatch):
    """torch's flash kernel for nested tensors needs a GPU. Its plain kernel takes contiguous ones without a mask."""
    monkeypatch.setitem(sdpa_kernels.KERNELS, "sdpa_flash", SDPBackend.MATH)
    nested = torch.nested.nested_tensor_from_jagged
    made = []

    def contiguous(values, offsets, **lengths):
        made.append((offsets, lengths))
        return nested(values.contiguous(), offsets, **lengths)

    monkeypatch.setattr(torch.nested, "nested_tensor_from_jagged", contiguous)
    qkv = torch.randn(14, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    call = bounds_of([5, 1, 8]), None, 9, False, 0.0, None, 0.3
    assert_same_with_gradients(
        lambda qkv: sdpa.packed(AttentionCall(qkv, *call), "sdpa_flash"),
        lambda qkv: reference.attention(AttentionCall(qkv, *call)),
        [qkv],
    )
    # With both bounds of the lengths, torch doesn't wait for the device to read them.
    assert [lengths for _, lengths in made] == [{"min_seqlen": 1, "max_seqlen": 9}] * 3
    # And with the same offsets, all three tensors have the same lengths to torch.
    assert made[0][0].dtype == torch.int64 and made[0][0] is made[1][0] is made[2][0]


@pytest.mark.parametrize("kernel", ["sdpa_cudnn", "sdpa_efficient"])
def test_kernel_that_torch_refuses_is_an_error_and_no_other_runs(kernel):
    """A CPU has neither kernel."""
    with pytest.raises(ops.BackendError, match=f"{kernel}: torch 2.* refuses this call"):
        sdpa.dense(torch.randn(1, 3, 3, 1, 16), None, False, 0.3, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_named_kernel_on_a_cpu_is_refused_with_its_reason(kernel):
    with pytest.raises(ops.BackendError, match=f"{kernel}: device is cpu, not cuda"):
        ops.fused_attention(torch.randn(1, 3, 3, 1, 16), backend=kernel)


@pytest.fixture
def gpu(monkeypatch):
    """Limits of fake tensors on a GPU with cuDNN. The fixture's value changes its compute capability."""

    def use(capability):
        monkeypatch.setattr(sdpa_kernels, "compute_capability", lambda index: capability)

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    use((9, 0))
    with FakeTensorMode():
        yield use


def refusals(dim=64, dtype=torch.float16, *inputs):
    """The reasons of the kernels, without the names of dtypes."""
    qkv = torch.empty(4, 3, 1, dim, dtype=dtype, device="cuda")
    return {kernel: LIMITS[kernel](qkv, *inputs) for kernel in KERNELS}


def test_kernels_take_half_precision_of_published_head_dims(gpu):
    for dtype in (torch.float16, torch.bfloat16):
        for dim in (32, 64, 72, 80, 96, 128):
            assert set(refusals(dim, dtype).values()) == {None}
    reasons = refusals(64, torch.float32)
    assert reasons["sdpa_efficient"] is None
    assert all("float32" in reasons[kernel] for kernel in ("sdpa_cudnn", "sdpa_flash"))
    assert all("float64" in reason for reason in refusals(64, torch.float64).values())


@pytest.mark.parametrize(
    ("dim", "refused"), [(60, set(KERNELS)), (136, {"sdpa_cudnn"}), (200, {"sdpa_cudnn", "sdpa_flash"})]
)
def test_kernels_refuse_other_head_dims(gpu, dim, refused):
    reasons = refusals(dim)
    assert {kernel for kernel, reason in reasons.items() if reason} == refused
    assert all(f"d={dim} is not a multiple of 8 up to" in reasons[kernel] for kernel in refused)


def test_kernels_refuse_what_they_cannot_do(gpu):
    assert all("dropout" in reason for reason in refusals(64, torch.float16, 0.1).values())
    dense_with_mask = refusals(64, torch.float16, 0.0, False, True, 197)
    assert dense_with_mask == {"sdpa_cudnn": None, "sdpa_flash": "it takes no key mask", "sdpa_efficient": None}
    one_token = refusals(64, torch.float16, 0.0, True, False, 1)
    assert one_token == {
        "sdpa_cudnn": "cuDNN takes no sequence of one token",
        "sdpa_flash": None,
        "sdpa_efficient": None,
    }
    gpu((7, 5))
    assert all("compute capability 8.0" in reason for reason in refusals().values())


def test_cudnn_is_refused_where_results_must_repeat(gpu, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    reasons = refusals()
    assert "not deterministic" in reasons["sdpa_cudnn"]
    assert reasons["sdpa_flash"] is None and reasons["sdpa_efficient"] is None
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: True)
    assert refusals()["sdpa_cudnn"] is None


def test_named_kernel_in_a_graph_is_kept():
    """The graph holds the kernel's operator, so torch cannot choose another one when it runs."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    qkv = torch.randn(2, 7, 3, 2, 16)
    compiled = torch.compile(lambda qkv: sdpa.dense(qkv, None, True, 0.3, "sdpa_flash"), fullgraph=True, backend=keep)
    torch.testing.assert_close(compiled(qkv), sdpa.dense(qkv, None, True, 0.3))
    assert "_sdpa_kernel" in graphs[0].code or "sdpa_kernel" in str(graphs[0].graph)

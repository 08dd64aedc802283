"""The contrastive kernels in CUDA C++ without a GPU: their meaning on the host, plain and sanitized."""

from __future__ import annotations

from pathlib import Path

import cuda_emulator
import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import ON_GPU, hosted, outside
from inside import num_passed
from judged import judge_clip_loss, judge_siglip_loss

from bclip_fast import ops
from bclip_fast.ops import cuda_device
from bclip_fast.ops.contrastive import LIMITS, cuda, reference
from bclip_fast.ops.contrastive.loss_terms import Groups
from bclip_fast.ops.cuda_device import CUDA_HOST, cuda_module

DTYPES = [torch.float16, torch.bfloat16]


@outside
def test_on_the_host():
    """What this file marks as hosted, and every test of the operators that takes a backend."""
    files = "test_contrastive.py", "test_contrastive_modes.py", "test_contrastive_targets.py", Path(__file__).name
    assert num_passed(files, "cuda", **cuda_emulator.environment()) >= 55


@outside
def test_on_the_host_under_the_sanitizers():
    sanitized = cuda_emulator.environment(sanitized=True)
    assert num_passed([Path(__file__).name], "rectangle or far_below", **sanitized) >= 5


def features(num_rows, width, dtype=torch.float16, aligned=None):
    rows = torch.randn(num_rows, width, dtype=torch.float64)
    return F.normalize(rows if aligned is None else aligned + 0.1 * rows).to(dtype)


@hosted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "scale"),
    [((137, 67), 14.3), ((131, 19), 100.0), ((1, 2), 14.3), ((128, 40), 50.0), ((258, 8), 20.0), ((33, 520), 90.0)],
    ids=str,
)
def test_cuda_clip_on_odd_shapes(dtype, shape, scale, nan_filled):
    judge_clip_loss(
        lambda *a: ops.clip_loss(*a, chunk_size=67, backend="cuda"),
        lambda: [features(*shape, dtype), features(*shape, dtype), torch.tensor(scale), torch.tensor(-3.0)],
    )


@hosted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(137, 67), (1, 2)], ids=str)
def test_cuda_siglip_on_odd_shapes(dtype, shape, nan_filled):
    scalars = [torch.tensor(10.0), torch.tensor(-10.0)]
    inputs = [features(*shape, dtype), features(*shape, dtype), *scalars]
    judge_siglip_loss(
        lambda *a: ops.siglip_loss(*a, chunk_size=67, backend="cuda"),
        lambda: [features(*shape, dtype), features(*shape, dtype), *scalars],
    )
    with torch.no_grad():
        loss = ops.siglip_loss(*inputs, backend="cuda")
    truth = reference.dense_siglip(*(tensor.double() for tensor in inputs))
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=0)


def close(ours, truth, tolerance):
    for own, true in zip(ours, truth, strict=True):
        finite = true.isfinite()
        assert torch.equal(own[~finite].double(), true[~finite])
        assert (own[finite].double() - true[finite]).norm() <= tolerance * true[finite].norm() + 1e-12


@hosted
@pytest.mark.parametrize("chunk_size", [13, 64])
@pytest.mark.parametrize("first", [97, None])
def test_cuda_rectangle_against_the_reference(chunk_size, first, nan_filled):
    """41 images against 151 texts, the first belonging to text 97; not contiguous, as slices of wider tensors."""
    text = F.pad(features(151, 23), (0, 3))[:, :23]
    image = F.pad(features(41, 23), (0, 5))[:, :23]
    scale, bias, weight = torch.tensor(30.0), torch.tensor(-2.0), torch.tensor(-0.3)
    wide = [tensor.double() for tensor in (image, text, scale, bias)]
    positive_grad = torch.randn(41) / 10
    sums = reference.forward(*wide[:3], first, 64)
    close(cuda.forward(image, text, scale, first, chunk_size), sums, 1e-6)
    # Some rows and columns have no loss.
    rows_lse, columns_lse = sums[0] + 0.5, sums[1] + 1
    rows_lse[3:9], columns_lse[::5] = torch.inf, torch.inf
    saved = first, rows_lse, columns_lse
    truth = reference.backward(*wide[:3], *saved, weight.double(), positive_grad, 64, torch.float64)
    own = cuda.backward(image, text, scale, *saved, weight, positive_grad, chunk_size, torch.float32)
    # G is rounded to float16.
    close(own, truth, 3e-4)
    truth = reference.siglip(*wide, first, 0.1, 64, torch.float64, True)
    close(cuda.siglip(image, text, scale, bias, first, 0.1, chunk_size, torch.float32, True), truth, 3e-4)
    close(cuda.siglip(image, text, scale, bias, first, 0.1, chunk_size, torch.float32, False)[:1], truth[:1], 1e-6)


@hosted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_groups_against_the_reference(dtype, nan_filled):
    image, text, scale = features(137, 24, dtype), features(150, 24, dtype), torch.tensor(20.0)
    ids = torch.arange(137) // 3, torch.arange(150) % 40
    groups = Groups.of(ids[0], *ids)
    wide = image.double(), text.double(), scale.double()
    lse = groups.raised(*reference.forward(*wide, None, 64))
    nothing, weight = torch.empty(0), torch.tensor(0.2)
    truth = reference.backward(*wide, None, *lse, weight.double(), nothing, 64, torch.float64, groups=groups)
    own = cuda.backward(image, text, scale, None, *lse, weight, nothing, 100, torch.float32, groups=groups)
    close(own, truth, 3e-4)
    truth = reference.siglip(*wide, None, None, 0.1, 64, torch.float64, True, groups=groups)
    close(cuda.siglip(image, text, scale, None, None, 0.1, 100, torch.float32, True, groups=groups), truth, 3e-4)


@hosted
def test_cuda_rows_far_below_the_rest_of_their_tile(nan_filled):
    """Logits from -90 to 100 in one tile: exp(S - highest) is zero for whole rows."""
    direction = features(1, 31)
    image = torch.cat([features(20, 31, aligned=direction), features(20, 31, aligned=-direction)])
    text, scale = features(40, 31, aligned=direction), torch.tensor(100.0)
    truth = reference.forward(image.double(), text.double(), scale.double(), 0, 64)
    assert truth[0].max() - truth[0].min() > 150
    close(cuda.forward(image, text, scale, 0, 64), truth, 1e-6)
    judge_clip_loss(lambda *a: ops.clip_loss(*a, backend="cuda"), lambda: [image, text, scale, torch.tensor(0.0)])


@hosted
def test_cuda_no_loss_in_row_nor_column_is_no_gradient(nan_filled):
    """S is 200 there and -200 elsewhere: exp(S - m) overflows for an m that serves the rest."""
    image = torch.eye(2, 8).half()
    text = torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).half() @ image
    lse = torch.tensor([torch.inf, -199.0]).double()
    inputs = None, lse, lse, torch.tensor(1.0), torch.empty(0), 9
    grads = cuda.backward(image, text, torch.tensor(200.0), *inputs, torch.float32)
    wide = image.double(), text.double(), torch.tensor(200.0).double()
    close(grads, reference.backward(*wide, *inputs, torch.float64), 1e-3)


@hosted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_keeps_small_probabilities(dtype):
    """A gradient tile that underflows would pass within eager's tolerance; so the bound here is relative."""
    inputs = features(139, 64, dtype), features(139, 64, dtype), torch.tensor(20.0)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    ours = torch.autograd.grad(ops.clip_loss(*leaves, backend="cuda"), leaves)
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    truth = torch.autograd.grad(reference.dense(*wide), wide)
    close(ours, [tensor.detach() for tensor in truth], 1e-3 if dtype == torch.float16 else 4e-3)


@hosted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_gradients_of_a_saturated_batch(dtype):
    """At a loss of 1e-9 all of G is as small, and keeps its digits as float16 times 2^14."""
    image = features(139, 64, torch.float64)
    inputs = [image.to(dtype), F.normalize(image + 0.115 * torch.randn(139, 64)).to(dtype), torch.tensor(100.0)]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = ops.clip_loss(*leaves, backend="cuda")
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    truth = reference.dense(*wide)
    assert 1e-11 < truth < 1e-7
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=0)
    ours, exact = (torch.autograd.grad(value, by) for value, by in ((1e8 * loss, leaves), (1e8 * truth, wide)))
    for own, true in zip(ours, exact, strict=True):
        assert (own.double() - true).norm() <= (1e-3 if dtype == torch.float16 else 4e-3) * true.norm()


@pytest.mark.skipif(not ON_GPU, reason="a graph is captured on a GPU")
def test_cuda_calls_can_be_captured():
    """Nothing waits for the device, and a replay reads what the inputs then hold."""
    leaves = [features(300, 64).requires_grad_() for _ in range(2)]

    def step():
        return torch.autograd.grad(ops.clip_loss(*leaves, 20.0, backend="cuda"), leaves)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].copy_(features(300, 64))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))


@hosted
@pytest.mark.skipif(ON_GPU, reason="takes memory that is only reserved where nothing touches it")
def test_cuda_gradient_beyond_2_to_the_31(nan_filled):
    """131 rows of G that lie 2^24 elements apart, as at a batch of 16 million: an index of 32 bits would wrap."""
    image, text, scale, stride = features(131, 8), features(3, 8), torch.tensor(9.0), 2**24
    torch.use_deterministic_algorithms(False)
    grads = [torch.empty(131 * one, dtype=torch.float16).as_strided((131, 3), (one, 1)) for one in (stride, 16)]
    for grad in grads:
        call, partials = cuda._features(image, text, scale, 0, 0), torch.empty(2, 3)
        target = cuda._gradient(grad, partials, 2.0**14)
        cuda_module().contrastive_sigmoid(call, 0, cuda._Ids(None).of(0, image, text), target)
    assert torch.equal(*grads) and grads[0].count_nonzero() > 200


@hosted
@pytest.mark.parametrize("operator", [ops.clip_loss, ops.siglip_loss], ids=["clip", "siglip"])
def test_cuda_compiles_without_a_graph_break(operator):
    cuda_device._cuda_device.cache_clear()
    inputs = [features(9, 8).requires_grad_(), features(9, 8).requires_grad_(), torch.tensor(9.0)]
    compiled = torch.compile(lambda *a: operator(*a, backend="cuda"), fullgraph=True, backend="aot_eager")
    results = [function(*inputs) for function in (compiled, lambda *a: operator(*a, backend="cuda"))]
    assert torch.equal(*results)
    for ours, theirs in zip(*(torch.autograd.grad(result, inputs[:2]) for result in results), strict=True):
        assert torch.equal(ours, theirs)


@hosted
@pytest.mark.skipif(ON_GPU, reason="a GPU's order can't be chosen")
def test_cuda_order_of_threads_does_not_matter():
    image, text, scale = features(150, 24), features(150, 24), torch.tensor(20.0)
    results = []
    for seed in range(3):
        cuda_module().set_seed(seed)
        rows, columns = cuda.forward(image, text, scale, 0, 64)
        saved = rows, columns, torch.tensor(1.0), torch.ones(150)
        results.append([rows, columns, *cuda.backward(image, text, scale, 0, *saved, 64, torch.float32)])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_cuda_limits_say_why(monkeypatch):
    limits, ones = LIMITS["cuda"], torch.ones(3, 4)
    assert "float32" in limits(ones, ones) and "float64" in limits(ones.double(), ones.double())
    for dtype in DTYPES:
        reason = limits(ones, ones, dtype)
        assert reason is None if CUDA_HOST or ON_GPU else "not cuda" in reason

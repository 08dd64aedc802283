from __future__ import annotations

import formulas
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as_eager, collected_if, every_backend
from pairwise import pairwise
from torch import Tensor

from bclip_fast import ops
from bclip_fast.ops import dispatch, fingerprint, matmul, processor, tuning
from bclip_fast.ops.convolution import conv2d
from bclip_fast.ops.matmul import _linear, activated, reference
from bclip_fast.ops.record_files import Entry, Record

# (T, K, N). Sizes around a panel, depths of one block and of several, and more rows and columns than a task has.
SHAPES = [(5, 7, 3), (1, 33, 40), (70, 64, 31), (33, 800, 65), (300, 96, 900), (1100, 40, 70), (16, 768, 3072)]


def inputs(shape: tuple[int, int, int], weight: torch.dtype = torch.bfloat16, bias: bool = True) -> list[Tensor]:
    rows, width, columns = shape
    x, w, b = torch.randn(rows, width).bfloat16(), torch.randn(columns, width).to(weight), torch.randn(columns)
    return [x, w, b.to(weight)] if bias else [x, w]


with_cpu = collected_if("cpu" in every_backend("linear", torch.bfloat16))
with_amx = collected_if(processor.HAS_AMX)


@pytest.fixture
def without_bfloat16(monkeypatch, unmeasured) -> None:
    """Choose backends as on a processor without bfloat16 instructions and without measurements."""
    monkeypatch.setattr(processor, "BFLOAT16_INSTRUCTIONS", "")
    monkeypatch.setattr(processor, "HAS_AMX", False)
    monkeypatch.setattr("bclip_fast._cpu.has_amx", lambda: False)


@pairwise(
    backend=every_backend("linear", torch.bfloat16),
    shape=SHAPES,
    bias=[True, False],
    weight=[torch.bfloat16, torch.float32],
)
def test_linear_is_as_accurate_as_eager(backend, shape, bias, weight, nan_filled):
    def draw():
        # The kernel multiplies the rounded weight, so the truth takes it too.
        x, w, *b = inputs(shape, weight, bias)
        return [x, w.bfloat16().to(weight), *b]

    def definition(x, w, b=None):
        return reference.linear(x, w, b)

    def kernel(x, w, b=None):
        return ops.linear(x, w, b, backend=backend)

    assert_as_accurate_as_eager(kernel, definition, draw, None if backend == "reference" else formulas.linear)


@with_cpu
def test_gradient_of_a_float32_weight_is_not_rounded():
    x, weight, bias = inputs((500, 64, 96), torch.float32)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    upstream = torch.randn(500, 96).bfloat16()
    ops.linear(x, weight, bias, backend="cpu").backward(upstream)
    for gradient, true in ((weight.grad, upstream.double().T @ x.double()), (bias.grad, upstream.double().sum(0))):
        assert gradient.dtype == torch.float32
        assert (gradient - true).abs().max() < 1e-6 * true.abs().max() * 8


def test_autocast_casts_inputs_like_torch():
    # bfloat16 holds these parameters exactly, because products in float32 don't round them.
    x, weight, bias = inputs((40, 64, 96))
    weight, bias = weight.float(), bias.float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias), rtol=2**-7, atol=2**-7)
        assert torch.equal(ops.linear(x.float(), weight, bias), ops.linear(x, weight, bias))
        assert ops.linear(x.double(), weight.double(), bias.double()).dtype == torch.float64
    assert torch.equal(ops.linear(x.float(), weight, bias), F.linear(x.float(), weight, bias))


@with_cpu
@pytest.mark.parametrize(
    ("amx", "instructions", "rows", "expected"),
    [
        (True, "AMX", 512, "cpu"),
        (True, "AMX", 511, "reference"),
        (False, "AVX512-BF16", 4096, "reference"),
        (False, "", 4096, "cpu"),
        (False, "", 1, "cpu"),
    ],
)
def test_auto_without_measurements_takes_the_faster_backend(amx, instructions, rows, expected, monkeypatch, unmeasured):
    monkeypatch.setattr(processor, "HAS_AMX", amx)
    monkeypatch.setattr(processor, "BFLOAT16_INSTRUCTIONS", instructions)
    taken = []
    monkeypatch.setattr(matmul, "_linear", lambda x, weight, bias, backend: taken.append(backend))
    monkeypatch.setattr(reference, "linear", lambda x, weight, bias: taken.append("reference"))
    x, weight = torch.zeros(rows, 2).bfloat16(), torch.zeros(3, 2)
    ops.linear(x, weight)
    with ops.use_backend("cpu"):
        ops.linear(x, weight)
    ops.linear(x, weight, backend="cpu")
    assert taken == [expected, "cpu", "cpu"]


@with_cpu
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32], ids=str)
def test_float32_products_are_as_accurate_as_eager_and_keep_dtypes(weight, autocast, without_bfloat16, nan_filled):
    def draw():
        # More rows than the block of one thread, and weights that bfloat16 holds exactly, because eager rounds them.
        x, w, *b = inputs((1100, 40, 70), weight)
        return [x, w.bfloat16().to(weight), *b]

    def kernel(*tensors):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ops.linear(*tensors)

    assert_as_accurate_as_eager(kernel, reference.linear, draw, formulas.linear)
    leaves = [tensor.requires_grad_() for tensor in draw()]
    out = kernel(*leaves)
    assert [out.dtype, *(g.dtype for g in torch.autograd.grad(out.sum(), leaves))] == [
        torch.bfloat16, torch.bfloat16, weight, weight
    ]  # fmt: skip


@with_cpu
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_float32_convolution_is_as_accurate_as_eager_and_saves_bfloat16(autocast, without_bfloat16):
    x, weight = torch.randn(3, 8, 9, 7).bfloat16(), torch.randn(6, 8, 3, 3).bfloat16()
    if autocast:
        weight = weight.float()

    def definition(x, weight):
        return F.conv2d(x, weight.to(x.dtype), None, (2, 2), (1, 1))

    def kernel(x, weight):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return conv2d(x, weight, (2, 2), (1, 1))

    assert_as_accurate_as_eager(kernel, definition, lambda: [torch.randn_like(x), weight], None)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = kernel(x.requires_grad_(), weight.requires_grad_())
    assert out.dtype == torch.bfloat16
    assert {t.dtype for t in saved} == {x.dtype, weight.dtype}
    assert [g.dtype for g in torch.autograd.grad(out.sum(), [x, weight])] == [x.dtype, weight.dtype]
    # A gradient for the weight only.
    x = x.detach()
    assert torch.autograd.grad(kernel(x, weight).sum(), [weight])[0].shape == weight.shape


@with_cpu
def test_strided_inputs_and_more_dimensions_give_the_same_results():
    x, weight, bias = inputs((60, 40, 48))
    plain = ops.linear(x, weight, bias, backend="cpu")
    tensors = [x.T.contiguous().T.unflatten(0, (5, 3, 4)), weight.T.contiguous().T, bias.repeat(2)[48:]]
    strided = [tensor.requires_grad_() for tensor in tensors]
    out = ops.linear(*strided, backend="cpu")
    assert torch.equal(out.flatten(0, 2), plain)
    # The gradient of a sum is one number, expanded.
    out.sum().backward()
    torch.testing.assert_close(strided[0].grad[0, 0, 0], weight.float().sum(0).bfloat16(), rtol=2**-7, atol=2**-5)
    assert torch.equal(strided[2].grad, torch.full((48,), 60.0).bfloat16())


@with_cpu
@pytest.mark.parametrize("index", range(3))
def test_gradient_of_one_input_equals_that_of_all(index):
    tensors = inputs((50, 40, 48))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    every = torch.autograd.grad(ops.linear(*leaves, backend="cpu").square().sum(), leaves)
    tensors[index].requires_grad_()
    (actual,) = torch.autograd.grad(ops.linear(*tensors, backend="cpu").square().sum(), [tensors[index]])
    torch.testing.assert_close(actual, every[index], rtol=2**-7, atol=0)


@with_cpu
def test_empty_input_gives_empty_output_and_zero_gradients():
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs((0, 40, 48)))
    out = ops.linear(x, weight, bias, backend="cpu")
    out.sum().backward()
    assert out.shape == (0, 48)
    assert not weight.grad.any()
    assert not bias.grad.any()


@with_amx
def test_number_of_threads_does_not_change_results():
    tensors = [tensor.requires_grad_() for tensor in inputs((700, 900, 840), torch.float32)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = ops.linear(*tensors, backend="cpu")
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


@with_cpu
def test_opcheck_accepts_the_registration():
    for weight in (torch.bfloat16, torch.float32):
        x, w, b = (tensor.requires_grad_() for tensor in inputs((6, 40, 24), weight))
        torch.library.opcheck(_linear, (x, w, b, "cpu"))
        torch.library.opcheck(_linear, (x.unflatten(0, (2, 3)), w, None, "cpu"))


def test_compile_has_no_graph_break():
    x, weight, bias = inputs((6, 40, 24))
    compiled = torch.compile(lambda x: ops.gelu(ops.linear(x, weight, bias)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.gelu(ops.linear(x, weight, bias)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, w: ops.linear(x, w[:, 1:]), "x must be"),
        (lambda x, w: ops.linear(x, w[0]), "x must be"),
        (lambda x, w: ops.linear(x, w, x[0]), "bias must be"),
    ],
)
def test_bad_argument_raises_an_error_that_names_it(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2, 4), torch.zeros(3, 4))


def test_named_backend_is_never_replaced():
    with pytest.raises(ops.BackendError, match="float32"):
        ops.linear(torch.zeros(2, 4), torch.zeros(3, 4), backend="cpu")


@with_amx
def test_kernel_refuses_sums_of_an_untransposed_left_operand():
    _cpu = pytest.importorskip("bclip_fast._cpu")
    one = torch.zeros(32, 32)
    place = one.data_ptr()
    with pytest.raises(ValueError, match="transposed left operand"):
        _cpu.linear(2, 3, 4, place, False, place, True, True, 0, place, True, place, place, 1)


@pytest.fixture
def one_kernel(monkeypatch):
    """The backend "torch" of linear_gelu on the CPU, through the graphs of torch.compile without its code."""
    monkeypatch.setitem(activated.LIMITS, "torch", lambda *inputs: None)
    monkeypatch.setattr(activated, "_compiled", lambda: torch.compile(activated._definition, backend="aot_eager"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_linear_gelu_is_as_accurate_as_eager(backend, dtype, one_kernel):
    def draw():
        return [torch.randn(size).bfloat16().to(dtype) for size in ((33, 40), (65, 40), (65,))]

    def definition(x, weight, bias):
        return F.gelu(F.linear(x, weight, bias))

    assert_as_accurate_as_eager(lambda *leaves: ops.linear_gelu(*leaves, backend=backend), definition, draw, None)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_linear_gelu_under_autocast_and_compile_keeps_its_result(backend, one_kernel):
    x, weight, bias = inputs((9, 40, 24))
    weight, bias = weight.float().requires_grad_(), bias.float().requires_grad_()

    def call(x):
        return ops.linear_gelu(x, weight, bias, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [ops.gelu(ops.linear(x, weight, bias)), call(x.float()), compiled(x.float())]
    for output in outputs:
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, outputs[0], rtol=2**-7, atol=2**-7)
        (gradient,) = torch.autograd.grad(output.sum(), weight)
        assert gradient.dtype == torch.float32


def test_linear_gelu_in_one_kernel_is_named_or_measured_never_assumed(one_kernel, monkeypatch, unmeasured):
    x, weight, bias = inputs((9, 40, 24))
    assert dispatch.explain(lambda: ops.linear_gelu(x, weight, bias)).chosen == "reference"
    key = "linear_gelu", "bfloat16", "few rows"
    record = Record(fingerprint.fingerprint("cpu", 0), entries={key: Entry(("torch", "reference"))})
    with tuning.in_force({"cpu": record}):
        assert dispatch.explain(lambda: ops.linear_gelu(x, weight, bias)).chosen == "torch"
    monkeypatch.undo()
    with pytest.raises(ops.BackendError, match=r"linear_gelu cannot run: torch: .*(not installed|device is cpu)"):
        ops.linear_gelu(x, weight, bias, backend="torch")
    with pytest.raises(ValueError, match="x must be"):
        ops.linear_gelu(x, weight[:, 1:], bias)


def test_linear_gelu_in_one_kernel_refuses_second_derivatives(one_kernel):
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)

    def call(x):
        return ops.linear_gelu(x, weight, bias, backend="torch").sum()

    for derivative in (torch.func.grad(call), lambda x: torch.func.jvp(call, (x,), (x,))):
        with pytest.raises(NotImplementedError, match='linear_gelu is .* pass backend="reference"'):
            derivative(x)
    # torch refuses these itself, in the first backward pass or in the second.
    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):
        torch.autograd.functional.hessian(call, x)

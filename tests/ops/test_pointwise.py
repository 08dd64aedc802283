from __future__ import annotations

from functools import partial

import formulas
import pytest
import torch
import torch.nn.functional as F
from judged import joined
from oracle import assert_as_accurate_as_eager, every_backend, every_backend_and
from pairwise import pairwise
from torch import Tensor

from bclip_fast import ops
from bclip_fast.ops.pointwise import _add_norm, _gelu, reference

SHAPES = [
    (5, 768),
    (197, 64),
    (33, 50),
    (9, 3),
    (70, 17),
    (0, 32),
]  # (T, D); some aren't multiples of a vector or block
EPS = 1e-6
PLAIN = "torch", "reference"  # backends of plain torch code, which round as torch does


def inputs(shape: tuple[int, int], stream: torch.dtype, branch: torch.dtype | None) -> list[Tensor]:
    tensors = [torch.randn(shape).to(stream), torch.rand(shape[1]) + 0.5, torch.randn(shape[1])]
    return tensors if branch is None else [tensors[0], torch.randn(shape).to(branch), *tensors[1:]]


# The dtypes of stream and branch.
STREAMS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, None),
]
KERNELS = [
    (backend, *dtypes)
    for dtypes in STREAMS
    for backend in every_backend("pointwise", torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32)
]


@pairwise(backend_and_stream_and_branch=KERNELS, shape=SHAPES, post=[False, True], dropout_p=[0.0, 0.3])
def test_add_norm_is_as_accurate_as_eager(backend, stream, branch, shape, post, dropout_p, nan_filled):
    if 0 in shape:
        tensors = inputs(shape, stream, branch)
        with torch.no_grad():
            assert ops.add_norm(tensors[0], None, *tensors[-2:], EPS, backend=backend)[0].shape == shape
        return
    low = branch or stream
    seed = torch.tensor(2**40 + 5)

    def run(call):
        def function(x, *rest):
            y, weight, bias = rest if branch is not None else (None, *rest)
            return joined(call(x, y, weight, bias))

        return function

    def definition(x, y, weight, bias):
        normed, total = reference.add_norm(x, y, weight, bias, EPS, dropout_p if y is not None else 0.0, seed)
        # Eager code under autocast also rounds the norm's result, for the next matmul.
        rounded = normed.to(low) if x.dtype == stream else normed
        return rounded, normed if post else total

    def kernel(x, y, weight, bias):
        options = {"dropout_p": dropout_p, "seed": seed, "post": post, "dtype": low, "backend": backend}
        return ops.add_norm(x, y, weight, bias, EPS, **options)

    formula = formulas.add_norm(EPS, dropout_p, seed, post, low)
    draw = partial(inputs, shape, stream, branch)
    assert_as_accurate_as_eager(run(kernel), run(definition), draw, None if backend in PLAIN else formula)


@pairwise(backend_and_dtype=every_backend_and("pointwise", torch.float32, torch.bfloat16))
def test_gelu_is_as_accurate_as_torchs(backend, dtype, nan_filled):
    every = torch.linspace(-20, 20, 70001)
    special = torch.tensor([0.0, -0.0, 1e-30, -1e4, 1e4])
    formula = None if backend in PLAIN else formulas.gelu
    for x in (every, every[30_000:40_000], special, every[:3, None]):
        assert_as_accurate_as_eager(
            lambda x: ops.gelu(x, backend=backend), F.gelu, lambda x=x: [x.to(dtype)], formula, draws=1
        )
    assert ops.gelu(torch.tensor([float("nan")], dtype=dtype), backend=backend).isnan()
    infinite = torch.full((40,), float("inf"), dtype=dtype)  # several vectors and a part of one
    # For infinity, torch's vectorized code gives NaN, but its scalar code doesn't.
    out = ops.gelu(infinite, backend=backend)
    assert torch.equal(out, infinite) if backend == "cpu" else not out.isfinite().any()


@pytest.mark.parametrize("backend", every_backend("pointwise", torch.bfloat16))
def test_autocast_changes_no_result(backend):
    """torch's own autocast would compute and return the norm of a bfloat16 stream in float32."""
    tensors = inputs((5, 40), torch.bfloat16, torch.bfloat16)
    plain = ops.add_norm(*tensors, EPS, post=True, backend=backend), ops.gelu(tensors[0], backend=backend)
    with torch.autocast("cpu", torch.float16):
        cast = ops.add_norm(*tensors, EPS, post=True, backend=backend), ops.gelu(tensors[0], backend=backend)
    for one, two in zip((*plain[0], plain[1]), (*cast[0], cast[1]), strict=True):
        assert one.dtype == two.dtype == torch.bfloat16 and torch.equal(one, two)


@pytest.mark.parametrize("backend", every_backend("pointwise"))
def test_norm_of_a_row_far_from_zero_keeps_its_digits(backend):
    weight, bias = torch.ones(768), torch.zeros(768)
    assert_as_accurate_as_eager(
        lambda x: ops.add_norm(x, None, weight, bias, 1e-12, backend=backend)[0],
        lambda x: F.layer_norm(x, (768,), weight.to(x), bias.to(x), 1e-12),
        lambda: [300 + torch.randn(4, 768)],
        None,
    )


def test_dropout_follows_philox_and_keeps_its_share():
    # Random123's known answer for counter and key zero.
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for word, share in zip(words, [w / 2**32 for w in words], strict=True):
        column = words.index(word)
        assert reference.dropout_mask(1, 4, share - 1e-6, torch.tensor(0))[0, column]
        assert not reference.dropout_mask(1, 4, share + 1e-6, torch.tensor(0))[0, column]
    kept = reference.dropout_mask(500, 768, 0.1, torch.tensor(7))
    assert kept.float().mean() == pytest.approx(0.9, abs=0.002)
    assert not torch.equal(kept, reference.dropout_mask(500, 768, 0.1, torch.tensor(8)))


@pytest.mark.parametrize("backend", every_backend("pointwise"))
def test_dropout_without_a_seed_follows_torchs_generator(backend):
    tensors = [*inputs((40, 96), torch.float32, torch.float32), EPS]
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(ops.add_norm(*tensors, dropout_p=0.4, backend=backend)[1])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    dropped = results[0] == tensors[0]
    assert 0.3 < dropped.float().mean() < 0.5
    torch.testing.assert_close((results[0] - tensors[0])[~dropped], tensors[1][~dropped] / 0.6)


def test_number_of_threads_does_not_change_results():
    tensors = [tensor.requires_grad_() for tensor in inputs((500, 96), torch.float32, torch.bfloat16)]
    grads, before = [], torch.get_num_threads()
    try:
        for threads in (9, 3):
            torch.set_num_threads(threads)
            output = joined(ops.add_norm(*tensors, EPS, dropout_p=0.1, seed=3, backend="cpu"))
            grads.append(torch.autograd.grad(output.square().sum(), tensors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*grads, strict=True))


def test_strided_inputs_give_the_same_results():
    x, y, weight, bias = inputs((12, 40), torch.float32, torch.float32)
    plain = ops.add_norm(x, y, weight, bias, EPS, backend="cpu")[0]
    strided = x.T.contiguous().T.requires_grad_()
    assert torch.equal(ops.add_norm(strided, y, weight, bias, EPS, backend="cpu")[0], plain)
    ops.add_norm(strided, y, weight, bias, EPS, backend="cpu")[0].T.sum(1)[0].backward()
    assert strided.grad.isfinite().all()


def test_opcheck_accepts_the_registration():
    x, y, weight, bias = (tensor.requires_grad_() for tensor in inputs((6, 40), torch.float32, torch.bfloat16))
    for branch, wide in ((y, True), (y, False), (None, True)):
        arguments = (x, branch, weight, bias, EPS, 0.1 if wide else 0.0, torch.tensor(3) if wide else None)
        torch.library.opcheck(_add_norm, (*arguments, torch.bfloat16, wide, "cpu"))
    torch.library.opcheck(_gelu, (x, "cpu"))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compile_has_no_graph_break(backend):
    x, y, weight, bias = inputs((6, 40), torch.float32, torch.bfloat16)

    def layer(x, y):
        normed, stream = ops.add_norm(x, y, weight, bias, EPS, dtype=torch.bfloat16, backend=backend)
        return ops.gelu(normed, backend=backend) + stream

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), layer(x, y))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, w: ops.add_norm(x[0], None, w, w, EPS), "stream must be"),
        (lambda x, w: ops.add_norm(x, x[:1], w, w, EPS), "branch must have the stream's shape"),
        (lambda x, w: ops.add_norm(x, None, w[1:], w, EPS), "weight and bias must be"),
        (lambda x, w: ops.add_norm(x, x, w, w, EPS, dropout_p=1.0), "dropout_p"),
        (lambda x, w: ops.gelu(x.long()), "floating point"),
    ],
)
def test_bad_argument_raises_an_error_that_names_it(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2, 4), torch.zeros(4))


def test_named_backend_is_never_replaced():
    x = torch.zeros(2, 4, dtype=torch.float64)
    with pytest.raises(ops.BackendError, match="float64"):
        ops.gelu(x, backend="cpu")
    with pytest.raises(ops.BackendError, match="float64"):
        ops.add_norm(x, None, x[0], x[0], EPS, backend="cpu")

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from judged import bounds_of, judge_attention
from oracle import every_backend, every_backend_and
from pairwise import pairwise

from bclip_fast import ops
from bclip_fast.ops import philox
from bclip_fast.ops.attention import reference
from bclip_fast.ops.attention.call import AttentionCall

SHAPES = [(2, 197, 3, 64), (1, 1, 1, 32), (3, 13, 2, 64)]  # (B, N, H, d): BiomedCLIP's shape, one token, primes
BACKENDS = every_backend_and("attention", torch.float32, torch.bfloat16)
LENGTHS = [[5, 1, 0, 17], [0, 0], [256, 1, 33, 78, 64], []]


def sdpa(qkv, key_mask=None, causal=False):
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal).transpose(1, 2)


def seed_of(dropout_p):
    return torch.tensor(-(2**40) + 12345) if dropout_p else None


@pairwise(
    backend_and_dtype=BACKENDS,
    shape=SHAPES,
    masked=[False, True],
    causal=[False, True],
    dropout_p=[0.0, 0.3],
)
def test_fused_attention_is_as_accurate_as_eager(backend, dtype, shape, masked, causal, dropout_p, nan_filled):
    batch, tokens, heads, dim = shape
    mask = torch.rand(batch, tokens) < 0.7 if masked else None
    options = {"causal": causal, "dropout_p": dropout_p, "seed": seed_of(dropout_p)}

    def kernel(qkv):
        return ops.fused_attention(qkv.unflatten(0, (batch, tokens)), mask, **options, backend=backend).flatten(0, 1)

    definition = None, mask if mask is None else mask.flatten(), tokens, *options.values(), dim**-0.5
    judge_attention(kernel, definition, (batch * tokens, heads, dim), dtype)


@pairwise(
    backend_and_dtype=BACKENDS,
    lengths=LENGTHS,
    causal=[False, True],
    dropout_p=[0.0, 0.3],
)
def test_varlen_attention_is_as_accurate_as_eager(backend, dtype, lengths, causal, dropout_p, nan_filled):
    seed, bounds = seed_of(dropout_p), bounds_of(lengths)
    options = {"causal": causal, "dropout_p": dropout_p, "seed": seed, "scale": 0.3, "backend": backend}
    if not sum(lengths):
        qkv = torch.zeros(0, 3, 2, 64, dtype=dtype)
        assert ops.varlen_attention(qkv, bounds, 9, **options).shape == (0, 2, 64)
        return
    judge_attention(
        lambda qkv: ops.varlen_attention(qkv, bounds, 300, **options),
        (bounds, None, 300, causal, dropout_p, seed, 0.3),
        (sum(lengths), 2, 64),
        dtype,
    )


@pytest.mark.parametrize("cu_seqlens", [None, bounds_of([5, 1, 0, 8])], ids=["dense", "varlen"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("causal", [False, True])
def test_reference_formulas_give_the_gradient_of_the_definition(cu_seqlens, dropout_p, causal):
    qkv = torch.randn(14, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(14) % 3 > 0 if cu_seqlens is None else None
    inputs = cu_seqlens, mask, 7 if cu_seqlens is None else 9, causal, dropout_p, seed_of(dropout_p), 0.7
    truth = reference.attention(AttentionCall(qkv, *inputs))
    upstream = torch.randn_like(truth)
    call = AttentionCall(qkv.detach(), *inputs)
    out, lse = reference.forward(call)
    torch.testing.assert_close(out, truth.detach(), rtol=1e-13, atol=1e-13)
    actual = reference.backward(call, upstream, out, lse)
    torch.testing.assert_close(actual, torch.autograd.grad(truth, qkv, upstream)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_equals_scaled_dot_product_attention(causal):
    qkv = torch.randn(2, 11, 3, 2, 16, dtype=torch.float64)
    torch.testing.assert_close(ops.fused_attention(qkv, causal=causal, backend="reference"), sdpa(qkv, None, causal))
    mask = torch.arange(11) < torch.tensor([[4], [11]])
    if not causal:
        torch.testing.assert_close(ops.fused_attention(qkv, mask), sdpa(qkv, mask))


@pairwise(backend_and_dtype=BACKENDS)
def test_row_without_keys_is_zero_and_has_no_gradient(backend, dtype, nan_filled):
    qkv = torch.randn(2, 5, 3, 2, 32).to(dtype).requires_grad_()
    mask = torch.tensor([[True] * 5, [False] * 5])
    out = ops.fused_attention(qkv, mask, backend=backend)
    out.sum().backward()
    assert (out[1] == 0).all()
    assert (qkv.grad[1] == 0).all()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's kat_vectors, philox4x32 of 10 rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, words):
    assert [int(word) for word in philox.philox(tuple(map(torch.tensor, counter)), tuple(key))] == words


@pytest.mark.parametrize("backend", every_backend("attention"))
def test_dropout_drops_the_same_weights_in_every_backend(backend):
    # With zero keys and the unit matrix as values, the output is the weights themselves: 1/N or 0 here.
    lengths, heads, seed = [32, 5, 17], 3, torch.tensor(2**33 + 7)
    qkv = torch.zeros(sum(lengths), 3, heads, 32)
    bounds = bounds_of(lengths)
    for start, length in zip(bounds, lengths, strict=False):
        qkv[start : start + length, 2] = torch.eye(length, 32)[:, None]
    out = ops.varlen_attention(qkv, bounds, 32, dropout_p=0.25, seed=seed, backend=backend)
    for start, length in zip(bounds.tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        call = AttentionCall(qkv, bounds, None, 32, False, 0.25, seed, 1.0)
        mask = reference.dropout_mask(call, rows, (1, length), qkv.dtype)[0].transpose(0, 1)
        torch.testing.assert_close(out[rows, :, :length], (mask / length).float())
        assert 0.5 < (mask > 0).double().mean() < 0.95


def test_dropout_keeps_the_mean_and_is_seeded():
    qkv = torch.randn(1, 64, 3, 4, 16)
    torch.manual_seed(1)
    first, second = (ops.fused_attention(qkv, dropout_p=0.3) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, ops.fused_attention(qkv, dropout_p=0.3))
    assert torch.equal(*(ops.fused_attention(qkv, dropout_p=0.3, seed=seed) for seed in (5, torch.tensor(5))))
    mean = torch.stack([ops.fused_attention(qkv, dropout_p=0.3) for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, ops.fused_attention(qkv), atol=0.12, rtol=0)


def test_checkpointing_drops_the_same_weights_again():
    qkv = torch.randn(2, 9, 3, 2, 16)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        leaf = qkv.clone().requires_grad_()
        attend = partial(ops.fused_attention, dropout_p=0.5)
        out = torch.utils.checkpoint.checkpoint(attend, leaf, use_reentrant=False) if checkpointed else attend(leaf)
        grads.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", every_backend("attention"))
@pytest.mark.parametrize("varlen", [False, True])
def test_opcheck_accepts_the_registration(backend, varlen):
    qkv = torch.randn(12, 3, 2, 32, requires_grad=True)
    mask = None if varlen else torch.arange(12) % 5 > 0
    inputs = bounds_of([7, 5]) if varlen else None, mask, 7 if varlen else 6, True, 0.2, torch.tensor(3), 0.5, backend
    torch.library.opcheck(torch.ops.bclip.attention.default, (qkv, *inputs))
    saved = torch.randn(12, 2, 32), *torch.ops.bclip.attention(qkv.detach(), *inputs)
    torch.library.opcheck(torch.ops.bclip.attention_backward.default, (*saved, qkv.detach(), *inputs))


@pytest.mark.parametrize("backend", every_backend("attention"))
def test_compile_has_no_graph_break(backend):

    def attend(qkv):
        return ops.fused_attention(qkv, dropout_p=0.1, seed=4, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    qkv = torch.randn(2, 7, 3, 2, 32, requires_grad=True)
    torch.testing.assert_close(compiled(qkv), attend(qkv))
    grads = [torch.autograd.grad(function(qkv).square().sum(), qkv)[0] for function in (compiled, attend)]
    torch.testing.assert_close(*grads)


def test_compile_with_dynamic_shapes_makes_one_graph():
    compiles = 0

    def count(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph

    # Batches of a training run differ in their lengths, in the number of sequences and in the longest one.
    batches = [[5, 9, 2], [11, 3, 8, 4], [2, 2], [7, 30, 1]]
    compiled = torch.compile(
        lambda qkv, bounds, longest: ops.varlen_attention(qkv, bounds, longest, dropout_p=0.1),
        fullgraph=True,
        dynamic=True,
        backend=count,
    )
    for lengths in batches:
        qkv = torch.randn(sum(lengths), 3, 2, 32)
        torch.manual_seed(0)
        out = compiled(qkv, bounds_of(lengths), max(lengths))
        torch.manual_seed(0)
        torch.testing.assert_close(out, ops.varlen_attention(qkv, bounds_of(lengths), max(lengths), dropout_p=0.1))
    assert compiles == 1


QKV = torch.zeros(4, 3, 1, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.fused_attention(torch.zeros(2, 3, 4)), "qkv must be"),
        (lambda: ops.fused_attention(torch.zeros(2, 3, 3, 1, 4, dtype=torch.long)), "qkv must be floating point"),
        (lambda: ops.fused_attention(torch.zeros(2, 3, 3, 1, 4), torch.ones(2, 4, dtype=torch.bool)), "key_mask"),
        (lambda: ops.fused_attention(torch.zeros(2, 3, 3, 1, 4), torch.ones(2, 3)), "bool"),
        (lambda: ops.fused_attention(torch.zeros(2, 3, 3, 1, 4), dropout_p=1.0), "dropout_p"),
        (lambda: ops.fused_attention(torch.zeros(2, 3, 3, 1, 4), seed=torch.zeros(1), dropout_p=0.1), "seed"),
        (lambda: ops.varlen_attention(QKV, torch.tensor([0, 4]), 4), "int32"),
        (lambda: ops.varlen_attention(QKV, torch.tensor([[0, 4]], dtype=torch.int32), 4), "cu_seqlens"),
        (lambda: ops.varlen_attention(QKV, bounds_of([3]), 4), "cu_seqlens"),
        (lambda: ops.varlen_attention(QKV, bounds_of([4]), 3), "max_seqlen"),
        (lambda: ops.varlen_attention(QKV[:0], bounds_of([]), -1), "max_seqlen is -1"),
        (lambda: ops.fused_attention(torch.zeros(2, 3, 3, 1, 0)), "head dimension of at least 1"),
        (lambda: ops.varlen_attention(QKV, bounds_of([6, -2]), 9), "cu_seqlens"),
    ],
)
def test_bad_argument_raises_an_error_that_names_it(call, words):
    with pytest.raises(ValueError, match=words):
        call()

"""The oracle with the definition and the formula of each operator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import formulas
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as_eager
from targets import dense, dense_siglip
from torch import Tensor

from bclip_fast import ops
from bclip_fast.ops.attention import reference
from bclip_fast.ops.attention.call import AttentionCall, SingleQueryCall
from bclip_fast.ops.attention.single_query import reference as single_query
from bclip_fast.ops.contrastive import reference as contrastive
from bclip_fast.ops.contrastive.call import ContrastiveCall, SoftmaxGradient

Draw = Callable[[], Sequence[Tensor]]


def judge_attention(
    kernel: Callable[[Tensor], Tensor], options: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Judges `kernel`, a function of qkv (T, 3, H, d).

    Args:
        options: the fields of `AttentionCall` after qkv.
        shape: (T, H, d).
    """
    assert_as_accurate_as_eager(
        lambda *parts: kernel(torch.stack(parts, 1)),
        lambda *parts: reference.attention(AttentionCall(torch.stack(parts, 1), *options)),
        lambda: [torch.randn(shape).to(dtype) for _ in range(3)],
        formulas.attention(options),
    )


SEED = torch.tensor(-(2**40) + 12345)


def bounds_of(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens of sequences with these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def judge_attention_operator(
    backend: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
) -> None:
    """Judges `bclip::attention` with `shape` (T, H, d), and compares its log-sum-exps with the reference."""
    options = cu_seqlens, key_mask, max_seqlen, causal, dropout_p, SEED if dropout_p else None, 0.2
    judge_attention(lambda qkv: torch.ops.bclip.attention(qkv, *options, backend)[0], options, shape, dtype)
    qkv = torch.randn(shape[0], 3, *shape[1:]).to(dtype)
    lse = torch.ops.bclip.attention(qkv, *options, backend)[1]
    truth = reference.forward(AttentionCall(qkv.double(), *options))[1]
    torch.testing.assert_close(lse.double(), truth, rtol=1e-5, atol=1e-5)


def judge_longer_sequence(backend: Any, dtype: torch.dtype, causal: bool, dim: int = 64) -> None:
    """On a GPU nothing checks lengths, so a sequence may be longer than `max_seqlen`.

    `backend`, a module, takes only the first `max_seqlen` of its rows, and writes nothing for the others. Needs the
    fixture nan_filled.
    """
    longest, lengths = 60, [5, 300, 7]
    inside = torch.arange(sum(lengths))
    inside = (inside < 5 + longest) | (inside >= 305)
    qkv, upstream = torch.randn(sum(lengths), 3, 1, dim).to(dtype), torch.randn(sum(lengths), 1, dim).to(dtype)
    results = []
    for rows, bounds in ((slice(None), bounds_of(lengths)), (inside, bounds_of([5, longest, 7]))):
        call = AttentionCall(qkv[rows], bounds, None, longest, causal, 0.0, None, 0.2)
        out, lse = backend.forward(call)
        results.append((out, lse.T, backend.backward(call, upstream[rows], out, lse)))
    for longer, right in zip(*results, strict=True):
        assert torch.equal(longer[inside], right)
        assert longer[~inside].isnan().all()


def judge_single_query_attention(
    kernel: Callable[[Tensor, Tensor], Tensor],
    options: tuple[Any, ...],
    num_rows: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Judges `kernel`, a function of queries (n, H, d) and keys and values (T, 2, H, d).

    Args:
        options: the fields of `SingleQueryCall` after key_value.
        num_rows: T.
        shape: (n, H, d).
    """
    assert_as_accurate_as_eager(
        lambda query, *pairs: kernel(query, torch.stack(pairs, 1)),
        lambda query, *pairs: single_query.attention(SingleQueryCall(query, torch.stack(pairs, 1), *options)),
        lambda: [torch.randn(rows, *shape[1:]).to(dtype) for rows in (shape[0], num_rows, num_rows)],
        formulas.single_query_attention(options),
        # Few sequences of hundreds of keys have too few queries for the smallest factor.
        4 if num_rows > 300 else None,
    )


def judge_clip_loss(
    kernel: Callable[..., Tensor],
    draw: Draw,
    same: Tensor | None = None,
    hardness: float = 0.0,
    draws: int | None = None,
) -> None:
    """Judges `kernel`, a function of image, text, scale and perhaps a bias.

    `same` (b, B) marks the positives. By default image i belongs to text i.
    """
    definition = contrastive.dense if same is None else lambda *inputs: dense(*inputs, same, hardness)
    assert_as_accurate_as_eager(kernel, definition, draw, formulas.clip_loss(same, hardness), draws)


def judge_siglip_loss(
    kernel: Callable[..., Tensor], draw: Draw, same: Tensor | None = None, draws: int | None = None
) -> None:
    """Judges `kernel`, a function of image, text, scale and bias."""
    definition = contrastive.dense_siglip if same is None else lambda *inputs: dense_siglip(*inputs, same)
    assert_as_accurate_as_eager(kernel, definition, draw, formulas.siglip_loss(same), draws)


def features(num_rows: int, width: int, dtype: torch.dtype = torch.float32, aligned: Tensor | None = None) -> Tensor:
    """Random rows of length 1, near `aligned` if that is given."""
    rows = torch.randn(num_rows, width, dtype=torch.float64)
    return F.normalize(rows if aligned is None else aligned + 0.1 * rows).to(dtype)


def judge_clip_operator(backend: str, shape: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    """Judges `ops.clip_loss` of features with `shape` (b, D)."""
    judge_clip_loss(
        lambda *a: ops.clip_loss(*a, chunk_size=67, backend=backend),
        lambda: [features(*shape, dtype), features(*shape, dtype), torch.tensor(scale), torch.tensor(-3.0)],
    )


def judge_siglip_operator(backend: str, shape: tuple[int, int], dtype: torch.dtype, rtol: float) -> None:
    """Judges `ops.siglip_loss` of features with `shape` (b, D), and compares the loss without gradients."""
    scalars = [torch.tensor(10.0), torch.tensor(-10.0)]
    inputs = [features(*shape, dtype), features(*shape, dtype), *scalars]
    judge_siglip_loss(
        lambda *a: ops.siglip_loss(*a, chunk_size=67, backend=backend),
        lambda: [features(*shape, dtype), features(*shape, dtype), *scalars],
    )
    with torch.no_grad():
        loss = ops.siglip_loss(*inputs, backend=backend)
    truth = contrastive.dense_siglip(*(tensor.double() for tensor in inputs))
    torch.testing.assert_close(loss.double(), truth, rtol=rtol, atol=0)


def assert_close(results: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> None:
    """Asserts that the norm of each error is at most `tolerance` of the truth's norm, where the truth is finite."""
    for result, true in zip(results, truth, strict=True):
        finite = true.isfinite()
        assert torch.equal(result[~finite].double(), true[~finite])
        assert (result[finite].double() - true[finite]).norm() <= tolerance * true[finite].norm() + 1e-12


def judge_rectangle(
    backend: ModuleType,
    draw: Callable[[int, int], Tensor],
    positive_offset: int | None,
    chunk_size: int,
    tolerance: float,
) -> None:
    """Compares all functions of a contrastive backend with the reference, for 41 images against 151 texts.

    The features are slices of wider tensors.

    Args:
        draw: function that draws features of (rows, width).
        tolerance: tolerance of the gradients.
    """
    text = F.pad(draw(151, 23), (0, 3))[:, :23]
    image = F.pad(draw(41, 23), (0, 5))[:, :23]
    scale, bias, weight = torch.tensor(30.0), torch.tensor(-2.0), torch.tensor(-0.3)
    call = ContrastiveCall(image, text, scale, positive_offset, chunk_size, bias=bias)
    wide = image.double(), text.double(), scale.double()
    exact_call = ContrastiveCall(*wide, positive_offset, 64, bias=bias.double())
    sums = contrastive.forward(exact_call)
    assert_close(backend.forward(call), sums, 1e-6)
    # Some rows and columns have no loss.
    rows_lse, columns_lse = sums[0] + 0.5, sums[1] + 1
    rows_lse[3:9], columns_lse[::5] = torch.inf, torch.inf
    upstream = SoftmaxGradient(rows_lse, columns_lse, weight, torch.randn(41) / 10)
    truth = contrastive.backward(exact_call, replace(upstream, weight=weight.double()), torch.float64)
    assert_close(backend.backward(call, upstream, torch.float32), truth, tolerance)
    truth = contrastive.siglip(exact_call, 0.1, torch.float64, True)
    assert_close(backend.siglip(call, 0.1, torch.float32, True), truth, tolerance)
    assert_close(backend.siglip(call, 0.1, torch.float32, False)[:1], truth[:1], 1e-6)


def joined(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """Both outputs, weighted differently, so that swapped gradients fail."""
    return torch.cat([outputs[0].to(outputs[1].dtype), 0.5 * outputs[1]])

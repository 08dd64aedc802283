"""Cases of attention: images of one length, and captions of different lengths."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast import ops
from bclip_fast.ops import attention
from bclip_fast.ops.attention import cuda as attention_cuda
from bclip_fast.ops.attention.call import AttentionCall
from bclip_fast.ops.attention.reference import attention as reference_attention

from .case import DEVICE, Case, Contender, Inputs, Unavailable, ours, peer, with_gradients

# Caption lengths in PubMedBERT tokens, cut to 256: every 34th of 558 captions of PMC articles. Like those of all 558,
# their mean is 78 tokens.
CAPTION_TOKENS = [256, 77, 107, 28, 93, 19, 51, 18, 154, 65, 32, 15, 7, 51, 256, 12]


def attention_case(
    name: str, batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, dropout_p: float = 0.0
) -> Case:
    """Return a case of `batch` sequences with `tokens` tokens each."""
    seed = torch.tensor(1) if dropout_p else None

    def truth(qkv: Tensor) -> Tensor:
        call = AttentionCall(qkv.flatten(0, 1), None, None, tokens, False, dropout_p, seed, dim**-0.5)
        out = reference_attention(call)
        return out.unflatten(0, (batch, tokens))

    def fused(backend: str) -> Contender:
        return with_gradients(lambda qkv: ops.fused_attention(qkv, dropout_p=dropout_p, seed=seed, backend=backend))

    def smaller_blocks() -> Contender:
        """The backend cuda as on devices with 99 KiB of shared memory: chunks of 128 keys, two blocks at once."""
        if dim != 64 or tokens <= 128:
            raise Unavailable("the backend cuda has one size of blocks for this shape")
        run = our_backends["ours:cuda"]()

        def with_little_memory(*inputs: Any) -> Any:
            with mock.patch.object(attention_cuda, "cuda_block_bytes", return_value=99 * 1024):
                return run(*inputs)

        return with_little_memory

    operand = torch.zeros(1, 3, 1, dim, dtype=dtype, device=DEVICE)
    our_backends = ours(attention.LIMITS, fused, operand, dropout_p, False, False, tokens)
    return Case(
        **_common(name, (batch, tokens), heads, dim, dtype, batch * tokens**2),
        truth=with_gradients(truth),
        contenders={
            **our_backends,
            "ours:cuda, two blocks": smaller_blocks,
            "torch sdpa": lambda: _comparable(lambda qkv: _sdpa(qkv, dropout_p), dropout_p),
        },
    )


def varlen_case(
    name: str, lengths: Sequence[int], heads: int, dim: int, dtype: torch.dtype, dropout_p: float = 0.0
) -> Case:
    """Return a case of sequences without padding. The peers pad and mask them, or process them one by one."""
    longest, total = max(lengths), sum(lengths)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(DEVICE)
    seed = torch.tensor(1) if dropout_p else None

    def truth(qkv: Tensor) -> Tensor:
        return reference_attention(AttentionCall(qkv, bounds, None, longest, False, dropout_p, seed, dim**-0.5))

    def padded(qkv: Tensor) -> Tensor:
        rectangle = qkv.new_zeros(len(lengths), longest, 3, heads, dim)
        rectangle[mask] = qkv
        return _sdpa(rectangle, dropout_p, mask[:, None, None])[mask]

    def one_by_one(qkv: Tensor) -> Tensor:
        return torch.cat([_sdpa(sequence[None], dropout_p)[0] for sequence in qkv.split(list(lengths))])

    def varlen_attn() -> Contender:
        if DEVICE.type == "cpu":
            raise Unavailable(f"torch {torch.__version__} has no CPU kernel behind varlen_attn")
        if dropout_p:
            raise Unavailable("varlen_attn has no dropout")
        varlen = peer(lambda: importlib.import_module("torch.nn.attention.varlen")).varlen_attn
        return with_gradients(lambda qkv: varlen(*qkv.unbind(1), bounds, bounds, longest, longest))

    def packed(backend: str) -> Contender:
        options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "backend": backend}
        return with_gradients(lambda qkv: ops.varlen_attention(qkv, bounds, longest, **options))

    operand = torch.zeros(1, 3, 1, dim, dtype=dtype, device=DEVICE)
    return Case(
        **_common(name, (total,), heads, dim, dtype, sum(length**2 for length in lengths)),
        truth=with_gradients(truth),
        contenders={
            **ours(attention.LIMITS, packed, operand, dropout_p, True, False, longest),
            "torch sdpa padded": lambda: _comparable(padded, dropout_p),
            "torch sdpa one by one": lambda: _comparable(one_by_one, dropout_p),
            "torch varlen_attn": varlen_attn,
        },
    )


def _common(
    name: str, tokens: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype, num_scores: int
) -> dict[str, Any]:
    """Return the fields that both kinds of cases share.

    tokens: leading dimensions of qkv. num_scores: number of (query, key) pairs for one head.
    """

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(*tokens, 3, heads, dim, generator=generator)
        return [qkv.to(DEVICE, dtype).requires_grad_()]

    return dict(
        operator="attention",
        name=name,
        make_inputs=make_inputs,
        # The forward pass has 2 matmuls and the backward pass 5, one of which recomputes the scores.
        flops=3.5 * 4 * num_scores * heads * dim,
        bytes=8 * torch.Size(tokens).numel() * heads * dim * torch.finfo(dtype).bits / 8,
        dtype=dtype,
    )


def _sdpa(qkv: Tensor, dropout_p: float, mask: Tensor | None = None) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)
    return out.transpose(1, 2)


def _comparable(function: Callable[..., Tensor], dropout_p: float) -> Contender:
    """Return `with_gradients(function)`. With dropout, its results are None, because torch draws another mask."""
    run = with_gradients(function)
    return (lambda *inputs: [None for _ in run(*inputs)]) if dropout_p else run

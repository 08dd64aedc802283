"""The two kinds of transformer layer, pre-norm (ViT, GPT) and post-norm (BERT), on the tokens of all sequences.

Tokens are rows of one (T, D) matrix, so that no row is ever padding. What is added to the stream is handed on beside
it and added by the next norm, `ops.add_norm`, in one pass. Under autocast the stream stays in float32 while each norm
gives what the next matmul takes.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..ops import add_norm, fused_attention, gelu, linear, single_query_attention, varlen_attention

# A checkpoint's configuration is untrusted: these bounds keep it from asking for absurd amounts of memory.
MAX_WIDTH = 16384
MAX_LAYERS = 256
MAX_TOKENS = 65536


def linear_std(width: int) -> float:
    """Spread of a linear layer's initial weights: BERT's and timm's 0.02 at width 768, more in narrow towers.

    With 0.02 at width 128 a text tower needs several times the steps to tell one plane from another.
    """
    return 0.02 * math.sqrt(768 / width)


def check_sizes(where: str, width: int, layers: int, heads: int, mlp_ratio: float) -> None:
    """Raises UserError unless the sizes describe a transformer of sane size."""
    check_range(f"{where}.width", width, 1, MAX_WIDTH)
    check_range(f"{where}.layers", layers, 1, MAX_LAYERS)
    check_range(f"{where}.heads", heads, 1, width)
    if width % heads:
        raise UserError(f"{where}.width {width} is not a multiple of {where}.heads {heads}")
    check_range(f"{where}.mlp_ratio", mlp_ratio, 1.0 / width, 64)


def check_range(name: str, value: float, lowest: float, highest: float) -> None:
    """Raises UserError unless lowest <= value <= highest, and value is a whole number where lowest is an int."""
    kinds = int if isinstance(lowest, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not lowest <= value <= highest:
        whole = "a whole number" if kinds is int else "a number"
        raise UserError(f"{name} is {value!r}; it must be {whole} from {lowest:g} to {highest:g}")


def mlp_width(width: int, mlp_ratio: float) -> int:
    return round(width * mlp_ratio)


class Sequences(NamedTuple):
    """Which rows of a (T, D) matrix attend to one another.

    cu_seqlens: (n + 1,) int32 as in `ops.varlen_attention`, or None where every sequence has max_seqlen tokens.
    causal: a token attends to itself and those before it only.
    """

    max_seqlen: int
    cu_seqlens: Tensor | None = None
    causal: bool = False

    def attend(self, qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
        """(T, 3, H, d) -> (T, H * d)."""
        if self.cu_seqlens is None:
            qkv = qkv.unflatten(0, (-1, self.max_seqlen))
            return fused_attention(qkv, causal=self.causal, dropout_p=dropout_p).flatten(0, 1).flatten(1)
        options = dict(causal=self.causal, dropout_p=dropout_p)
        return varlen_attention(qkv, self.cu_seqlens, self.max_seqlen, **options).flatten(1)  # type: ignore[arg-type]

    def attend_from(self, rows: Tensor, query: Tensor, key_value: Tensor, dropout_p: float = 0.0) -> Tensor:
        """What one token of each sequence, rows (n,), gets: (n, H, d) and (T, 2, H, d) -> (n, H * d)."""
        bounds, step = self.cu_seqlens, self.max_seqlen
        if bounds is None:
            bounds = torch.arange(0, len(key_value) + 1, step, dtype=torch.int32, device=rows.device)
        return single_query_attention(query, key_value, rows, bounds, causal=self.causal, dropout_p=dropout_p).flatten(
            1
        )


class Pooled(NamedTuple):
    """states (n, width): what a tower projected of n inputs, given in their place to be projected again."""

    states: Tensor


class Tower(nn.Module):
    """What the towers have in common: a row of layers between what precedes and what follows them."""

    layers: nn.ModuleList
    grad_checkpointing = False
    offload_activations = False
    """What a layer is recomputed from waits on the host for its backward pass."""
    num_locked = 0
    """Groups that are not trained: what precedes the layers, then the layers one by one, the norm or the attention pool
    behind the last with it."""

    pooled: Tensor | None = None
    """(n, width): what was projected last, if all before the projection is locked and so gives the same again."""

    def lock(self, unlocked: int = 0) -> None:
        """Takes all groups but the last `unlocked` out of training (LiT, arXiv 2111.07991); the projection stays in.

        open_clip's groups. Locked parameters get no gradient, and nothing is kept for a backward pass that ends behind
        them; locked layers stay in evaluation mode, and so do the dropout of the embeddings and that of patches.
        """
        check_range("unlocked groups", unlocked, 0, len(self.layers))
        self.num_locked = 1 + len(self.layers) - unlocked
        for name, parameter in self.named_parameters():
            place = place_of(name, len(self.layers))
            last = place - 1 if name.startswith(("norm.", "pool.")) else place
            parameter.requires_grad_(last >= self.num_locked)
        self.train(self.training)

    def keep(self, states: Tensor) -> Tensor:
        """What is about to be projected, which is kept where that is worth it."""
        if self.num_locked > len(self.layers):
            self.pooled = states.detach()
        return states

    def run(self, layer: nn.Module, *inputs: Any) -> Any:
        """layer(*inputs), in training recomputed in the backward pass where that is set."""
        if not (self.grad_checkpointing and layer.training):
            return layer(*inputs)
        with save_on_cpu(inputs[0].is_cuda) if self.offload_activations else contextlib.nullcontext():
            return checkpoint(layer, *inputs, use_reentrant=False, context_fn=partial(self.contexts, layer))

    def contexts(self, layer: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around a layer that will be recomputed, and around its recomputation."""
        return contextlib.nullcontext(), contextlib.nullcontext()

    def train(self, mode: bool = True) -> Tower:
        super().train(mode and not self.num_locked)
        for layer in self.layers[max(0, self.num_locked - 1) :]:
            layer.train(mode)
        return self


def place_of(name: str, num_layers: int) -> int:
    """Where in a tower a parameter is read: 0 before the layers, i + 1 in layer i, num_layers + 1 behind them."""
    first, _, rest = name.partition(".")
    if first == "layers":
        return int(rest.partition(".")[0]) + 1
    return num_layers + 1 if first in ("norm", "pool", "head", "proj", "projection") else 0


class Norm(nn.LayerNorm):
    """LayerNorm of a sum that may be wider than what it is multiplied with next: `ops.add_norm` with its parameters."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(  # type: ignore[override]
        self, stream: Tensor, branch: Tensor | None = None, dropout_p: float = 0.0, *, post: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(T, D) stream and, unless None, branch -> (normed in the matmuls' dtype, the new stream).

        The new stream is stream + dropout(branch), or, if `post`, that sum normed.
        """
        kind = stream.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        return add_norm(stream, branch, self.weight, self.bias, self.eps, dropout_p=dropout_p, post=post, dtype=dtype)


class Linear(nn.Linear):
    """`ops.linear` with its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class QueryKeyValue(Linear):
    """The projection to queries, keys and values; given `rows`, the queries are of these rows alone."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Any:  # type: ignore[override]
        """(T, D) -> (T, 3 D), or ((n, D), (T, 2 D)) given (n,) rows."""
        if rows is None:
            return super().forward(x)
        sizes = [x.shape[1], 2 * x.shape[1]]
        (query, key_value), (query_bias, bias) = self.weight.split(sizes), self.bias.split(sizes)
        return linear(x[rows], query, query_bias), linear(x, key_value, bias)


def attend(
    qkv: nn.Module, heads: int, normed: Tensor, sequences: Sequences, rows: Tensor | None, dropout_p: float = 0.0
) -> Tensor:
    """(T, D) -> (T, D), or (n, D) of one row of each sequence."""
    if rows is None:
        return sequences.attend(qkv(normed).unflatten(-1, (3, heads, -1)), dropout_p)
    if isinstance(qkv, QueryKeyValue):
        query, key_value = qkv(normed, rows)
    else:  # an adapter around it, such as LoRA's
        whole = qkv(normed)
        query, key_value = whole[rows, : normed.shape[1]], whole[:, normed.shape[1] :]
    query, key_value = query.unflatten(-1, (heads, -1)), key_value.unflatten(-1, (2, heads, -1))
    return sequences.attend_from(rows, query, key_value, dropout_p)


def approximate_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the "quick" GELU with which OpenAI trained CLIP; off by up to 0.02."""
    return x * torch.sigmoid(1.702 * x)


class PreNormLayer(nn.Module):
    """x + proj(attention(norm1(x))), then x + fc2(gelu(fc1(norm2(x)))): the layer of ViT and GPT."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float, quick_gelu: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.activation = approximate_gelu if quick_gelu else gelu
        self.norm1 = Norm(width, norm_eps)
        self.qkv = QueryKeyValue(width)
        self.proj = Linear(width, width)
        self.norm2 = Norm(width, norm_eps)
        self.fc1 = Linear(width, mlp_width(width, mlp_ratio))
        self.fc2 = Linear(mlp_width(width, mlp_ratio), width)

    def forward(
        self, stream: Tensor, branch: Tensor | None, sequences: Sequences, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The layer of x = stream + branch, (T, D) each: again a stream and a branch, whose sum is its output.

        rows: (n,) int64, of each sequence the token whose output is wanted; then the result is (n, D) each. Every token
        is a key of theirs, but the query, the projection and the MLP of the others are never read after the last layer:
        skipping them is exact.
        """
        normed, stream = self.norm1(stream, branch)
        attended = attend(self.qkv, self.heads, normed, sequences, rows)
        if rows is not None:
            stream = stream[rows]
        normed, stream = self.norm2(stream, self.proj(attended))
        return stream, self.fc2(self.activation(self.fc1(normed)))


class PostNormLayer(nn.Module):
    """h = norm1(x + proj(attention(x))), then norm2(h + fc2(gelu(fc1(h)))): the layer of BERT."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        norm_eps: float,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.qkv = QueryKeyValue(width)
        self.proj = Linear(width, width)
        self.norm1 = Norm(width, norm_eps)
        self.fc1 = Linear(width, mlp_width(width, mlp_ratio))
        self.fc2 = Linear(mlp_width(width, mlp_ratio), width)
        self.norm2 = Norm(width, norm_eps)

    def forward(
        self, normed: Tensor, stream: Tensor, sequences: Sequences, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(T, D) twice: x in the matmuls' dtype and in the stream's; the result likewise, or (n, D) of `rows`, as in
        `PreNormLayer`."""
        dropout, attention_dropout = (self.dropout, self.attention_dropout) if self.training else (0.0, 0.0)
        attended = attend(self.qkv, self.heads, normed, sequences, rows, attention_dropout)
        if rows is not None:
            stream = stream[rows]
        normed, stream = self.norm1(stream, self.proj(attended), dropout, post=True)
        return self.norm2(stream, self.fc2(gelu(self.fc1(normed))), dropout, post=True)

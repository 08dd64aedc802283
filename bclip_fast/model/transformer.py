"""The two kinds of transformer layer, pre-norm (ViT, GPT) and post-norm (BERT), and the base class of the towers.

Tokens of all sequences are the rows of one (T, D) matrix, so no row is ever padding. A layer returns its residual
stream and the branch that is still to be added. The next norm, `ops.add_norm`, adds both in one pass. Under autocast
the stream stays in float32, and each norm returns the dtype of the next matmul.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from bclip_fast.errors import UserError
from bclip_fast.ops import (
    add_norm,
    fused_attention,
    gelu,
    linear,
    linear_gelu,
    single_query_attention,
    varlen_attention,
)
from bclip_fast.ops.attention import sdpa
from bclip_fast.ops.dispatch import is_exporting

from .activation import ACTIVATIONS

# A checkpoint's configuration is untrusted. These bounds keep it from requesting absurd amounts of memory.
MAX_WIDTH = 16384
MAX_LAYERS = 256
MAX_TOKENS = 65536


def linear_std(width: int) -> float:
    """Standard deviation of a linear layer's initial weights: BERT's and timm's 0.02 at width 768, more if narrower.

    With 0.02 at width 128, a text tower needs several times as many steps to tell one imaging plane from another.
    """
    return 0.02 * math.sqrt(768 / width)


def check_sizes(section: str, width: int, layers: int, heads: int, mlp_ratio: float) -> None:
    """Raise UserError unless the sizes describe a transformer of reasonable size."""
    check_range(f"{section}.width", width, 1, MAX_WIDTH)
    check_range(f"{section}.layers", layers, 1, MAX_LAYERS)
    check_range(f"{section}.heads", heads, 1, width)
    if width % heads:
        raise UserError(f"{section}.width={width} must be a multiple of {section}.heads={heads}")
    check_range(f"{section}.mlp_ratio", mlp_ratio, 1.0 / width, 64)


def check_range(name: str, value: float, lowest: float, highest: float) -> None:
    """Raise UserError unless lowest <= value <= highest. If `lowest` is an int, the value must be one, too."""
    kinds = int if isinstance(lowest, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not lowest <= value <= highest:
        number = "a whole number" if kinds is int else "a number"
        raise UserError(f"{name}={value!r} must be {number} from {lowest:g} to {highest:g}")


def check_activation(section: str, activation: str, kind: str) -> None:
    """Raise UserError unless a tower of this kind can have the activation of its configuration."""
    if activation not in ("gelu", "gelu_tanh"):
        raise UserError(f"{section}.activation={activation!r} must be gelu or gelu_tanh")
    if activation != "gelu" and kind != "siglip":
        raise UserError(f"{section}.activation={activation!r} requires {section}.kind siglip; {section}.kind is {kind}")


def mlp_width(width: int, mlp_ratio: float) -> int:
    """Width of the hidden layer of an MLP."""
    return round(width * mlp_ratio)


class ClassTokens(NamedTuple):
    """The last token of each of n sequences, if it attends to other tokens than itself and those before it.

    rows: (n,) int64, its row.
    last_visible: (n,) int64, the last row to which it attends, an earlier one. No other token attends to it.
    """

    rows: Tensor
    last_visible: Tensor


class Sequences(NamedTuple):
    """The rows of a (T, D) matrix that attend to one another.

    cu_seqlens: (n + 1,) int32 as in `ops.varlen_attention`, or None if every sequence has max_seqlen tokens.
    causal: a token attends only to itself and to those before it.
    key_mask: (n, max_seqlen) bool, True for a token that others attend to. Only without cu_seqlens, and only in graphs
        for export, which can't remove the padding.
    class_tokens: tokens with a view of their own. Only with cu_seqlens and `causal`.
    """

    max_seqlen: int
    cu_seqlens: Tensor | None = None
    causal: bool = False
    key_mask: Tensor | None = None
    class_tokens: ClassTokens | None = None

    def attend(self, qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Attention of every token: (T, 3, H, d) -> (T, H * d)."""
        if self.cu_seqlens is None:
            qkv = qkv.unflatten(0, (-1, self.max_seqlen))
            return fused_attention(qkv, self.key_mask, causal=self.causal, dropout_p=dropout_p).flatten(0, 1).flatten(1)
        attended = varlen_attention(qkv, self.cu_seqlens, self.max_seqlen, causal=self.causal, dropout_p=dropout_p)
        attended = attended.flatten(1)
        if self.class_tokens is None:
            return attended
        rows = self.class_tokens.rows
        return attended.index_copy(0, rows, self.attend_from(rows, qkv[rows, 0], qkv[:, 1:], dropout_p))

    def attend_from(self, rows: Tensor, query: Tensor, key_value: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Attention of one token of each sequence, rows (n,): (n, H, d) and (T, 2, H, d) -> (n, H * d).

        The rows are those of `class_tokens`, if there are any.
        """
        cu_seqlens, step = self.cu_seqlens, self.max_seqlen
        if cu_seqlens is None and is_exporting() and dropout_p == 0.0:
            visible = self.key_mask
            if self.causal:
                # The row of sequence i is i * step + its column. ONNX has no remainder by a size that isn't constant.
                columns = rows - step * torch.arange(rows.shape[0], device=rows.device)
                before = torch.arange(step, device=rows.device) <= columns[:, None]
                visible = before if visible is None else visible & before
            return sdpa.single_query_dense(query, key_value.unflatten(0, (-1, step)), visible).flatten(1)
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, len(key_value) + 1, step, dtype=torch.int32, device=rows.device)
        if self.class_tokens is not None:
            rows = self.class_tokens.last_visible
        attended = single_query_attention(query, key_value, rows, cu_seqlens, causal=self.causal, dropout_p=dropout_p)
        return attended.flatten(1)


class PreProjection(NamedTuple):
    """Features (n, width) of n inputs, as a tower computed them before its projection.

    A tower takes them in place of the inputs and only projects them.
    """

    states: Tensor


class Tower(nn.Module):
    """Base class of the towers: a list of layers between an embedding and a projection."""

    layers: nn.ModuleList
    grad_checkpointing = False
    offload_activations = False
    """Keep the inputs of recomputed layers on the host until the backward pass."""
    num_locked = 0
    """Number of locked groups, from the input on. The first group precedes the layers, and each layer is a group. The
    final norm or attention pool belongs to the last layer's group."""

    pre_projection: Tensor | None = None
    """(n, width): the features projected last. Set only if everything before the projection is locked, so that the
    same inputs give the same features again."""

    def lock(self, unlocked: int = 0) -> None:
        """Lock all groups except the last `unlocked` (LiT, arXiv 2111.07991). The projection stays trainable.

        The groups are open_clip's. Locked parameters get no gradient, and autograd saves nothing for them. Locked
        layers stay in evaluation mode. Dropout after the embeddings and patch dropout stay off.
        """
        check_range("unlocked groups", unlocked, 0, len(self.layers))
        self.num_locked = 1 + len(self.layers) - unlocked
        for name, parameter in self.named_parameters():
            depth = layer_depth(name, len(self.layers))
            group = depth - 1 if name.startswith(("norm.", "pool.")) else depth
            parameter.requires_grad_(group >= self.num_locked)
        self.train(self.training)

    def store_pre_projection(self, states: Tensor) -> Tensor:
        """Return the features that are about to be projected, after storing them if all layers are locked."""
        if self.num_locked > len(self.layers):
            self.pre_projection = states.detach()
        return states

    def run_layer(self, layer: nn.Module, *inputs: Any) -> Any:
        """Return layer(*inputs). With gradient checkpointing, the backward pass of training recomputes it."""
        if not (self.grad_checkpointing and layer.training):
            return layer(*inputs)
        with save_on_cpu(inputs[0].is_cuda) if self.offload_activations else contextlib.nullcontext():
            return checkpoint(layer, *inputs, use_reentrant=False, context_fn=partial(self.recompute_contexts, layer))

    def recompute_contexts(self, layer: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of a layer's first run and of its recomputation."""
        return contextlib.nullcontext(), contextlib.nullcontext()

    def train(self, mode: bool = True) -> Tower:
        """Set the training mode of everything that isn't locked."""
        super().train(mode and not self.num_locked)
        for layer in self.layers[max(0, self.num_locked - 1) :]:
            layer.train(mode)
        return self


def layer_depth(name: str, num_layers: int) -> int:
    """Depth at which a tower reads a parameter: 0 before the layers, i + 1 in layer i, num_layers + 1 after them."""
    module, _, rest = name.partition(".")
    if module == "layers":
        return int(rest.partition(".")[0]) + 1
    return num_layers + 1 if module in ("norm", "pool", "head", "proj", "projection") else 0


class Norm(nn.LayerNorm):
    """LayerNorm of a sum, `ops.add_norm` with its parameters. The sum may be in a wider dtype than the next matmul."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(  # type: ignore[override]
        self, stream: Tensor, branch: Tensor | None = None, dropout_p: float = 0.0, *, post: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Norm the sum of a (T, D) stream and an optional branch -> (normed in the matmuls' dtype, the new stream).

        The new stream is stream + dropout(branch). With `post`, it is that sum after the norm.
        """
        kind = stream.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        return add_norm(stream, branch, self.weight, self.bias, self.eps, dropout_p=dropout_p, post=post, dtype=dtype)


class Linear(nn.Linear):
    """`ops.linear` with its parameters."""

    def forward(self, x: Tensor, *, activated: bool = False) -> Tensor:
        """(..., in) -> (..., out). activated: apply the exact GELU to the result."""
        return (linear_gelu if activated else linear)(x, self.weight, self.bias)


class QueryKeyValue(Linear):
    """The projection to queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Any:  # type: ignore[override]
        """(T, D) -> (T, 3 D). With rows (n,), only they get queries: ((n, D), (T, 2 D))."""
        if rows is None:
            return super().forward(x)
        sizes = [x.shape[1], 2 * x.shape[1]]
        query_weight, key_value_weight = self.weight.split(sizes)
        query_bias, key_value_bias = self.bias.split(sizes)
        return linear(x[rows], query_weight, query_bias), linear(x, key_value_weight, key_value_bias)


def attend(
    qkv: nn.Module, heads: int, normed: Tensor, sequences: Sequences, rows: Tensor | None, dropout_p: float = 0.0
) -> Tensor:
    """Project and attend: (T, D) -> (T, D), or (n, D) for one row of each sequence."""
    if rows is None:
        return sequences.attend(qkv(normed).unflatten(-1, (3, heads, -1)), dropout_p)
    if isinstance(qkv, QueryKeyValue):
        query, key_value = qkv(normed, rows)
    else:  # an adapter around it, such as LoRA's
        projected = qkv(normed)
        query, key_value = projected[rows, : normed.shape[1]], projected[:, normed.shape[1] :]
    query, key_value = query.unflatten(-1, (heads, -1)), key_value.unflatten(-1, (2, heads, -1))
    return sequences.attend_from(rows, query, key_value, dropout_p)


def activate(fc1: nn.Module, activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """activation(fc1(x)), the hidden layer of an MLP."""
    if activation is gelu and type(fc1) is Linear:
        return fc1(x, activated=True)
    return activation(fc1(x))  # an adapter around it, such as LoRA's, or an FP8 layer


class PreNormLayer(nn.Module):
    """x + proj(attention(norm1(x))), then x + fc2(activation(fc1(norm2(x)))): the layer of ViT and GPT."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float, activation: str = "gelu") -> None:
        super().__init__()
        self.heads = heads
        self.activation = ACTIVATIONS[activation]
        self.norm1 = Norm(width, norm_eps)
        self.qkv = QueryKeyValue(width)
        self.proj = Linear(width, width)
        self.norm2 = Norm(width, norm_eps)
        self.fc1 = Linear(width, mlp_width(width, mlp_ratio))
        self.fc2 = Linear(mlp_width(width, mlp_ratio), width)

    def forward(
        self, stream: Tensor, branch: Tensor | None, sequences: Sequences, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Apply the layer to stream + branch, (T, D) each -> a stream and a branch whose sum is the output.

        rows: (n,) int64, one token of each sequence. Only their outputs are computed, (n, D) each, while every token
            still serves as a key. In the last layer this is exact: nothing reads the other tokens' outputs.
        """
        normed, stream = self.norm1(stream, branch)
        attended = attend(self.qkv, self.heads, normed, sequences, rows)
        if rows is not None:
            stream = stream[rows]
        normed, stream = self.norm2(stream, self.proj(attended))
        return stream, self.fc2(activate(self.fc1, self.activation, normed))


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
        """Apply the layer to x, (T, D) in the matmuls' dtype and again in the stream's -> the output in both dtypes.

        rows: as in `PreNormLayer`. The outputs are then (n, D).
        """
        dropout, attention_dropout = (self.dropout, self.attention_dropout) if self.training else (0.0, 0.0)
        attended = attend(self.qkv, self.heads, normed, sequences, rows, attention_dropout)
        if rows is not None:
            stream = stream[rows]
        normed, stream = self.norm1(stream, self.proj(attended), dropout, post=True)
        return self.norm2(stream, self.fc2(activate(self.fc1, gelu, normed)), dropout, post=True)

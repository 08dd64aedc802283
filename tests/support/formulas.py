"""The operators' formulas, for outputs and gradients, over an arithmetic (arithmetic.py).

They define which numbers a kernel may round to the inputs' dtype: operands of a matrix product, and results. All other
numbers are float32. A formula takes (arithmetic, inputs, upstream gradient) and returns the output and the gradient of
each input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from arithmetic import Arithmetic
from torch import Tensor

from bclip_fast.ops.attention import reference
from bclip_fast.ops.attention.call import AttentionCall, SingleQueryCall
from bclip_fast.ops.pointwise.reference import dropout_mask

Formula = Callable[[Arithmetic, Sequence[Tensor], Tensor], list[Any]]


def _attention(
    arithmetic: Arithmetic, tensors: Sequence[Tensor], visible: Tensor, mask: Tensor, scale: float
) -> list[Any]:
    """Output and gradients from queries, keys, values and the upstream gradient, all (batch, H, N, d)."""
    arithmetic.start()
    dtype = tensors[0].dtype
    query, key, value, grad = (arithmetic.load(tensor) for tensor in tensors)
    mask = mask.to(arithmetic.value(query).dtype)
    scores = arithmetic.dot(query, key.mT) * scale
    # A row without visible keys has the weights 0 / 1.
    seen = visible.any(-1, keepdim=True)
    highest = arithmetic.value(scores).masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    highest = torch.where(seen, highest, 0.0)
    exponentials = arithmetic.exp(scores, highest) * visible
    sums = arithmetic.total(exponentials, -1) + (~seen).to(mask.dtype)
    out = arithmetic.dot(arithmetic.stored(exponentials / sums * mask, dtype), value)
    out = arithmetic.stored(out, dtype)
    # The backward pass reads the log-sum-exps in float32, and the stored output.
    lse = arithmetic.stored(arithmetic.log(sums) + highest, torch.float32)
    weights = arithmetic.exp(scores, lse) * visible
    delta = arithmetic.total(grad * out, -1)
    scores_grad = weights * (arithmetic.dot(grad, value.mT) * mask - delta)
    scores_grad = arithmetic.stored(scores_grad, dtype)
    grads = [
        arithmetic.dot(scores_grad, key) * scale,
        arithmetic.dot(scores_grad.mT, query) * scale,
        arithmetic.dot(arithmetic.stored(weights * mask, dtype).mT, grad),
    ]
    return [out, *(arithmetic.stored(part, dtype) for part in grads)]


def attention(options: Sequence[Any]) -> Formula:
    """The formula for queries, keys and values (T, H, d). `options` are the fields of `AttentionCall` after qkv.

    Errors grow with the depth d of two dot products. They also grow with the number of keys, in the softmax's sum and
    in two more dot products, and with the scores, which are exponents.
    """

    def formula(arithmetic: Arithmetic, inputs: Sequence[Tensor], grad: Tensor) -> list[Any]:
        sequences = []
        call = AttentionCall(torch.stack(list(inputs), 1), *options)
        for rows, shape in reference.batches(call):
            mask = torch.ones((), device=grad.device)
            if call.seed is not None:
                mask = reference.dropout_mask(call, rows, shape, torch.float64)
            visible = reference.visible_keys(call, rows, shape)
            heads = [tensor[rows].unflatten(0, shape).transpose(1, 2) for tensor in (*inputs, grad)]
            results = _attention(arithmetic, heads, visible, mask, call.scale)
            sequences.append([result.transpose(1, 2).reshape(-1, *grad.shape[1:]) for result in results])
        return [arithmetic.cat(list(parts)) for parts in zip(*sequences, strict=True)]

    return formula


def single_query_attention(options: Sequence[Any]) -> Formula:
    """The formula for queries (n, H, d), keys and values (T, H, d).

    `options` are the fields of `SingleQueryCall` after key_value. Errors grow as in `attention`.
    """

    def formula(arithmetic: Arithmetic, inputs: Sequence[Tensor], grad: Tensor) -> list[Any]:
        query, key, value = inputs
        call = SingleQueryCall(query, torch.stack([key, value], 1), *options)
        bounds, sequences = call.cu_seqlens.tolist(), []
        for i, row in enumerate(call.rows.tolist()):
            keys = slice(bounds[i], bounds[i + 1])
            visible = torch.arange(keys.start, keys.stop, device=grad.device) <= (row if call.causal else keys.stop)
            mask = torch.ones((), device=grad.device)
            if call.seed is not None:
                rows, size = torch.tensor([[row]], device=grad.device), keys.stop - keys.start
                heads = query.shape[1]
                mask = reference.dropout_factors(rows, heads, size, torch.float64, call.dropout_p, call.seed)
            heads = [part[None].transpose(1, 2) for part in (query[i, None], key[keys], value[keys], grad[i, None])]
            results = _attention(arithmetic, heads, visible.view(1, 1, 1, -1), mask, call.scale)
            sequences.append([result.transpose(1, 2).reshape(-1, *grad.shape[1:]) for result in results])
        return [arithmetic.cat(list(parts)) for parts in zip(*sequences, strict=True)]

    return formula


def _contrastive_grads(
    arithmetic: Arithmetic, features: Sequence[Any], scale: Any, grad: Any, cosines: Any, upstream: Any, dtype: Any
) -> list[Any]:
    """The gradients of features and scale from that of the logits. They may be rounded before `upstream` comes."""
    image, text = features
    scale_grad = arithmetic.total(arithmetic.total(grad * cosines, 1), 0).reshape(()) * upstream
    operand = arithmetic.stored(grad, dtype)
    grads = arithmetic.dot(operand, text) * scale, arithmetic.dot(operand.mT, image) * scale
    grads = [arithmetic.stored(arithmetic.stored(part, dtype) * upstream, dtype) for part in grads]
    return [*grads, scale_grad]


def clip_loss(same: Tensor | None = None, hardness: float = 0.0) -> Formula:
    """The formula for image (b, D), text (B, D), scale () and perhaps a bias (). `same` (b, B) marks the positives.

    By default the positives are the diagonal. Errors grow with the depth D, with the number of pairs in a sum, and with
    the logits, which are exponents. A kernel may subtract them from an offset up to the largest possible logit plus 88.
    """

    def formula(arithmetic: Arithmetic, inputs: Sequence[Tensor], upstream: Tensor) -> list[Any]:
        arithmetic.start()
        image, text, scale, *biases = (arithmetic.load(tensor) for tensor in inputs)
        up, kind = arithmetic.load(upstream), arithmetic.value(scale).dtype
        positive = torch.eye(len(inputs[0]), len(inputs[1]), device=upstream.device) if same is None else same
        positive = positive.to(kind)
        norms = [tensor.double().norm(dim=1).max().item() for tensor in inputs[:2]]
        size = 88 + (abs(inputs[2].item()) + abs(hardness)) * math.prod(norms)
        cosines = arithmetic.dot(image, text.mT)
        logits = cosines * scale
        weighted = logits + cosines * (hardness * (1 - positive)) if hardness else logits
        loss, grad = 0.0, 0.0
        for dim in (1, 0):
            highest = arithmetic.value(weighted).amax(dim, keepdim=True)
            sums = arithmetic.total(arithmetic.exp(weighted, highest, size), dim)
            lse = arithmetic.log(sums) + highest
            count = positive.sum(dim, keepdim=True)
            weight = (count > 0).to(kind) / (2 * (count > 0).sum())
            shares = weight * positive / count.clamp_min(1)
            terms = arithmetic.total(logits * shares, dim)
            loss = loss + arithmetic.total(lse * weight - terms, 1 - dim).reshape(())
            grad = grad + (arithmetic.exp(weighted, lse, size) * weight - shares)
        results = _contrastive_grads(arithmetic, (image, text), scale, grad, cosines, up, inputs[0].dtype)
        results += [arithmetic.total(arithmetic.total(grad, 1), 0).reshape(()) * up for _ in biases]
        return [loss, *results]

    return formula


def siglip_loss(same: Tensor | None = None) -> Formula:
    """The formula for image (b, D), text (B, D), scale () and bias ().

    Errors grow with the depth D, the number of pairs in a sum, and the logits, which are exponents.
    """

    def formula(arithmetic: Arithmetic, inputs: Sequence[Tensor], upstream: Tensor) -> list[Any]:
        arithmetic.start()
        image, text, scale, bias = (arithmetic.load(tensor) for tensor in inputs)
        up, kind = arithmetic.load(upstream), arithmetic.value(scale).dtype
        positive = torch.eye(len(inputs[0]), len(inputs[1]), device=upstream.device) if same is None else same
        signs = 1 - 2 * positive.to(kind)
        cosines = arithmetic.dot(image, text.mT)
        softplus, sigmoid = arithmetic.softplus_and_sigmoid((cosines * scale + bias) * signs)
        loss = arithmetic.total(arithmetic.total(softplus, 1), 0).reshape(()) / len(inputs[0])
        grad = sigmoid * (signs / len(inputs[0]))
        results = _contrastive_grads(arithmetic, (image, text), scale, grad, cosines, up, inputs[0].dtype)
        return [loss, *results, arithmetic.total(arithmetic.total(grad, 1), 0).reshape(()) * up]

    return formula


def add_norm(eps: float, dropout_p: float, seed: Tensor, post: bool, low: torch.dtype) -> Formula:
    """The formula for stream (T, D), perhaps a branch (T, D), weight and bias (D,).

    The output is the input of the matmuls, in `low`, and below it half of the stream that continues. Errors grow with D
    in a row's sums, with T in the gradients of weight and bias, and with the inverse of a row's deviation.
    """

    def formula(arithmetic: Arithmetic, inputs: Sequence[Tensor], upstream: Tensor) -> list[Any]:
        arithmetic.start()
        stream, width = inputs[0].dtype, inputs[0].shape[1]
        total, weight, bias = (arithmetic.load(inputs[place]) for place in (0, -2, -1))
        kind, mask = arithmetic.value(total).dtype, 1.0
        if len(inputs) == 4:
            if dropout_p:
                kept = dropout_mask(*inputs[0].shape, dropout_p, seed).to(inputs[0].device)
                mask = kept.to(kind) / (1 - dropout_p)
            total = total + arithmetic.load(inputs[1]) * mask
        total = arithmetic.stored(total, stream)
        centred = total - arithmetic.total(total, 1) / width
        inverse = arithmetic.rsqrt(arithmetic.total(centred * centred, 1) / width + eps)
        normed = centred * inverse
        result = normed * weight + bias
        rest = arithmetic.stored(result, stream) if post else total
        out = arithmetic.cat([arithmetic.stored(result, low), rest * 0.5])

        first, second = (arithmetic.load(part) for part in upstream.chunk(2))
        second = second * 0.5
        result_grad = first + second if post else first
        if post and low == stream:
            # Both outputs are one tensor, so torch adds its gradients in its dtype.
            result_grad = arithmetic.stored(result_grad, low)
        scaled = result_grad * weight
        means = arithmetic.total(scaled, 1) / width, arithmetic.total(scaled * normed, 1) / width
        total_grad = (scaled - means[0] - normed * means[1]) * inverse
        if not post:
            total_grad = total_grad + second
        grads = [arithmetic.stored(total_grad, stream)]
        if len(inputs) == 4:
            grads.append(arithmetic.stored(total_grad * mask, inputs[1].dtype))
        grads += [arithmetic.total(part, 0)[0] for part in (result_grad * normed, result_grad)]
        return [out, *grads]

    return formula


def gelu(arithmetic: Arithmetic, inputs: Sequence[Tensor], upstream: Tensor) -> list[Any]:
    """The formula for x of any shape. Phi errs by a few units of 1, so the result errs by as many units of x."""
    arithmetic.start()
    x, grad, dtype = arithmetic.load(inputs[0]), arithmetic.load(upstream), inputs[0].dtype
    share = arithmetic.normal_cdf(x)
    squares = x * x * -0.5
    density = arithmetic.exp(squares, arithmetic.value(squares) * 0.0) * (2 * math.pi) ** -0.5
    terms = arithmetic.total(arithmetic.stack([share, x * density]), -1)[..., 0]
    return [arithmetic.stored(x * share, dtype), arithmetic.stored(terms * grad, dtype)]


def linear(arithmetic: Arithmetic, inputs: Sequence[Tensor], upstream: Tensor) -> list[Any]:
    """The formula for x (T, K), weight (N, K) and perhaps a bias (N,).

    Errors grow with the depths K, N and T of the products. Operands are rounded to x's dtype.
    """
    arithmetic.start()
    dtype, grad = inputs[0].dtype, arithmetic.load(upstream)
    x, weight, *biases = (arithmetic.load(tensor) for tensor in inputs)
    weight = arithmetic.stored(weight, dtype)
    out = arithmetic.dot(x, weight.mT)
    if biases:
        out = out + biases[0]
    grads = [
        arithmetic.stored(arithmetic.dot(grad, weight), dtype),
        arithmetic.stored(arithmetic.dot(grad.mT, x), inputs[1].dtype),
        *(arithmetic.stored(arithmetic.total(grad, 0)[0], bias.dtype) for bias in inputs[2:]),
    ]
    return [arithmetic.stored(out, dtype), *grads]

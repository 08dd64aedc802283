"""What is measured: inputs, ours, rivals, FLOPs and bytes, each said once for pytest-benchmark and `bclip bench`."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast import ops
from bclip_fast.ops import attention, contrastive, image, pointwise
from bclip_fast.ops.attention.reference import attention as dense_attention
from bclip_fast.ops.contrastive.reference import dense as dense_clip_loss
from bclip_fast.ops.dispatch import BACKENDS, why_not

from .peers import import_open_clip

Inputs = Sequence[Any]
Contender = Callable[..., Any]  # the inputs -> the results that are compared with the truth


class Unavailable(Exception):
    """Why a rival, or the input of a case, isn't there."""


@dataclass(frozen=True, eq=False)
class Case:
    """One operator at one shape.

    `flops` and `bytes` are the least that any method has to spend: the floor beside each figure. `contenders` maps
    "ours:<backend>" and the rivals' names to a maker, which raises Unavailable with the reason where it can't run.
    """

    operator: str
    name: str
    make_inputs: Callable[[], Inputs]
    truth: Contender  # computed in float64 where the inputs are floating
    contenders: dict[str, Callable[[], Contender]]
    flops: float = 0.0
    bytes: float = 0.0
    dtype: torch.dtype = torch.float32
    batch: int = 0  # cases of one operator and dtype that differ in this alone are also drawn as curves
    unit: str = "FLOP"  # what the rate is quoted in: FLOP, or "image"
    num_units: float = field(default=0.0)

    @property
    def id(self) -> str:
        return f"{self.operator}-{self.name}"


def ours(limits: Any, make: Callable[[str], Contender], *inputs: Any) -> dict[str, Callable[[], Contender]]:
    """A contender for each backend of the operator that is implemented."""

    def maker(backend: str) -> Callable[[], Contender]:
        def built() -> Contender:
            reason = why_not(limits, backend, *inputs)
            if reason is not None:
                raise Unavailable(reason)
            return make(backend)

        return built

    return {f"ours:{backend}": maker(backend) for backend in BACKENDS if backend in limits}


def with_gradients(function: Callable[..., Tensor]) -> Contender:
    """(output, gradients of every floating leaf): forward and backward in one call."""

    def run(*inputs: Any) -> list[Tensor]:
        leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        output = function(*inputs)
        gradient = torch.ones_like(output) if output.ndim == 0 else output.detach()
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]

    return run


def attention_case(name: str, batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Case:
    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(batch, tokens, 3, heads, dim, generator=generator)
        return [qkv.to(dtype).requires_grad_()]

    def sdpa(qkv: Tensor) -> Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    forward_flops = 4 * batch * heads * tokens**2 * dim
    return Case(
        operator="attention",
        name=name,
        make_inputs=make_inputs,
        truth=with_gradients(
            lambda qkv: dense_attention(qkv.flatten(0, 1), None, None, tokens, False, 0.0, None, dim**-0.5).unflatten(
                0, (batch, tokens)
            )
        ),
        contenders={
            **ours(
                attention.LIMITS,
                lambda backend: with_gradients(lambda qkv: ops.fused_attention(qkv, backend=backend)),
                torch.zeros(1, 1, 3, 1, dim, dtype=dtype),
            ),
            "torch sdpa": lambda: with_gradients(sdpa),
        },
        flops=3.5 * forward_flops,  # forward 2 matmuls, backward 5: one of them recomputes the scores
        bytes=8 * batch * tokens * heads * dim * torch.finfo(dtype).bits / 8,
        dtype=dtype,
    )


def varlen_case(name: str, lengths: Sequence[int], heads: int, dim: int, dtype: torch.dtype) -> Case:
    """Sequences without padding; the rival pads them to the longest and masks."""
    longest, total = max(lengths), sum(lengths)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(total, 3, heads, dim, generator=generator).to(dtype).requires_grad_()]

    def padded_sdpa(qkv: Tensor) -> Tensor:
        padded = qkv.new_zeros(len(lengths), longest, 3, heads, dim)
        padded[mask] = qkv
        query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return out.transpose(1, 2)[mask]

    return Case(
        operator="attention",
        name=name,
        make_inputs=make_inputs,
        truth=with_gradients(lambda qkv: dense_attention(qkv, bounds, None, longest, False, 0.0, None, dim**-0.5)),
        contenders={
            **ours(
                attention.LIMITS,
                lambda backend: with_gradients(lambda qkv: ops.varlen_attention(qkv, bounds, longest, backend=backend)),
                torch.zeros(1, 3, 1, dim, dtype=dtype),
            ),
            "torch sdpa padded": lambda: with_gradients(padded_sdpa),
        },
        flops=3.5 * 4 * sum(length**2 for length in lengths) * heads * dim,
        bytes=8 * total * heads * dim * torch.finfo(dtype).bits / 8,
        dtype=dtype,
    )


def norm_case(rows: int, width: int, dropout_p: float) -> Case:
    """A residual in float32, a branch in bfloat16, the norm of their sum in bfloat16: a layer under autocast."""

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        stream, branch = torch.randn(2, rows, width, generator=generator).unbind(0)
        return [stream.requires_grad_(), branch.to(torch.bfloat16).requires_grad_(), *torch.ones(2, width)]

    def run(backend: str) -> Contender:
        seed = 1 if dropout_p else None
        return with_gradients(
            lambda x, y, weight, bias: ops.add_norm(
                x, y, weight, bias, 1e-6, dropout_p=dropout_p, seed=seed, dtype=y.dtype, backend=backend
            )[0]
        )

    def eager(stream: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(stream + branch, (width,), weight, bias, 1e-6).to(branch.dtype)

    return Case(
        operator="pointwise",
        name=f"add-norm-{rows}x{width}" + f"-dropout-{dropout_p}" * bool(dropout_p),
        make_inputs=make_inputs,
        truth=run("reference"),
        contenders={
            **ours(pointwise.LIMITS, run, torch.zeros(1)),
            **({} if dropout_p else {"torch": lambda: with_gradients(eager)}),
        },
        bytes=(4 + 2 + 4 + 2 + 2 + 4 + 4 + 2) * rows * width,
        dtype=torch.bfloat16,
        unit="row",
        num_units=rows,
    )


def contrastive_case(batch: int, width: int, dtype: torch.dtype, scale: float = 14.3) -> Case:
    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        pair = F.normalize(torch.randn(2, batch, width, generator=generator), dim=-1).to(dtype)
        image, text = (rows.clone().requires_grad_() for rows in pair)
        return [image, text, torch.tensor(scale).requires_grad_()]

    def open_clip_loss(compiled: bool) -> Contender:
        loss = peer(import_open_clip).ClipLoss()
        return with_gradients(torch.compile(loss) if compiled else loss)

    def two_linear_cross_entropies() -> Contender:
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
        labels = torch.arange(batch)

        def loss(image: Tensor, text: Tensor, factor: Tensor) -> Tensor:
            # The default options hold the whole matrix; chunking is what bounds its memory.
            options = torch.nn.LinearCrossEntropyOptions()
            one = F.linear_cross_entropy(factor.to(dtype) * image, text, labels, options=options)
            return (one + F.linear_cross_entropy(factor.to(dtype) * text, image, labels, options=options)) / 2

        return with_gradients(loss)

    return Case(
        operator="contrastive",
        name=f"{batch}-{str(dtype).removeprefix('torch.')}",
        batch=batch,
        make_inputs=make_inputs,
        truth=with_gradients(dense_clip_loss),
        contenders={
            **ours(
                contrastive.LIMITS,
                lambda backend: with_gradients(lambda i, t, s: ops.clip_loss(i, t, s, backend=backend)),
                *make_tiny_features(dtype),
            ),
            "torch dense": lambda: with_gradients(lambda i, t, s: dense_clip_loss(i, t, s.to(i.dtype))),
            "open_clip": lambda: open_clip_loss(compiled=False),
            "open_clip compiled": lambda: open_clip_loss(compiled=True),
            "torch linear_cross_entropy x2": two_linear_cross_entropies,
        },
        flops=4 * 2 * batch**2 * width,  # S, S again, and the two products with its gradient
        bytes=4 * batch * width * torch.finfo(dtype).bits / 8,
        dtype=dtype,
    )


def make_tiny_features(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 8, dtype=dtype), torch.zeros(1, 8, dtype=dtype)


def image_case(num_images: int) -> Case:
    def simplejpeg() -> Contender:
        module = peer(lambda: importlib.import_module("simplejpeg"))
        return lambda *files: [torch.from_numpy(module.decode_jpeg(data, "RGB")) for data in files]

    return Case(
        operator="image",
        name=f"decode-{num_images}-figures",
        make_inputs=lambda: figures(num_images),
        truth=lambda *files: [ops.image.decode(data, backend="reference") for data in files],
        contenders={
            **ours(
                image.LIMITS,
                lambda backend: lambda *files: [ops.image.decode(data, backend=backend) for data in files],
                b"",
            ),
            "simplejpeg": simplejpeg,
        },
        dtype=torch.uint8,
        unit="image",
        num_units=num_images,
    )


def figures(num_images: int) -> list[bytes]:
    """Real figures of PMC articles, spread over the articles."""
    folder = shared_data() / "pmc_articles"
    paths = sorted(folder.rglob("*.jpg"))
    if len(paths) < num_images:
        raise Unavailable(f"{folder} holds {len(paths)} JPEGs, {num_images} are needed: set BCLIP_SHARED_DATA")
    return [path.read_bytes() for path in paths[:: len(paths) // num_images][:num_images]]


def shared_data() -> Path:
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("BCLIP_SHARED_DATA", default))


def peer(import_module: Callable[[], Any]) -> Any:
    try:
        return import_module()
    except ImportError as error:
        raise Unavailable(f"the peer {error.name} is not installed") from error


CASES = [
    attention_case("vit-b16-224-fp32", 8, 197, 12, 64, torch.float32),
    attention_case("vit-b16-224-bf16", 8, 197, 12, 64, torch.bfloat16),
    attention_case("bert-256-fp32", 4, 256, 12, 64, torch.float32),
    # Mean 78 tokens, as captions of PMC figures have after truncation at 256.
    varlen_case("text-varlen-fp32", [9, 14, 21, 33, 46, 58, 71, 90, 112, 137, 189, 156], 12, 64, torch.float32),
    *(contrastive_case(batch, 512, dtype) for dtype in (torch.float32, torch.bfloat16) for batch in (2048, 4096, 8192)),
    norm_case(16 * 197, 768, 0.0),
    norm_case(16 * 78, 768, 0.1),
    image_case(40),
]

"""What is measured: inputs, ours, rivals, FLOPs and bytes, each said once for pytest-benchmark and `bclip bench`."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast import ops
from bclip_fast.ops import attention, contrastive, image, matmul, pointwise
from bclip_fast.ops.attention.call import AttentionCall
from bclip_fast.ops.attention.reference import attention as dense_attention
from bclip_fast.ops.contrastive import loss_terms
from bclip_fast.ops.contrastive import reference as contrastive_reference
from bclip_fast.ops.contrastive.call import ContrastiveCall, SoftmaxGradient
from bclip_fast.ops.contrastive.reference import dense as dense_clip_loss
from bclip_fast.ops.contrastive.reference import dense_siglip as dense_siglip_loss
from bclip_fast.ops.dispatch import BACKENDS, why_not

from .peers import import_open_clip

Inputs = Sequence[Any]
Contender = Callable[..., Any]  # the inputs -> the results compared with the truth; None where it computes none

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Every 34th of 558 captions of PMC articles in PubMedBERT's tokens, cut at 256: 78 on average, as all of them have.
CAPTION_TOKENS = [256, 77, 107, 28, 93, 19, 51, 18, 154, 65, 32, 15, 7, 51, 256, 12]
LARGEST_DENSE = 8192  # pairs whose matrix of similarities is held in float64 for the truth


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
    curve: str = ""  # cases of one curve differ in the batch alone: they are also drawn against it
    batch: int = 0
    large: bool = False  # minutes a call: measured when asked for, and once
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


def with_gradients(function: Callable[..., Tensor], num_constants: int = 0) -> Contender:
    """(output, gradients of every floating leaf): forward and backward in one call.

    The last `num_constants` leaves are constants to `function`: None stands for their gradients.
    """

    def run(*inputs: Any) -> list[Tensor | None]:
        leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        output = function(*inputs)
        gradient = torch.ones_like(output) if output.ndim == 0 else output.detach()
        variables = leaves[: len(leaves) - num_constants]
        return [output.detach(), *torch.autograd.grad(output, variables, gradient), *[None] * num_constants]

    return run


def attention_case(
    name: str, batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, dropout_p: float = 0.0
) -> Case:
    seed = torch.tensor(1) if dropout_p else None

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(batch, tokens, 3, heads, dim, generator=generator)
        return [qkv.to(DEVICE, dtype).requires_grad_()]

    def truth(qkv: Tensor) -> Tensor:
        call = AttentionCall(qkv.flatten(0, 1), None, None, tokens, False, dropout_p, seed, dim**-0.5)
        out = dense_attention(call)
        return out.unflatten(0, (batch, tokens))

    def sdpa(qkv: Tensor) -> Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p).transpose(1, 2)

    def fused(backend: str) -> Contender:
        return with_gradients(lambda qkv: ops.fused_attention(qkv, dropout_p=dropout_p, seed=seed, backend=backend))

    forward_flops = 4 * batch * heads * tokens**2 * dim
    return Case(
        operator="attention",
        name=name,
        make_inputs=make_inputs,
        truth=with_gradients(truth),
        contenders={
            **ours(attention.LIMITS, fused, torch.zeros(1, 1, 3, 1, dim, dtype=dtype, device=DEVICE)),
            "torch sdpa": lambda: with_own_mask(sdpa, dropout_p),
        },
        flops=3.5 * forward_flops,  # forward 2 matmuls, backward 5: one of them recomputes the scores
        bytes=8 * batch * tokens * heads * dim * torch.finfo(dtype).bits / 8,
        dtype=dtype,
    )


def varlen_case(
    name: str, lengths: Sequence[int], heads: int, dim: int, dtype: torch.dtype, dropout_p: float = 0.0
) -> Case:
    """Sequences without padding; rivals pad them to the longest and mask, or take them one by one."""
    longest, total = max(lengths), sum(lengths)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(DEVICE)
    seed = torch.tensor(1) if dropout_p else None

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(total, 3, heads, dim, generator=generator).to(DEVICE, dtype).requires_grad_()]

    def truth(qkv: Tensor) -> Tensor:
        return dense_attention(AttentionCall(qkv, bounds, None, longest, False, dropout_p, seed, dim**-0.5))

    def sdpa(qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)
        return out.transpose(1, 2)

    def padded(qkv: Tensor) -> Tensor:
        rectangle = qkv.new_zeros(len(lengths), longest, 3, heads, dim)
        rectangle[mask] = qkv
        return sdpa(rectangle, mask[:, None, None])[mask]

    def one_by_one(qkv: Tensor) -> Tensor:
        return torch.cat([sdpa(sequence[None])[0] for sequence in qkv.split(list(lengths))])

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

    return Case(
        operator="attention",
        name=name,
        make_inputs=make_inputs,
        truth=with_gradients(truth),
        contenders={
            **ours(attention.LIMITS, packed, torch.zeros(1, 3, 1, dim, dtype=dtype, device=DEVICE)),
            "torch sdpa padded": lambda: with_own_mask(padded, dropout_p),
            "torch sdpa one by one": lambda: with_own_mask(one_by_one, dropout_p),
            "torch varlen_attn": varlen_attn,
        },
        flops=3.5 * 4 * sum(length**2 for length in lengths) * heads * dim,
        bytes=8 * total * heads * dim * torch.finfo(dtype).bits / 8,
        dtype=dtype,
    )


def with_own_mask(function: Callable[..., Tensor], dropout_p: float) -> Contender:
    """As `with_gradients`, but what depends on a random mask of the rival's own can't be compared."""
    run = with_gradients(function)
    return (lambda *inputs: [None for _ in run(*inputs)]) if dropout_p else run


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


def linear_case(rows: int, width: int, columns: int) -> Case:
    """A bfloat16 input and float32 masters of weight and bias: a linear layer under autocast."""

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        x, weight = torch.randn(rows, width, generator=generator), torch.randn(columns, width, generator=generator)
        bias = torch.randn(columns, generator=generator)
        # The truth is of the weight that is multiplied, the rounded one.
        masters = weight.to(DEVICE, torch.bfloat16).float(), bias.to(DEVICE, torch.bfloat16).float()
        return [x.to(DEVICE, torch.bfloat16).requires_grad_(), *(master.requires_grad_() for master in masters)]

    def autocast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return F.linear(x, weight, bias)

    def run(backend: str) -> Contender:
        return with_gradients(functools.partial(ops.linear, backend=backend))

    tiny = torch.zeros(1, 1, dtype=torch.bfloat16, device=DEVICE)
    return Case(
        operator="affine",
        name=f"linear-{rows}x{width}-{columns}",
        make_inputs=make_inputs,
        truth=run("reference"),
        contenders={**ours(matmul.LIMITS, run, tiny, tiny), "torch autocast": lambda: with_gradients(autocast)},
        flops=6 * rows * width * columns,
        bytes=2 * 2 * rows * (width + columns) + 3 * 4 * columns * (width + 1),
        dtype=torch.bfloat16,
    )


def contrastive_case(batch: int, width: int, dtype: torch.dtype, scale: float = 14.3) -> Case:
    """CLIP's softmax loss."""
    dense = functools.partial(dense_contender, batch, dtype)

    def two_linear_cross_entropies() -> Contender:
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
        labels = torch.arange(batch, device=DEVICE)

        def loss(image: Tensor, text: Tensor, factor: Tensor) -> Tensor:
            # The default options hold the whole matrix; chunking is what bounds its memory.
            options = torch.nn.LinearCrossEntropyOptions()
            one = F.linear_cross_entropy(factor.to(dtype) * image, text, labels, options=options)
            return (one + F.linear_cross_entropy(factor.to(dtype) * text, image, labels, options=options)) / 2

        return with_gradients(loss)

    def two_inf_cls() -> Contender:
        # One direction a call. Of its functions this is the one for a single process: the others gather the scale's
        # gradient over ranks.
        one = cuda_peer("inf_cl").cal_flash_loss
        return with_gradients(lambda i, t, s: (one(i, t, scale=s).mean() + one(t, i, scale=s).mean()) / 2)

    def memeff() -> Contender:
        # The temperature is a number that isn't learned. By default gradients are rescaled, and features normalised.
        loss = cuda_peer("memeff").MemoryEfficientCLIPLoss(1 / scale, normalized_inputs=True, stable=False)
        return with_gradients(lambda i, t, s: loss(i, t), num_constants=1)

    return Case(
        **pairs(batch, width, dtype, "clip", [scale]),
        truth=clip_truth(num_copies(batch)),
        contenders={
            **ours(
                contrastive.LIMITS,
                lambda backend: with_gradients(lambda i, t, s: ops.clip_loss(i, t, s, backend=backend)),
                *make_tiny_features(dtype),
            ),
            "torch dense": lambda: dense(4, lambda i, t, s: dense_clip_loss(i, t, s.to(i.dtype))),
            "open_clip": lambda: dense(4, open_clip().loss.ClipLoss()),
            "open_clip compiled": lambda: dense(2.5, torch.compile(open_clip().loss.ClipLoss())),
            "torch linear_cross_entropy x2": two_linear_cross_entropies,
            "inf-cl x2": two_inf_cls,
            "memeff": memeff,
        },
        flops=4 * 2 * batch**2 * width,  # S, S again, and the two products with its gradient
    )


def siglip_case(batch: int, width: int, dtype: torch.dtype, scale: float = 10.0, bias: float = -10.0) -> Case:
    """SigLIP's sigmoid loss, at its initial scale and bias."""
    dense = functools.partial(dense_contender, batch, dtype)

    def chunked_open_clip() -> Contender:
        module = open_clip()
        if "chunk_size" not in inspect.signature(module.loss.SigLipLoss).parameters:
            raise Unavailable(f"SigLipLoss of open_clip {module.__version__} has no chunk_size")
        return dense(2, module.loss.SigLipLoss(chunk_size=1024))

    def siglip_kernel() -> Contender:
        loss = cuda_peer("siglip_kernel").fused_siglip_loss
        return with_gradients(lambda i, t, s, b: loss(i, t, s.log(), b))

    return Case(
        **pairs(batch, width, dtype, "siglip", [scale, bias]),
        truth=siglip_truth(num_copies(batch)),
        contenders={
            **ours(
                contrastive.LIMITS,
                lambda backend: with_gradients(lambda i, t, s, b: ops.siglip_loss(i, t, s, b, backend=backend)),
                *make_tiny_features(dtype),
            ),
            "torch dense": lambda: dense(5, lambda i, t, s, b: dense_siglip_loss(i, t, s.to(i.dtype), b.to(i.dtype))),
            "open_clip": lambda: dense(5, open_clip().loss.SigLipLoss()),
            "open_clip chunked": chunked_open_clip,
            "open_clip compiled": lambda: dense(1.25, torch.compile(open_clip().loss.SigLipLoss())),
            "siglip-kernel": siglip_kernel,
        },
        flops=3 * 2 * batch**2 * width,  # S, whose gradient is known with the loss, and the two products with that
    )


def pairs(batch: int, width: int, dtype: torch.dtype, loss: str, scalars: Sequence[float]) -> dict[str, Any]:
    """What all contrastive cases have alike."""
    copies, name = num_copies(batch), str(dtype).removeprefix("torch.")

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        pair = F.normalize(torch.randn(2, batch // copies, width, generator=generator), dim=-1).to(DEVICE, dtype)
        image, text = ((rows * signs(copies, rows)[:, None]).flatten(0, 1).requires_grad_() for rows in pair)
        return [image, text, *(torch.tensor(value, device=DEVICE).requires_grad_() for value in scalars)]

    return dict(
        operator="contrastive",
        name=f"{loss}-{batch}-{name}",
        curve=f"{loss}, {name}",
        batch=batch,
        large=copies > 1 and DEVICE.type == "cpu",
        make_inputs=make_inputs,
        bytes=4 * batch * width * torch.finfo(dtype).bits / 8,
        dtype=dtype,
    )


def num_copies(batch: int) -> int:
    """Batches too large for a dense truth consist of so many sign-flipped copies of a small one: see `clip_truth`."""
    copies = -(-batch // LARGEST_DENSE)
    assert batch % copies == 0 and copies.bit_count() == 1, f"{batch} pairs are no power of two times one small problem"
    return copies


def signs(copies: int, features: Tensor) -> Tensor:
    """(copies, D) of 1 and -1: Walsh functions, d_a[x] = (-1)^(number of bits that a and x share)."""
    counts = [[(a & x).bit_count() for x in range(features.shape[1])] for a in range(copies)]
    return 1 - 2 * (torch.tensor(counts, device=features.device) % 2).to(features.dtype)


def clip_truth(copies: int, chunk_size: int = 256) -> Contender:
    """The loss and its gradients, in 1 / copies of the work where pair (a, i) is (d_a I_i, d_a T_i), `signs` being d.

    Since d_a d_b = d_(a xor b), the dot product of image (a, i) and text (b, j) depends on i, j and a xor b alone. So
    each copy's images meet the same numbers, in another order, and what copy 0 yields tells all: row sums are equal in
    every copy; column sums of a text gather copy 0's images against that text's copies; dI_(a, i) = d_a dI_(0, i), and
    dT_(0, j) = sum_a d_a (what copy 0's images give to text (a, j)). Yet every pair is a different one.
    """
    if copies == 1:
        return with_gradients(dense_clip_loss)

    @torch.no_grad()
    def run(image: Tensor, text: Tensor, scale: Tensor) -> list[Tensor]:
        num = len(image) // copies
        own = image[:num]
        call = ContrastiveCall(own, text, scale, 0, chunk_size)
        rows, columns = contrastive_reference.forward(call)
        columns = columns.view(copies, num).logsumexp(0)
        positive = loss_terms.positive_logits(own, text[:num], scale)
        loss = loss_terms.pair_losses(rows, columns, positive).mean() / 2
        columns_lse = torch.logaddexp(columns, positive).repeat(copies)
        weight = torch.full_like(loss, 1 / (2 * len(image)))
        positive_grad = weight * loss_terms.positive_gradient(rows, columns, positive)
        rows_lse = torch.logaddexp(rows, positive)
        upstream = SoftmaxGradient(rows_lse, columns_lse, weight, positive_grad)
        gradients = contrastive_reference.backward(call, upstream, image.dtype)
        return [loss, *of_all_copies(copies, *gradients)]

    return run


def siglip_truth(copies: int, chunk_size: int = 256) -> Contender:
    """As `clip_truth`: copy 0's images hold 1 / copies of the loss."""
    if copies == 1:
        return with_gradients(dense_siglip_loss)

    @torch.no_grad()
    def run(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> list[Tensor]:
        own = image[: len(image) // copies]
        call = ContrastiveCall(own, text, scale, 0, chunk_size, bias=bias)
        loss, *gradients = contrastive_reference.siglip(call, 1 / len(image), image.dtype, with_gradients=True)
        return [copies * loss, *of_all_copies(copies, *gradients)]

    return run


def of_all_copies(copies: int, image_grad: Tensor, text_grad: Tensor, *scalars: Tensor) -> list[Tensor]:
    """The whole problem's gradients, from copy 0's dI (b, D) and what its images give to dT (B, D) and the scalars."""
    flips = signs(copies, image_grad)[:, None]
    image_grad = (flips * image_grad).flatten(0, 1)
    text_grad = (flips * text_grad.unflatten(0, (copies, -1))).sum(0)
    return [image_grad, (flips * text_grad).flatten(0, 1), *(copies * scalar for scalar in scalars)]


def make_tiny_features(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 8, dtype=dtype, device=DEVICE), torch.zeros(1, 8, dtype=dtype, device=DEVICE)


def dense_contender(batch: int, dtype: torch.dtype, num_matrices: float, loss: Callable[..., Tensor]) -> Contender:
    """`loss`, which holds so many (B, B) matrices at its peak; Unavailable where they exceed the free memory.

    The numbers are what was measured in float32 at B = 6144. CLIP: logits and their softmax, for two directions.
    """
    needed, free = num_matrices * batch**2 * torch.finfo(dtype).bits / 8, free_bytes()
    if needed > free:
        raise Unavailable(
            f"{num_matrices} matrices of {batch} x {batch} {str(dtype).removeprefix('torch.')} are about "
            f"{needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
        )
    return with_gradients(loss)


def free_bytes() -> float:
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info(DEVICE)[0]
    if not Path("/proc/meminfo").exists():
        return math.inf
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])


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
                image.FILE_LIMITS,
                lambda backend: lambda *files: [ops.image.decode(data, backend=backend) for data in files],
                b"",
            ),
            "simplejpeg": simplejpeg,
        },
        dtype=torch.uint8,
        unit="image",
        num_units=num_images,
    )


def figures(num_images: int, least: int | None = None) -> list[bytes]:
    """Real figures of PMC articles, spread over the articles: `num_images`, or all where `least` are there."""
    folder = shared_data() / "pmc_articles"
    paths = sorted(folder.rglob("*.jpg"))
    least = num_images if least is None else least
    if len(paths) < least:
        raise Unavailable(f"{folder} holds {len(paths)} JPEGs, {least} are needed: set BCLIP_SHARED_DATA")
    number = min(num_images, len(paths))
    return [paths[i * len(paths) // number].read_bytes() for i in range(number)]


def shared_data() -> Path:
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("BCLIP_SHARED_DATA", default))


def peer(import_module: Callable[[], Any]) -> Any:
    try:
        return import_module()
    except ImportError as error:
        raise Unavailable(f"the peer {error.name} is not installed") from error


def open_clip() -> Any:
    return peer(import_open_clip)


def cuda_peer(name: str) -> Any:
    """A peer whose kernels are Triton's, for CUDA alone."""
    if DEVICE.type != "cuda":
        raise Unavailable("it needs CUDA, and torch sees no device")
    return peer(lambda: importlib.import_module(name))


DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    *(
        case
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
        for dropout_p, suffix in ((0.0, ""), (0.1, "-dropout"))
        for case in (
            attention_case(f"vit-b16-224-{short}{suffix}", 16, 197, 12, 64, dtype, dropout_p),
            varlen_case(f"captions-{short}{suffix}", CAPTION_TOKENS, 12, 64, dtype, dropout_p),
        )
    ),
    *(contrastive_case(batch, 512, dtype) for dtype in DTYPES for batch in (2048, 4096, 8192, 32768, 65536)),
    *(siglip_case(batch, 512, dtype) for dtype in DTYPES for batch in (4096, 8192, 32768, 65536)),
    *(linear_case(16 * 197, *sizes) for sizes in ((768, 2304), (768, 768), (768, 3072), (3072, 768))),
    norm_case(16 * 197, 768, 0.0),
    norm_case(16 * 78, 768, 0.1),
    image_case(40),
]

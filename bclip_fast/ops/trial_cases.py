"""A call of each operator in each class of shapes, which `bclip tune` times, and small calls, which check kernels."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import fused_attention, single_query_attention, varlen_attention
from .attention import reference as attention_reference
from .attention.call import AttentionCall, SingleQueryCall
from .attention.single_query import reference as single_query_reference
from .contrastive import clip_loss, siglip_loss
from .contrastive import reference as contrastive_reference
from .dispatch import Decision, explain
from .dtypes import dtype_name
from .image import decode, decode_resize, decode_resize_normalize
from .matmul import linear
from .matmul.activated import linear_gelu
from .pointwise import add_norm, gelu

Tensors = Sequence[Tensor]
Make = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Trial:
    """One call of an operator.

    `make` returns its tensors. `call(backend, *tensors)` returns its results. `definition` computes the results from
    the same tensors in any dtype. It is None for images, which have no float64 form.
    """

    operator: str
    what: str  # description for messages
    device: torch.device
    dtype: torch.dtype
    make: Make
    call: Callable[..., Tensor | Tensors]
    definition: Callable[..., Tensor | Tensors] | None

    def decide(self, *, check: bool = False) -> Decision:
        """The dispatcher's decision for the call."""
        tensors = self.make()
        with torch.enable_grad():
            return explain(lambda: self.call("auto", *tensors), check=check)

    def run(self, backend: str, tensors: Tensors) -> list[Tensor]:
        """The results and gradients."""
        return results_of(partial(self.call, backend), tensors)


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes that a device's record covers."""
    low = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.bfloat16,)
    return torch.float32, *low


def other_heads(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[int, Trial]]:
    """Calls of attention with other head dimensions: 72 of SigLIP SO400M and 80 of ViT-H/14, for decisions only."""
    new = partial(_Inputs, device, dtype, True)
    for dim in (72, 80):
        yield dim, _dense(new(), 1, 729, 16, dim)
        yield dim, _packed(new(), [64, 64], 16, dim)
        yield dim, _single_query(new(), [729], 16, dim)


def timed(device: torch.device, dtype: torch.dtype, *, empty: bool = False) -> Iterator[Trial]:
    """A trial for each operator and class of shapes, with the sizes of a training step.

    Args:
        empty: whether to leave the tensors unfilled, for callers that only ask for decisions.
    """
    new = partial(_Inputs, device, dtype, empty)
    more = 1 if device.type == "cpu" or empty else 8
    for dim in (64, 96):
        yield _dense(new(), 4 * more, 197, 12 * 64 // dim, dim)
        yield _dense(new(), more, 768, 12 * 64 // dim, dim)
        yield _packed(new(), more * [256, 77, 107, 28, 93, 19, 51, 18], 12 * 64 // dim, dim)
        yield _packed(new(), more * [640, 77, 307, 28], 12 * 64 // dim, dim)
    yield _single_query(new(), more * [256, 77, 107, 28, 93, 19, 51, 18], 12, 64)
    for batch in (128, 512, 2048):
        yield _clip(new(), batch * (more if batch > 1024 else 1), 512)
    for batch in (128, 512, 2048):
        yield _siglip(new(), batch * (more if batch > 1024 else 1), 512)
    for rows, dropout_p in itertools.product((64, 1576 * more), (0.0, 0.1)):
        yield _norm(new(), rows, 768, dropout_p)
    for rows in (32, 1576 * more):
        yield _gelu(new(), rows, 3072)
        if dtype != torch.float32:
            yield _linear(new(), rows, 768, 3072)
            yield _linear(new(), rows, 768, 3072, activated=True)
    if dtype == torch.float32 and (files := _files(8, (640, 480))):
        yield from _images(device, files, 224)


def small(device: torch.device, dtype: torch.dtype) -> Iterator[Trial]:
    """Trials for checks, with sizes that no block or vector divides."""
    new = partial(_Inputs, device, dtype, False)
    yield _dense(new(), 2, 37, 2, 64)
    yield _dense(new(), 1, 130, 2, 64, causal=True)
    yield _dense(new(), 3, 37, 2, 64, masked=True)
    yield _packed(new(), [5, 70, 1, 33], 2, 64)
    yield _packed(new(), [41, 3], 2, 64, causal=True)
    yield _single_query(new(), [5, 70, 1, 33], 2, 64)
    for batch in (37, 150):
        yield _clip(new(), batch, 72)
        yield _siglip(new(), batch, 72)
    yield _norm(new(), 37, 136, 0.0)
    yield _gelu(new(), 37, 136)
    if dtype != torch.float32:
        yield _linear(new(), 37, 72, 136)
        yield _linear(new(), 37, 72, 136, activated=True)
    if dtype == torch.float32 and (files := _files(2, (97, 61))):
        yield from _images(device, files, 32)


def results_of(function: Callable[..., Tensor | Tensors], tensors: Tensors) -> list[Tensor]:
    """The results of `function`, and the gradients of the tensors that require them."""
    returned = function(*tensors)
    results = [returned] if isinstance(returned, Tensor) else list(returned)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    if not leaves:
        return results
    differentiable = [result for result in results if result.requires_grad]
    # The upstream gradient varies, so that a kernel which ignores it fails.
    upstream = [
        torch.linspace(0.5, 1.5, result.numel(), dtype=torch.float32, device=result.device).view_as(result).to(result)
        for result in differentiable
    ]
    return [*(result.detach() for result in results), *torch.autograd.grad(differentiable, leaves, upstream)]


class _Inputs:
    """Draw a trial's tensors, the same ones each time, without touching torch's global generators."""

    def __init__(self, device: torch.device, dtype: torch.dtype, empty: bool) -> None:
        self.device, self.dtype, self.empty = device, dtype, empty

    def draw(
        self, *shapes: Sequence[int], dtypes: Sequence[torch.dtype | None] = (), unit: bool = False
    ) -> list[Tensor]:
        """Normal numbers, or rows of unit norm. They are rounded to bfloat16, which every dtype holds exactly."""
        generator = torch.Generator().manual_seed(0)
        tensors = []
        for i, shape in enumerate(shapes):
            dtype = (dtypes[i] if i < len(dtypes) else None) or self.dtype
            if self.empty:
                tensors.append(torch.empty(*shape, dtype=dtype, device=self.device).requires_grad_())
                continue
            values = torch.randn(*shape, generator=generator, device="cpu")
            values = F.normalize(values, dim=-1) if unit else values
            rounded = values.bfloat16() if self.dtype != torch.float16 else values.half().bfloat16()
            tensors.append(rounded.to(self.device, dtype).requires_grad_())
        return tensors

    def trial(
        self,
        operator: str,
        what: str,
        make: Make,
        call: Callable[..., Tensor | Tensors],
        definition: Callable[..., Tensor | Tensors],
    ) -> Trial:
        return Trial(operator, f"{what} {dtype_name(self.dtype)}", self.device, self.dtype, make, call, definition)


def _dense(
    new: _Inputs, batch: int, tokens: int, heads: int, dim: int, causal: bool = False, masked: bool = False
) -> Trial:
    """With a mask, sequence i sees only its last i * tokens // batch keys."""
    shape = batch, tokens, 3, heads, dim
    mask = None
    if masked:
        visible = torch.arange(batch, device=new.device)[:, None] * tokens // batch
        mask = torch.arange(tokens, 0, -1, device=new.device) <= visible

    def definition(qkv: Tensor) -> Tensor:
        rows = None if mask is None else mask.flatten()
        reference = AttentionCall(qkv.flatten(0, 1), None, rows, tokens, causal, 0.0, None, dim**-0.5)
        return attention_reference.attention(reference)

    def call(backend: str, qkv: Tensor) -> Tensor:
        return fused_attention(qkv, mask, causal=causal, backend=backend).flatten(0, 1)

    what = f"{batch} x {tokens} x {heads} x {dim}" + (" with a mask" if masked else "")
    return new.trial("fused_attention", what, lambda: new.draw(shape), call, definition)


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _packed(new: _Inputs, lengths: list[int], heads: int, dim: int, causal: bool = False) -> Trial:
    bounds, longest, shape = _bounds(lengths, new.device), max(lengths), (sum(lengths), 3, heads, dim)

    def definition(qkv: Tensor) -> Tensor:
        reference = AttentionCall(qkv, bounds, None, longest, causal, 0.0, None, dim**-0.5)
        return attention_reference.attention(reference)

    def call(backend: str, qkv: Tensor) -> Tensor:
        return varlen_attention(qkv, bounds, longest, causal=causal, backend=backend)

    what = f"{len(lengths)} sequences of at most {longest} x {heads} x {dim}"
    return new.trial("varlen_attention", what, lambda: new.draw(shape), call, definition)


def _single_query(new: _Inputs, lengths: list[int], heads: int, dim: int) -> Trial:
    bounds = _bounds(lengths, new.device)
    rows = bounds[:-1].long()
    shapes = (len(lengths), heads, dim), (sum(lengths), 2, heads, dim)

    def definition(query: Tensor, key_value: Tensor) -> Tensor:
        reference = SingleQueryCall(query, key_value, rows, bounds, False, 0.0, None, dim**-0.5)
        return single_query_reference.attention(reference)

    def call(backend: str, query: Tensor, key_value: Tensor) -> Tensor:
        return single_query_attention(query, key_value, rows, bounds, backend=backend)

    what = f"{len(lengths)} queries x {heads} x {dim}"
    return new.trial("pooled_attention", what, lambda: new.draw(*shapes), call, definition)


def _clip(new: _Inputs, batch: int, width: int) -> Trial:
    def make() -> list[Tensor]:
        scale = torch.tensor(20.0, device=new.device).requires_grad_()
        return [*new.draw((batch, width), (batch, width), unit=True), scale]

    def call(backend: str, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return clip_loss(image, text, scale, backend=backend)

    def definition(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return contrastive_reference.dense(image, text, scale.to(image.dtype))

    return new.trial("clip_loss", f"{batch} pairs of {width}", make, call, definition)


def _siglip(new: _Inputs, batch: int, width: int) -> Trial:
    def make() -> list[Tensor]:
        scalars = (torch.tensor(value, device=new.device).requires_grad_() for value in (10.0, -10.0))
        return [*new.draw((batch, width), (batch, width), unit=True), *scalars]

    def call(backend: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return siglip_loss(image, text, scale, bias, backend=backend)

    def definition(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        dtype = image.dtype
        return contrastive_reference.dense_siglip(image, text, scale.to(dtype), bias.to(dtype))

    return new.trial("siglip_loss", f"{batch} pairs of {width}", make, call, definition)


def _norm(new: _Inputs, rows: int, width: int, dropout_p: float) -> Trial:
    """add_norm as the towers call it: stream and parameters in float32, branch and result in the trial's dtype."""
    wide = torch.float32
    shapes = (rows, width), (rows, width), (width,), (width,)

    def call(backend: str, stream: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
        return add_norm(stream, branch, weight, bias, 1e-6, dropout_p=dropout_p, dtype=new.dtype, backend=backend)

    def definition(stream: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
        total = stream + branch.to(stream.dtype)
        normed = F.layer_norm(total, total.shape[1:], weight, bias, 1e-6)
        return normed.to(branch.dtype), total

    what = f"{rows} x {width}" + (f", dropout {dropout_p}" if dropout_p else "")
    dtypes = wide, new.dtype, wide, wide
    return new.trial("add_norm", what, lambda: new.draw(*shapes, dtypes=dtypes), call, definition)


def _gelu(new: _Inputs, rows: int, width: int) -> Trial:
    return new.trial(
        "gelu",
        f"{rows} x {width}",
        lambda: new.draw((rows, width)),
        lambda backend, x: gelu(x, backend=backend),
        F.gelu,
    )


def _linear(new: _Inputs, rows: int, width: int, columns: int, activated: bool = False) -> Trial:
    """linear or linear_gelu with float32 weights, like the towers under autocast."""
    shapes, dtypes = ((rows, width), (columns, width), (columns,)), (None, torch.float32, torch.float32)

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
        return F.gelu(result) if activated else result

    def call(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (linear_gelu if activated else linear)(x, weight, bias, backend=backend)

    what = f"{rows} x {width} to {columns}"
    return new.trial(
        "linear_gelu" if activated else "linear", what, lambda: new.draw(*shapes, dtypes=dtypes), call, definition
    )


def _files(number: int, size: tuple[int, int]) -> list[bytes]:
    """JPEG files of smooth noise. Without Pillow, which is the reference, the list is empty."""
    try:
        from PIL import Image
    except ImportError:
        return []
    noise = torch.rand(number, 24, 32, 3, generator=torch.Generator().manual_seed(0), device="cpu")
    files = []
    for pixels in (noise * 255).byte():
        out = io.BytesIO()
        Image.frombytes("RGB", (32, 24), bytes(pixels.flatten().tolist())).resize(size).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


def _images(device: torch.device, files: list[bytes], size: int) -> Iterator[Trial]:
    def decoded(backend: str) -> list[Tensor]:
        return [decode(data, backend=backend) for data in files]

    def resized(backend: str) -> Tensor:
        out = torch.empty(len(files), size, size, 3, dtype=torch.uint8, device=device)
        pixels, errors = decode_resize(files, size, out=out, backend=backend)
        if errors:
            raise ValueError(f"a valid file is refused: {errors}")
        return pixels

    def normalised(backend: str) -> Tensor:
        pixels, errors = decode_resize_normalize(files, size, device=device, backend=backend)
        if errors:
            raise ValueError(f"a valid file is refused: {errors}")
        # Scale to about levels, the unit of the other operators' errors.
        return pixels * 64

    calls: dict[str, Callable[[str], Tensor | Tensors]] = {
        "image.decode_resize": resized,
        "image.decode_resize_normalize": normalised,
    }
    if device.type == "cpu":
        calls = {"image.decode": decoded, **calls}
    for operator, call in calls.items():
        what = f"{len(files)} files" + ("" if operator == "image.decode" else f" to {size} x {size}")
        yield Trial(operator, what, device, torch.float32, list, call, None)

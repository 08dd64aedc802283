"""A call of each operator in each class of shapes, which `bclip tune` times, and small ones that check kernels.

The truth of a check is the operator's definition in float64, on inputs that every dtype holds exactly; the yardstick is
what the definition errs in the kernel's own dtype on the same device.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import fused_attention, varlen_attention
from .attention import reference as attention_reference
from .attention.single_query import pooled_attention
from .attention.single_query import reference as pooled_reference
from .contrastive import clip_loss, siglip_loss
from .contrastive import reference as contrastive_reference
from .dispatch import Decision, explain
from .image import decode, decode_resize, decode_resize_normalize
from .matmul import linear
from .pointwise import add_norm, gelu

# A backend passes if the norm of its error is at most twice the yardstick's, or this many unit roundoffs of the norm.
FACTOR = 2.0
ROUNDOFFS = 8.0

Tensors = Sequence[Tensor]
Make = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Trial:
    """One call of an operator.

    `make` gives its tensors, of which those that require gradients get some; `call(backend, *tensors)` gives its
    results; `definition`, of the same tensors in any dtype, is None for what has no float64 form.
    """

    operator: str
    what: str  # for people
    device: torch.device
    dtype: torch.dtype
    make: Make
    call: Callable[..., Tensor | Tensors]
    definition: Callable[..., Tensor | Tensors] | None

    def decide(self, *, check: bool = False) -> Decision:
        """What `auto` takes for the call."""
        tensors = self.make()
        with torch.enable_grad():
            return explain(lambda: self.call("auto", *tensors), check=check)

    def run(self, backend: str, tensors: Tensors) -> list[Tensor]:
        """Results and gradients."""
        return _run(partial(self.call, backend), tensors)


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    low = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.bfloat16,)
    return torch.float32, *low


def timed(device: torch.device, dtype: torch.dtype, *, empty: bool = False) -> Iterator[Trial]:
    """A trial for each operator and class of shapes, of a size that a step of training has.

    Args:
        empty: tensors are not filled, for those who ask only what a call would take.
    """
    new = partial(_Inputs, device, dtype, empty)
    more = 1 if device.type == "cpu" or empty else 8
    for dim in (64, 96):
        yield _dense(new(), 4 * more, 197, 12 * 64 // dim, dim)
        yield _dense(new(), more, 768, 12 * 64 // dim, dim)
        yield _packed(new(), more * [256, 77, 107, 28, 93, 19, 51, 18], 12 * 64 // dim, dim)
        yield _packed(new(), more * [640, 77, 307, 28], 12 * 64 // dim, dim)
    yield _pooled(new(), more * [256, 77, 107, 28, 93, 19, 51, 18], 12, 64)
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
    if dtype == torch.float32 and (files := _files(8, (640, 480))):
        yield from _images(device, files, 224)


def small(device: torch.device, dtype: torch.dtype) -> Iterator[Trial]:
    """Trials of sizes that divide nothing, for checks."""
    new = partial(_Inputs, device, dtype, False)
    yield _dense(new(), 2, 37, 2, 64)
    yield _dense(new(), 1, 130, 2, 64, causal=True)
    yield _packed(new(), [5, 70, 1, 33], 2, 64)
    yield _packed(new(), [41, 3], 2, 64, causal=True)
    yield _pooled(new(), [5, 70, 1, 33], 2, 64)
    for batch in (37, 150):
        yield _clip(new(), batch, 72)
        yield _siglip(new(), batch, 72)
    yield _norm(new(), 37, 136, 0.0)
    yield _gelu(new(), 37, 136)
    if dtype != torch.float32:
        yield _linear(new(), 37, 72, 136)
    if dtype == torch.float32 and (files := _files(2, (97, 61))):
        yield from _images(device, files, 32)


def decisions(device: torch.device, *, check: bool = False) -> Iterator[Decision]:
    """What `auto` takes on the device, for every operator, dtype and class of shapes."""
    for dtype in dtypes(device):
        for trial in timed(device, dtype, empty=True):
            yield trial.decide(check=check)


def check(operator: str, backend: str, device: torch.device, dtype: torch.dtype | None) -> tuple[str, bool]:
    """What is wrong with the backend's kernels on the device, "" for nothing, and whether that is worth keeping.

    Out of memory is a fault of the moment. An operator or dtype without trials passes.
    """
    drawn = torch.float32 if operator.startswith("image") else dtype
    if drawn is None or drawn not in dtypes(device):
        return "", True
    for trial in small(device, drawn):
        if trial.operator == operator and (fault := fault_of(trial, backend)):
            return fault, "out of memory" not in fault
    return "", True


def fault_of(trial: Trial, backend: str) -> str:
    """What is wrong with the backend's results and gradients of this call, "" for nothing."""
    # The caller may compute without gradients, in another precision or with counted random numbers.
    autocast = torch.autocast(trial.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), autocast:
        tensors = trial.make()
        try:
            own = trial.run(backend, tensors)
            if trial.device.type == "cuda":
                torch.cuda.synchronize(trial.device)
        except Exception as raised:  # whatever a compiler, driver or kernel raises
            lines = str(raised).strip().splitlines() or [""]
            return f"{type(raised).__name__}: {lines[0]}"
        if trial.definition is None:
            return _image_fault(own, trial.run("reference", tensors))
        exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
        truth = _run(trial.definition, exact)
        eager = _run(trial.definition, tensors)
    leaves = [tensor for tensor in exact if tensor.requires_grad]
    num_results = len(truth) - len(leaves)
    names = [*("the result" for _ in range(num_results)), *(f"gradient {i}" for i in range(len(leaves)))]
    for i, (name, true) in enumerate(zip(names, truth, strict=True)):
        magnitude = true.norm()
        if i >= num_results and true.ndim == 0:
            # A sum whose terms cancel is as exact as its terms.
            terms = (truth[num_results] * leaves[0]).abs().sum() / leaves[i - num_results].detach().abs()
            magnitude = torch.maximum(magnitude, terms)
        error, usual = ((found.double() - true).norm() / magnitude for found in (own[i], eager[i]))
        allowed = max(FACTOR * usual.item(), ROUNDOFFS * torch.finfo(trial.dtype).eps / 2)
        if not error.item() <= allowed:
            return f"{name} of {trial.what} is off by {error.item():.2g} of its norm, {allowed:.2g} is allowed"
    return ""


def _run(function: Callable[..., Tensor | Tensors], tensors: Tensors) -> list[Tensor]:
    found = function(*tensors)
    results = [found] if isinstance(found, Tensor) else list(found)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    if not leaves:
        return results
    wanted = [result for result in results if result.requires_grad]
    # Not constant, so that a kernel which forgets its factor shows.
    upstream = [
        torch.linspace(0.5, 1.5, result.numel(), dtype=torch.float32, device=result.device).view_as(result).to(result)
        for result in wanted
    ]
    return [*(result.detach() for result in results), *torch.autograd.grad(wanted, leaves, upstream)]


class _Inputs:
    """Draws a trial's tensors, the same ones each time, without touching torch's generators."""

    def __init__(self, device: torch.device, dtype: torch.dtype, empty: bool) -> None:
        self.device, self.dtype, self.empty = device, dtype, empty

    def draw(
        self, *shapes: Sequence[int], dtypes: Sequence[torch.dtype | None] = (), unit: bool = False
    ) -> list[Tensor]:
        """Normal numbers, or rows of unit norm, rounded to bfloat16, whose few digits every dtype holds."""
        generator = torch.Generator().manual_seed(0)
        found = []
        for i, shape in enumerate(shapes):
            dtype = (dtypes[i] if i < len(dtypes) else None) or self.dtype
            if self.empty:
                found.append(torch.empty(*shape, dtype=dtype, device=self.device).requires_grad_())
                continue
            values = torch.randn(*shape, generator=generator, device="cpu")
            values = F.normalize(values, dim=-1) if unit else values
            rounded = values.bfloat16() if self.dtype != torch.float16 else values.half().bfloat16()
            found.append(rounded.to(self.device, dtype).requires_grad_())
        return found

    def trial(
        self,
        operator: str,
        what: str,
        make: Make,
        call: Callable[..., Tensor | Tensors],
        definition: Callable[..., Tensor | Tensors],
    ) -> Trial:
        name = str(self.dtype).removeprefix("torch.")
        return Trial(operator, f"{what} {name}", self.device, self.dtype, make, call, definition)


def _dense(new: _Inputs, batch: int, tokens: int, heads: int, dim: int, causal: bool = False) -> Trial:
    shape = batch, tokens, 3, heads, dim

    def definition(qkv: Tensor) -> Tensor:
        rows = qkv.flatten(0, 1)
        return attention_reference.attention(rows, None, None, tokens, causal, 0.0, None, dim**-0.5)

    def call(backend: str, qkv: Tensor) -> Tensor:
        return fused_attention(qkv, causal=causal, backend=backend).flatten(0, 1)

    what = f"{batch} x {tokens} x {heads} x {dim}"
    return new.trial("fused_attention", what, lambda: new.draw(shape), call, definition)


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _packed(new: _Inputs, lengths: list[int], heads: int, dim: int, causal: bool = False) -> Trial:
    bounds, longest, shape = _bounds(lengths, new.device), max(lengths), (sum(lengths), 3, heads, dim)

    def definition(qkv: Tensor) -> Tensor:
        return attention_reference.attention(qkv, bounds, None, longest, causal, 0.0, None, dim**-0.5)

    def call(backend: str, qkv: Tensor) -> Tensor:
        return varlen_attention(qkv, bounds, longest, causal=causal, backend=backend)

    what = f"{len(lengths)} sequences of at most {longest} x {heads} x {dim}"
    return new.trial("varlen_attention", what, lambda: new.draw(shape), call, definition)


def _pooled(new: _Inputs, lengths: list[int], heads: int, dim: int) -> Trial:
    bounds = _bounds(lengths, new.device)
    rows = bounds[:-1].long()
    shapes = (len(lengths), heads, dim), (sum(lengths), 2, heads, dim)

    def definition(query: Tensor, key_value: Tensor) -> Tensor:
        return pooled_reference.attention(query, key_value, rows, bounds, False, 0.0, None, dim**-0.5)

    def call(backend: str, query: Tensor, key_value: Tensor) -> Tensor:
        return pooled_attention(query, key_value, rows, bounds, backend=backend)

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
    """As the towers call it: the stream and the parameters in float32, the branch and the result in the dtype."""
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


def _linear(new: _Inputs, rows: int, width: int, columns: int) -> Trial:
    """With float32 weights, as the towers have them under autocast."""
    shapes, dtypes = ((rows, width), (columns, width), (columns,)), (None, torch.float32, torch.float32)

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    def call(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(x, weight, bias, backend=backend)

    what = f"{rows} x {width} to {columns}"
    return new.trial("linear", what, lambda: new.draw(*shapes, dtypes=dtypes), call, definition)


def _files(number: int, size: tuple[int, int]) -> list[bytes]:
    """JPEGs of smooth noise; none without Pillow, which then is no backend either."""
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
            raise ValueError(f"a sound file is refused: {errors}")
        return pixels

    def normalised(backend: str) -> Tensor:
        found, errors = decode_resize_normalize(files, size, device=device, backend=backend)
        if errors:
            raise ValueError(f"a sound file is refused: {errors}")
        # In levels, roughly, as the others.
        return found * 64

    calls: dict[str, Callable[[str], Tensor | Tensors]] = {
        "image.decode_resize": resized,
        "image.decode_resize_normalize": normalised,
    }
    if device.type == "cpu":
        calls = {"image.decode": decoded, **calls}
    for operator, call in calls.items():
        what = f"{len(files)} files" + ("" if operator == "image.decode" else f" to {size} x {size}")
        yield Trial(operator, what, device, torch.float32, list, call, None)


def _image_fault(own: Tensors, true: Tensors) -> str:
    """Decoders and filters may differ by a level or two, where chroma jumps by more."""
    for mine, wanted in zip(own, true, strict=True):
        error = (mine.float() - wanted.float()).abs().mean().item()
        if not error <= 2.0:
            return f"pixels are off by {error:.3g} levels in the mean, 2 are allowed"
    return ""

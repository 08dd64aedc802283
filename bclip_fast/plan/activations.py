"""The memory that a training step needs for activations. The model itself runs on tensors without storage.

The measurement counts the tensors that the operators save for their backward passes, and the temporary tensors. So it
holds for any model, precision and length of captions, without a second description of the towers. It ignores memory
that a kernel allocates inside itself. Our own kernels take some MiB.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bclip_fast import ops
from bclip_fast.model import coca, cross_attention, transformer, vision
from bclip_fast.model import text as text_towers
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.packed import Packed
from bclip_fast.ops import processor

Gradients = Literal["allocated", "present", "collected"]
"""How the gradients exist: the backward pass allocates them, an earlier micro-batch did, or the engine collects each in
its buffers."""


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch. Weights, inputs and other memory that lasts from step to step are not included.

    image, text, decoder: saved for the backward pass, by tower and by the caption decoder.
    embed: peak of a forward pass without graph, while the gradients are "present".
    step: peak of forward and backward pass, with the gradients that the backward pass allocates.
    """

    image: int
    text: int
    embed: int
    step: int
    decoder: int = 0

    @property
    def saved(self) -> int:
        """All bytes that are saved for the backward pass."""
        return self.image + self.text + self.decoder


def measure_activations(
    model: BiomedClip,
    lengths: Sequence[int],
    *,
    precision: str,
    gradients: Gradients = "allocated",
    accelerator: bool = False,
) -> Activations:
    """The activations of a micro-batch.

    Args:
        model: model, which may be on the device "meta".
        lengths: number of tokens of each pair's caption.
        accelerator: whether torch casts the weights of linear layers and keeps the copies until the end of the backward
            pass. On a CPU with AMX, or without bfloat16 instructions, our operator needs no copies.
    """
    with _fake_model(model, lengths, precision, accelerator, gradients) as (network, meter, inputs):
        if gradients == "present":
            with torch.no_grad():
                _outputs = network.encode_image(inputs[0]), network.encode_text(inputs[1])
        embed, meter.peak = meter.peak, meter.now
        saved, outputs = _forward(network, meter, *inputs)
        outputs = [tensor for tensor in outputs if tensor.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
        return Activations(saved[0], saved[1], embed, meter.peak, sum(saved[2:]))


def measure_saved(
    model: BiomedClip, lengths: Sequence[int], *, precision: str, accelerator: bool = False
) -> tuple[int, int]:
    """`image` and `text` of `measure_activations`, without the backward pass."""
    with _fake_model(model, lengths, precision, accelerator) as (network, meter, inputs):
        saved, _ = _forward(network, meter, *inputs)
        return saved[0], saved[1]


def _forward(network: BiomedClip, meter: MemoryMeter, images: Tensor, text: Packed) -> tuple[list[int], list[Tensor]]:
    """Run the model forward as training does: the bytes that each part saves, and the outputs of all parts."""
    marks, outputs = [meter.now], [network.encode_image(images)] if network.decoder is None else []
    if network.decoder is None:
        marks.append(meter.now)
        outputs.append(network.encode_text(text))
    else:
        features, tokens = network.visual(images, captions=True)
        outputs.append(functional.normalize(features, dim=-1))
        marks.append(meter.now)
        features, states = network.text(text, captions=True)
        outputs.append(functional.normalize(features, dim=-1))
        marks.append(meter.now)
        outputs.append(network.decoder(tokens, states, text, ignored=network.config.text.pad_id))
    marks.append(meter.now)
    return [after - before for before, after in itertools.pairwise(marks)], outputs


@contextlib.contextmanager
def _fake_model(
    model: BiomedClip, lengths: Sequence[int], precision: str, accelerator: bool, gradients: Gradients = "allocated"
) -> Iterator[tuple[BiomedClip, MemoryMeter, tuple[Tensor, Packed]]]:
    """Yield (model, byte counter, inputs) for a copy of the model in train mode whose tensors have no storage."""
    network = copy.deepcopy(model).train()
    # An accelerator always uses the library's products.
    library_linear = functools.partial(ops.linear, backend="reference")
    with contextlib.ExitStack() as stack:
        if accelerator:
            for source in (transformer, vision, text_towers, coca, cross_attention):
                stack.enter_context(mock.patch.object(source, "linear", library_linear))
            library_gelu = functools.partial(_linear_gelu, library_linear)
            stack.enter_context(mock.patch.object(transformer, "linear_gelu", library_gelu))
            stack.enter_context(mock.patch.object(processor, "BFLOAT16_INSTRUCTIONS", "an accelerator's"))
        stack.enter_context(FakeTensorMode())
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    # to_empty would fail, because the mode accepts no "meta" tensor from outside.
                    module._parameters[name] = _fake_parameter(parameter, gradients)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(buffer.shape)
        side = model.config.vision.image_size
        images = torch.empty((len(lengths), side, side, 3), dtype=torch.uint8)
        text = Packed.of(torch.empty(sum(lengths), dtype=torch.int64), lengths)
        meter = stack.enter_context(MemoryMeter(network, images, *text[:2]))
        # Both half precisions take the same memory, and the CPU's operators support bfloat16.
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"))
        yield network, meter, (images, text)


def _linear_gelu(linear: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.gelu(linear(x, weight, bias))


def _fake_parameter(parameter: Tensor, gradients: Gradients) -> nn.Parameter:
    fake = nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad)
    if fake.requires_grad and gradients == "present":
        fake.grad = torch.empty_like(fake)
    if fake.requires_grad and gradients == "collected":
        fake.register_post_accumulate_grad_hook(_drop_grad)
    return fake


class MemoryMeter(TorchDispatchMode):
    """Count the bytes of the storages that operators create.

    now: bytes of the live storages.
    peak: largest value of `now` so far.

    Args:
        network: module whose parameters, buffers and gradients do not count.
        ignored: other tensors that do not count.
    """

    def __init__(self, network: nn.Module, *ignored: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        gradients = (p.grad for p in network.parameters() if p.grad is not None)
        for tensor in (*ignored, *network.parameters(), *network.buffers(), *gradients):
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage)
                weakref.finalize(storage, self._free, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def _drop_grad(parameter: Tensor) -> None:
    parameter.grad = None

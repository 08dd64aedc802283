"""What a training step holds at its peak, without holding it: the model itself runs on tensors that have no storage.

So the bytes of activations are those that the operators save for their backward passes and what lives for a moment
between them, for any model, precision and length of captions, and no second description of the towers has to agree
with them. What a kernel takes inside itself isn't seen; our own take some MiB.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bclip_fast import ops
from bclip_fast.model import text as text_towers
from bclip_fast.model import transformer, vision
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.packed import Packed
from bclip_fast.ops import processor

Gradients = Literal["grow", "there", "taken"]


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch beyond weights, inputs and what else lives from step to step.

    image, text: kept for the backward pass, by tower. embed: at the peak of a pass without one, where gradients are
    "there" from others. step: at the peak of forward and backward, with the gradients that appear meanwhile.
    """

    image: int
    text: int
    embed: int
    step: int


def activations(
    model: BiomedClip,
    lengths: Sequence[int],
    *,
    precision: str,
    gradients: Gradients = "grow",
    accelerator: bool = False,
) -> Activations:
    """Of len(lengths) pairs whose captions have so many tokens, on their way through `model`, which may be on "meta".

    Args:
        gradients: "grow" as each is computed, are "there" from a micro-batch before, or are "taken" away at once, as
            by an engine that collects them in buffers of its own.
        accelerator: torch casts the weights of linear layers and keeps the copies until the backward pass is through;
            on a CPU with AMX, or without bfloat16 instructions, our operator spares them.
    """
    with _without_storage(model, lengths, precision, accelerator, gradients) as (network, held, encode):
        if gradients == "there":
            with torch.no_grad():
                _ = encode[0](), encode[1]()
        embed, held.peak = held.peak, held.now
        image, text, outputs = _forward(held, encode)
        outputs = [tensor for tensor in outputs if tensor.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
        return Activations(image, text, embed, held.peak)


def kept(model: BiomedClip, lengths: Sequence[int], *, precision: str, accelerator: bool = False) -> tuple[int, int]:
    """`image` and `text` of `activations`, without the backward pass."""
    with _without_storage(model, lengths, precision, accelerator) as (_, held, encode):
        image, text, _ = _forward(held, encode)
        return image, text


Encode = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def _forward(held: _Held, encode: Encode) -> tuple[int, int, list[Tensor]]:
    before = held.now
    outputs = [encode[0]()]
    between = held.now
    outputs.append(encode[1]())
    return between - before, held.now - between, outputs


@contextlib.contextmanager
def _without_storage(
    model: BiomedClip, lengths: Sequence[int], precision: str, accelerator: bool, gradients: Gradients = "grow"
) -> Iterator[tuple[BiomedClip, _Held, Encode]]:
    """A copy of the model in training, what counts its bytes, and how it embeds images and captions."""
    network = copy.deepcopy(model).train()
    # An accelerator takes the library's products, whatever this machine's CPU would take.
    plain = functools.partial(ops.linear, backend="reference")
    with contextlib.ExitStack() as stack:
        if accelerator:
            for user in (transformer, vision, text_towers):
                stack.enter_context(mock.patch.object(user, "linear", plain))
            stack.enter_context(mock.patch.object(processor, "BFLOAT16_INSTRUCTIONS", "an accelerator's"))
        stack.enter_context(FakeTensorMode())
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    # Not by to_empty: the mode takes no tensor on "meta" from outside.
                    module._parameters[name] = _fake(parameter, gradients)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(buffer.shape)
        side = model.config.vision.image_size
        images = torch.empty((len(lengths), side, side, 3), dtype=torch.uint8)
        text = Packed.of(torch.empty(sum(lengths), dtype=torch.int64), lengths)
        held = stack.enter_context(_Held(network, images, *text[:2]))
        # Half precisions take the same room, and operators for a CPU know one of them.
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"))
        yield network, held, (lambda: network.encode_image(images), lambda: network.encode_text(text))


def _fake(parameter: Tensor, gradients: Gradients) -> nn.Parameter:
    fake = nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad)
    if fake.requires_grad and gradients == "there":
        fake.grad = torch.empty_like(fake)
    if fake.requires_grad and gradients == "taken":
        fake.register_post_accumulate_grad_hook(_take)
    return fake


class _Held(TorchDispatchMode):
    """Bytes of the storages that operators make and that still live; those of `known` count for nothing.

    now, peak: at this moment and at most so far.
    """

    def __init__(self, network: nn.Module, *known: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        gradients = (p.grad for p in network.parameters() if p.grad is not None)
        for tensor in (*known, *network.parameters(), *network.buffers(), *gradients):
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


def _take(parameter: Tensor) -> None:
    parameter.grad = None

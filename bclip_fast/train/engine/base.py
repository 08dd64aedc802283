"""The interface of an engine, and the parts that DDP and DeepSpeed share.

Both engines keep fp32 parameters, compute under autocast and use the same optimiser. They export the optimiser state
by parameter name. So a checkpoint fits any engine, ZeRO stage and number of ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from bclip_fast import distributed
from bclip_fast.model.packed import Packed
from bclip_fast.model.transformer import PreProjection
from bclip_fast.train.transfers import AsyncRead

from .optimizer import OptimizerState

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """The outcome of an update.

    grad_norm: norm of the averaged gradient of all parameters, before clipping.
    skipped: True if nothing was updated, because the norm is not finite or above the limit.
    overflow: True if the step was skipped because the loss scale of fp16 was too large. It is smaller now.
    """

    grad_norm: float
    skipped: bool
    overflow: bool = False

    @classmethod
    def of(cls, grad_norm: float, skipped: float, overflow: float) -> StepResult:
        """The result with these values of `StepTensors`."""
        return cls(grad_norm, bool(skipped), bool(overflow))


@dataclass(frozen=True)
class StepTensors:
    """The outcome of an update as scalars on the device: `StepResult` before the host reads it.

    grad_norm: any floating dtype.
    skipped, overflow: float32, 1 or 0.
    """

    grad_norm: Tensor
    skipped: Tensor
    overflow: Tensor

    @property
    def scalars(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `StepResult`, in order."""
        return self.grad_norm, self.skipped, self.overflow


class Engine(ABC):
    """A model with its optimiser, on all ranks.

    A training step is `engine(image, text)`, a loss, `backward(loss)` or `accumulate`, and `step(lr, limit)`.
    """

    device: torch.device
    module: nn.Module
    """The module that runs forward. Its parameters may be sharded, and their names may have a prefix."""
    _model: nn.Module
    _saved_statistics: list[Tensor]
    """Copies of the statistics of batch norms after the last update. Each rank has its own values: training never reads
    them."""

    def __call__(self, image: Tensor | PreProjection, text: Packed | PreProjection, **options: bool) -> Outputs:
        """Run the model forward. `options` are further arguments of its forward pass."""
        return self.module(image, text, **options)

    def pre_projection(self) -> tuple[Tensor | None, Tensor | None]:
        """The last pre-projection features (b, width) of the image and the text tower.

        None for a tower that trains a layer before its projection.
        """
        model: Any = self._model
        return model.visual.pre_projection, model.text.pre_projection

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the loss, averaged over the ranks."""

    @abstractmethod
    def accumulate(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Compute the gradients of the sum of the losses, averaged over the ranks.

        Args:
            losses: functions that run forward and return a scalar loss. Each is called after the backward pass of the
                one before.

        The ranks communicate once, at the end. Until then each rank holds its gradients unsharded, under ZeRO 2 and 3
        too.
        """

    def is_trainable(self, prefix: str) -> bool:
        """Whether a trainable parameter of the model has a name with this prefix."""
        return any(part.requires_grad for name, part in self._model.named_parameters() if name.startswith(prefix))

    def step(self, lr: float, limit: float = math.inf, allowed: Tensor | None = None) -> StepResult:
        """`start_step`, and the outcome. The host waits for it."""
        return StepResult.of(*AsyncRead(self.start_step(lr, limit, allowed).scalars).numbers())

    def start_step(self, lr: float, limit: float = math.inf, allowed: Tensor | None = None) -> StepTensors:
        """Clip the gradients, update the weights and clear the gradients, without a wait for the device.

        Refuse the update if the norm of the gradient is not finite or above `limit`, or if `allowed` is false. Then
        the weights stay, and the statistics of batch norms are restored from before the step. The device decides that.

        Two engines make the host wait nevertheless. DeepSpeed's ZeRO 1 to 3 reads whether the norm is finite. An
        optimiser on the host reads the decision.

        Args:
            lr: learning rate.
            limit: largest norm that may update, the same on all ranks.
            allowed: boolean scalar on the device, the same on all ranks. None: true.
        """
        outcome = self._start_step(lr, limit, allowed)
        statistics = persistent_buffers(self._model).values()
        for buffer, saved in zip(statistics, self._saved_statistics, strict=True):
            buffer.copy_(torch.where(outcome.skipped > 0, saved, buffer))
            saved.copy_(buffer)
        return outcome

    @abstractmethod
    def _start_step(self, lr: float, limit: float, allowed: Tensor | None) -> StepTensors:
        """The part of `start_step` that concerns the parameters."""

    def _statistics_after_update(self) -> dict[str, Tensor]:
        """The statistics of batch norms by name, as the last update left them. A forward pass changes the model's."""
        return dict(zip(persistent_buffers(self._model), self._saved_statistics, strict=True))

    def communication(self) -> dict[str, float]:
        """The metric communication_seconds: how long the second-to-last backward pass waited for gradient all-reduces.

        It lags one step so that reading it never synchronises. Empty under DeepSpeed, which doesn't report it.
        """
        return {}

    @abstractmethod
    def model_state(self) -> dict[str, Tensor]:
        """The gathered fp32 state of the model on the CPU, under the model's names. Empty except on rank 0. Collective.

        The buffers, statistics of batch norms, are those of rank 0.
        """

    def local_weights(self) -> dict[str, Tensor]:
        """The fp32 trainable weights and buffers whose EMA this rank stores.

        Rank 0 stores all of them, except under ZeRO 3, where every rank stores its own shard.
        """
        if not distributed.is_main():
            return {}
        weights = {name: part.detach() for name, part in self._model.named_parameters() if part.requires_grad}
        return weights | self._statistics_after_update()

    def local_shard(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a gathered tensor that corresponds to `local_weights()[name]`, as a copy on its device."""
        weight = attrgetter(name)(self._model)
        return tensor.to(weight.device, torch.float32, copy=True).view_as(weight)

    def gather_weights(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `local_shard`: gathered tensors on the CPU. Empty except on rank 0. Collective."""
        return {name: to_cpu(tensor) for name, tensor in shards.items()}

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """The gathered state of the optimiser. Its moments are empty except on rank 0. Collective."""

    @abstractmethod
    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Restore `optimizer_state()`. Every rank passes the gathered state.

        Load the model's weights before you build the engine.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the engine's memory. The engine cannot be used afterwards."""


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of the model's state by name: the statistics of batch norms, and no constants."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """A detached copy on the CPU."""
    return tensor.detach().to("cpu", copy=True)


def to_cpu(tensor: Tensor) -> Tensor:
    """A detached fp32 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True)

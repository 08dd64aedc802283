"""The exponential moving average of the trained weights, in fp32."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from .engine.deepspeed import Engine

log = logging.getLogger(__name__)


class Average:
    """average <- decay * average + (1 - decay) * weight after each update, beginning at the weights as they are.

    Rank 0 keeps it whole, which costs it 4 bytes a weight and no communication; under ZeRO 3 each rank keeps that of
    its own shard. Locked weights have none, being their own average; the statistics of batch norms have one.

    Args:
        decay: in (0, 1).
        saved: what `state` gave on rank 0, on every rank; a weight that isn't in it begins as it is.
    """

    def __init__(self, engine: Engine, decay: float, saved: Mapping[str, Tensor]) -> None:
        self._engine, self._decay = engine, decay
        self._average = {
            name: engine.own_part(name, saved[name]) if name in saved else weight.clone()
            for name, weight in engine.own_weights().items()
        }
        log.info("average of weights, decay %g, %s", decay, "continued" if saved else "from the weights as they are")

    @torch.no_grad()
    def update(self) -> None:
        if self._average:
            weights = self._engine.own_weights()
            torch._foreach_lerp_(list(self._average.values()), list(weights.values()), 1 - self._decay)

    def state(self) -> dict[str, Tensor]:
        """The average by the name of the weight, whole, on the CPU; empty except on rank 0. Collective."""
        return self._engine.whole_weights(self._average)

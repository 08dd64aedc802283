"""The exponential moving average (EMA) of the trainable weights, in fp32."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from bclip_fast.errors import UserError

from .engine import Engine

log = logging.getLogger(__name__)


class Ema:
    """The EMA of the weights: ema <- decay * ema + (1 - decay) * weight after each update.

    Rank 0 stores it unsharded, which takes 4 bytes a weight and no communication. Under ZeRO 3, each rank stores the
    EMA of its shard. Locked weights have no EMA, because they never change. The statistics of batch norms have one.

    Args:
        decay: factor in (0, 1).
        saved: `state()` of rank 0, passed on every rank. Empty for a new EMA, which starts at the current weights.
        grows: whether `saved` may lack weights. They start at their current values.

    Raises:
        UserError: `saved` lacks a weight, and `grows` is false.
    """

    def __init__(self, engine: Engine, decay: float, saved: Mapping[str, Tensor], grows: bool = False) -> None:
        self._engine, self._decay = engine, decay
        weights = engine.local_weights()
        missing = [name for name in weights if name not in saved] if saved else []
        if missing and not grows:
            raise UserError(f"the checkpoint's EMA has no {missing[0]}; resume from another checkpoint")
        self._ema = {
            name: engine.local_shard(name, saved[name]) if name in saved else weight.clone()
            for name, weight in weights.items()
        }
        if missing:
            log.warning("the EMA of %d weights starts at their current values, first %s", len(missing), missing[0])
        log.info("EMA with decay %g, %s", decay, "resumed" if saved else "starting at the current weights")

    @torch.no_grad()
    def update(self) -> None:
        """Move the EMA towards the current weights."""
        if self._ema:
            weights = self._engine.local_weights()
            torch._foreach_lerp_(list(self._ema.values()), list(weights.values()), 1 - self._decay)

    def state(self) -> dict[str, Tensor]:
        """The gathered EMA by name of the weight, on the CPU. Empty except on rank 0. Collective."""
        return self._engine.gather_weights(self._ema)

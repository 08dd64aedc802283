"""Which steps are not taken: a loss or a gradient that isn't finite, or one far above those of the last updates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bclip_fast.errors import UserError

from .engine.deepspeed import StepResult

# A curve that has flattened to its rounding errors must not make spikes of them.
_LEAST_DEVIATION = 0.01


@dataclass(frozen=True)
class SpikeConfig:
    """Steps that are skipped: nothing is updated, the step counts, the data go on. One whose loss or gradient isn't
    finite always is."""

    window: int = 128
    """Updates that a step is held against; the two limits wait until there are that many."""
    loss: float = 16.0
    """A loss above the window's median + this many median absolute deviations is a spike; 0: none is."""
    grad_norm: float = 64.0
    """Likewise a norm of the gradient, before clipping."""
    max_skipped: int = 10
    """More skipped steps than this among the last `window` stop the run and leave dumps/step-XXXXXXXX."""

    def __post_init__(self) -> None:
        if self.window < 1 or min(self.loss, self.grad_norm, self.max_skipped) < 0:
            raise UserError(
                f"spikes.window={self.window}, spikes.loss={self.loss}, spikes.grad_norm={self.grad_norm}, "
                f"spikes.max_skipped={self.max_skipped}: need window at least 1, the others not negative"
            )


class Spikes:
    """The rule. Every rank comes to the same answer: the loss leaves an all-reduce, and so do the gradients, or their
    norm, so all hold the same numbers.

    A window is of one global batch size, as the loss of an untrained model is its logarithm: another size begins anew.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self._config = config
        self._batch_size = 0
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._steps: list[int] = []
        self.num_skipped = 0
        """Since the run began."""

    def limit(self, loss: float, batch_size: int) -> float:
        """The largest gradient norm that may update in a step of this loss and global batch; -1: none may."""
        if batch_size != self._batch_size:
            self._batch_size, self._losses, self._norms = batch_size, [], []
        return self._limit(self._norms, self._config.grad_norm) if self._is_sound(loss) else -1.0

    def _is_sound(self, loss: float) -> bool:
        return math.isfinite(loss) and loss <= self._limit(self._losses, self._config.loss)

    def _limit(self, values: list[float], factor: float) -> float:
        if factor == 0 or len(values) < self._config.window:
            return math.inf
        median = statistics.median(values)
        deviation = statistics.median(abs(value - median) for value in values)
        return median + factor * max(deviation, _LEAST_DEVIATION * abs(median))

    def observe(self, step: int, loss: float, result: StepResult) -> str | None:
        """Takes note of a step, from 1: why it was skipped, None where it wasn't or fp16's scale was at fault."""
        if result.overflow and math.isfinite(loss):
            return None
        if not result.skipped:
            size = self._config.window
            self._losses, self._norms = [*self._losses, loss][-size:], [*self._norms, result.grad_norm][-size:]
            return None
        self.num_skipped += 1
        self._steps = [old for old in [*self._steps, step] if old > step - self._config.window]
        name, value, values, factor = "loss", loss, self._losses, self._config.loss
        if self._is_sound(loss):
            name, value, values, factor = "gradient's norm", result.grad_norm, self._norms, self._config.grad_norm
        limit = self._limit(values, factor)
        return f"the {name} is {value:.6g}" + (f", the limit {limit:.6g}" if math.isfinite(value) else "")

    @property
    def too_many(self) -> bool:
        return len(self._steps) > self._config.max_skipped

    def __str__(self) -> str:
        return f"{len(self._steps)} of the last {self._config.window} steps were skipped, the last one"

    def state_dict(self) -> dict[str, Any]:
        return {
            "batch_size": self._batch_size,
            "losses": self._losses,
            "grad_norms": self._norms,
            "steps": self._steps,
            "skipped": self.num_skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        size = self._config.window
        self._batch_size, self.num_skipped = state["batch_size"], state["skipped"]
        self._losses, self._norms = state["losses"][-size:], state["grad_norms"][-size:]
        self._steps = list(state["steps"])

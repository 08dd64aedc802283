"""Loss spikes: steps without an update, because the loss or the gradient norm is not finite or is far too high."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bclip_fast.errors import UserError

from .engine import StepResult

# Smallest median absolute deviation, as a share of the median. Without it, the rounding errors of a flat curve would
# be spikes.
_MIN_DEVIATION = 0.01


@dataclass(frozen=True)
class SpikeConfig:
    """Steps to skip. A skipped step updates nothing, but it counts, and its samples are consumed. Steps whose loss or
    gradient is not finite are always skipped."""

    window: int = 128
    """Number of recent updates with which a step is compared. The limits apply after that many updates."""
    loss: float = 16.0
    """Limit of the loss: the window's median + this many median absolute deviations. 0 turns this off."""
    grad_norm: float = 64.0
    """Limit of the gradient norm before clipping, in the same way. 0 turns this off."""
    max_skipped: int = 10
    """Largest number of skipped steps among the last `window`. With more, the run stops and writes
    dumps/step-XXXXXXXX."""

    def __post_init__(self) -> None:
        if self.window < 1 or min(self.loss, self.grad_norm, self.max_skipped) < 0:
            raise UserError(
                f"spikes.window={self.window} must be at least 1, and spikes.loss={self.loss}, "
                f"spikes.grad_norm={self.grad_norm} and spikes.max_skipped={self.max_skipped} must not be negative"
            )


class LossSpikes:
    """Decides which steps to skip.

    Every rank decides alike, because loss and gradient norm come from all-reduces and so are the same on all ranks. A
    change of the global batch size B clears the window, because the loss depends on it: an untrained model has ln B.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self._config = config
        self._batch_size = 0
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._steps: list[int] = []
        self.num_skipped = 0
        """Number of skipped steps since the start of the run."""

    def limits(self, batch_size: int) -> tuple[float, float]:
        """The largest loss and the largest gradient norm that may update in a step with this global batch size.

        Every step before it must have been observed. A loss or norm that is not finite never updates.
        """
        if batch_size != self._batch_size:
            self._batch_size, self._losses, self._norms = batch_size, [], []
        config = self._config
        return self._limit(self._losses, config.loss), self._limit(self._norms, config.grad_norm)

    def _is_sound(self, loss: float) -> bool:
        return math.isfinite(loss) and loss <= self._limit(self._losses, self._config.loss)

    def _limit(self, values: list[float], factor: float) -> float:
        if factor == 0 or len(values) < self._config.window:
            return math.inf
        median = statistics.median(values)
        deviation = statistics.median(abs(value - median) for value in values)
        return median + factor * max(deviation, _MIN_DEVIATION * abs(median))

    def observe(self, step: int, loss: float, result: StepResult) -> str | None:
        """Record a step, counted from 1. Return why it was skipped.

        None if it was not skipped, or only because of fp16's loss scale.
        """
        if result.overflow and math.isfinite(loss):
            return None
        if not result.skipped:
            size = self._config.window
            self._losses, self._norms = [*self._losses, loss][-size:], [*self._norms, result.grad_norm][-size:]
            return None
        self.num_skipped += 1
        self._steps = [skipped for skipped in [*self._steps, step] if skipped > step - self._config.window]
        name, value, values, factor = "loss", loss, self._losses, self._config.loss
        if self._is_sound(loss):
            name, value, values, factor = "gradient norm", result.grad_norm, self._norms, self._config.grad_norm
        limit = self._limit(values, factor)
        return f"the {name} is {value:.6g}" + (f", above the limit {limit:.6g}" if math.isfinite(value) else "")

    def may_end_run(self, step: int) -> bool:
        """Whether the run gives up if step number `step`, the next to be observed, is skipped."""
        recent = sum(skipped > step - self._config.window for skipped in self._steps)
        return self.too_many or recent >= self._config.max_skipped

    @property
    def too_many(self) -> bool:
        """Whether too many of the last steps were skipped."""
        return len(self._steps) > self._config.max_skipped

    def __str__(self) -> str:
        return f"{len(self._steps)} of the last {self._config.window} steps were skipped, the last one"

    def state_dict(self) -> dict[str, Any]:
        """The window and the skipped steps, as JSON."""
        return {
            "batch_size": self._batch_size,
            "losses": self._losses,
            "grad_norms": self._norms,
            "steps": self._steps,
            "skipped": self.num_skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`."""
        size = self._config.window
        self._batch_size, self.num_skipped = state["batch_size"], state["skipped"]
        self._losses, self._norms = state["losses"][-size:], state["grad_norms"][-size:]
        self._steps = list(state["steps"])

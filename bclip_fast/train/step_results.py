"""The results of the training steps: the EMA, skipped steps and lines of metrics that follow from them.

On a CPU, the host reads a step's results at its end. On a GPU, it reads them one step late. By then it has queued the
next step's forward and backward pass, so the device always has work. It reads them before the next step's update.
Training gives the same result, because nothing needs the results earlier:

- The limits of an update (loss_spikes.py) depend on the steps before it. The device itself compares the loss and the
  gradient norm with the limits.
- The EMA takes the weights after a step, and they don't change until the next update.
- Validation, checkpoints, and the end of a run call `finish` first.

If a step may end the run, the host reads its results at its end on a GPU too. The dump needs the step's batches.
Fine-tuning always does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bclip_fast.errors import UserError
from bclip_fast.io.runs import MEMBER_SAMPLES

from .ema import Ema
from .engine import StepResult
from .loss_spikes import LossSpikes
from .metrics import MetricsLog
from .progress import Progress
from .transfers import AsyncRead

log = logging.getLogger(__name__)

# Time that a run waits for the results of its last step after an error.
_GRACE_S = 10.0

GiveUp = Callable[[int, float, StepResult, str, Any], str]


@dataclass
class PendingStep:
    """A step whose results the host has not read yet.

    step: number of the step, from 1.
    epoch: number of the pass over the data.
    samples: samples consumed by the run so far.
    batch_size, num_tokens: size of the global batch.
    lr: learning rate.
    start: start of the step, by `time.perf_counter()`.
    data_wait: seconds for which this rank waited for its batches.
    parts: function that returns the seconds of the step's parts, as `StepTimer.finish` returns it.
    communication: `Engine.communication()`.
    peak_memory: bytes.
    num_bad: number of different damaged samples so far.
    least_seconds: seconds that the step takes at the device's peak rate. None if the rate is unknown.
    tensors: loss, the scalars of `StepTensors`, and those of `names`.
    names: further keys of the line.
    member_samples: samples of each dataset of a mixture consumed by the run so far.
    seconds: duration of the step. 0 means that the step ends with the call of `record`.
    """

    step: int
    epoch: int
    samples: int
    batch_size: int
    num_tokens: int
    lr: float
    start: float
    data_wait: float
    parts: Callable[[], dict[str, float]]
    communication: dict[str, float]
    peak_memory: int
    num_bad: int
    least_seconds: float | None
    tensors: AsyncRead
    names: tuple[str, ...] = ()
    member_samples: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def record(self, loss: float, grad_norm: float, num_skipped: int, more: dict[str, float]) -> dict[str, Any]:
        """The step's line of metrics.jsonl. metrics.py explains its keys."""
        seconds = self.seconds or time.perf_counter() - self.start
        return {
            "step": self.step,
            "epoch": self.epoch,
            "samples": self.samples,
            **{f"{MEMBER_SAMPLES}{name}": count for name, count in self.member_samples.items()},
            "loss": loss,
            "lr": self.lr,
            **more,
            "grad_norm": grad_norm,
            "samples_per_second": self.batch_size / seconds,
            "tokens_per_second": self.num_tokens / seconds,
            **({} if self.least_seconds is None else {"mfu": self.least_seconds / seconds}),
            "step_seconds": seconds,
            "data_wait_seconds": self.data_wait,
            **self.parts(),
            **self.communication,
            "peak_memory_bytes": self.peak_memory,
            "bad_samples": self.num_bad,
            "skipped": num_skipped,
        }


class StepResults:
    """Read the results of each step, update the EMA, record skipped steps, and write the line of metrics.

    Every rank needs an object and calls its methods in the same steps.

    Args:
        reads_late: whether to read a step's results during the next step.
        give_up: function of (step, loss, result, reason, inputs) that all ranks call after too many skipped steps. It
            returns why the run must end.
    """

    outputs: tuple[MetricsLog | None, Progress | None, Callable[[dict[str, Any]], None] | None] = None, None, None
    """Log, progress bar and function that get the lines of metrics. Only rank 0 has them."""

    def __init__(self, spikes: LossSpikes, ema: Ema | None, reads_late: bool, give_up: GiveUp) -> None:
        self._spikes, self._ema, self._reads_late, self._give_up = spikes, ema, reads_late, give_up
        self._pending: PendingStep | None = None

    def add(self, pending: PendingStep, inputs: Any = None) -> None:
        """Add a step after `finish()` for the step before. Read it now, or during the next step.

        Args:
            inputs: inputs of the step, for `give_up`.

        Raises:
            UserError: too many steps were skipped.
        """
        self._pending = pending
        if not self._reads_late or self._spikes.may_end_run(pending.step):
            self.finish(inputs)
        else:
            pending.seconds = time.perf_counter() - pending.start

    def finish(self, inputs: Any = None) -> None:
        """Read the results of the pending step, if there is one, and wait for them."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        loss, grad_norm, skipped, overflow, *more = pending.tensors.numbers()
        result = StepResult.of(grad_norm, skipped, overflow)
        if self._ema is not None and not result.skipped:
            self._ema.update()
        failure = self._observe(pending.step, loss, result, inputs)
        metrics, progress, on_step = self.outputs
        if metrics is not None and progress is not None:
            names = dict(zip(pending.names, more, strict=True))
            record = pending.record(loss, grad_norm, self._spikes.num_skipped, names)
            metrics.write(record)
            progress.update(record)
            if on_step is not None:
                on_step(record)
        if failure:
            raise UserError(failure)

    def finish_after_error(self) -> None:
        """Call `finish()`, unless the device no longer answers."""
        if self._pending is None:
            return
        step = self._pending.step
        try:
            if self._pending.tensors.is_complete(_GRACE_S):
                self.finish()
        except Exception as error:
            log.warning("the metrics of step %d cannot be read: %s", step, error)

    def _observe(self, step: int, loss: float, result: StepResult, inputs: Any) -> str:
        """Log the step if it was skipped. After too many skips, return why the run must end."""
        reason = self._spikes.observe(step, loss, result)
        if not result.skipped:
            return ""
        reason = reason or "the fp16 gradient overflowed"
        metrics = self.outputs[0]
        if metrics is not None:
            log.warning("step %d is skipped: %s", step, reason)
            metrics.event(step, "skip", reason=reason)
        if not self._spikes.too_many:
            return ""
        return self._give_up(step, loss, result, f"{self._spikes} at step {step}: {reason}", inputs)

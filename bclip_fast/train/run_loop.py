"""The steps of a run from its first to its last, with the parts that pretraining and fine-tuning share.

These are the records of the run, damaged samples, skipped steps, signals, checkpoints and the end after an error. A
subclass makes the steps.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from bclip_fast import distributed
from bclip_fast.data.batch import BadRecord
from bclip_fast.distributed import run_on_rank0
from bclip_fast.errors import UserError

from . import checkpoint as checkpoints
from .background_writer import BackgroundWriter
from .bad_samples import BadSamples
from .ema import Ema
from .engine import Engine
from .loss_spikes import LossSpikes, SpikeConfig
from .metrics import MetricsLog
from .progress import Progress
from .run_folder import RunFolder
from .signals import EXIT_STOPPED, Signals
from .step_results import GiveUp, StepResults

log = logging.getLogger(__name__)

OnStep = Callable[[dict[str, Any]], None]


class RunLoop(ABC):
    """A run on this rank. Use it as a context manager. The constructor and `_build` write nothing.

    Attributes:
        step: number of steps so far.
        num_steps: length of the run.
    """

    engine: Engine
    num_steps: int
    bad: BadSamples
    results: StepResults

    def __init__(
        self, folder: RunFolder, spikes: SpikeConfig, signals: Signals, background: bool, on_step: OnStep | None = None
    ) -> None:
        self.folder, self.signals, self.on_step = folder, signals, on_step
        self.step = folder.records.step if folder.records else 0
        self.saved_step = self.step
        self.spikes = LossSpikes(spikes)
        self.ema: Ema | None = None
        self.metrics: MetricsLog | None = None
        self.progress: Progress | None = None
        self.writer = BackgroundWriter(background) if distributed.is_main() else None
        self._logs = contextlib.ExitStack()
        self.stopped = False
        self.problem: UserError | None = None
        """Error of the data, after which the run saves a checkpoint and ends."""

    @abstractmethod
    def _begin(self) -> tuple[MetricsLog | None, BadSamples]:
        """Begin to write the folder, and return its logs. Collective."""

    def _prepare(self) -> bool:
        """Write what the first step needs. Return False if a signal stopped a rank before that. Collective."""
        return True

    @abstractmethod
    def _samples_before(self, step: int) -> int:
        """Number of samples in the first `step` steps."""

    @abstractmethod
    def _train_step(self) -> None:
        """Train one step and add 1 to `step`. Or set `stopped`, if a signal or the data stop the run before the step.

        Raises:
            UserError: too many steps were skipped.
        """

    @abstractmethod
    def _is_checkpoint_due(self) -> bool:
        """Whether to save a checkpoint after this step. Collective."""

    @abstractmethod
    def _checkpoint(self) -> Callable[[], None]:
        """Copy the state, and return a function that writes it. Collective. Only rank 0 calls the function."""

    @abstractmethod
    def _end(self) -> None:
        """Write the results of a complete run. Collective."""

    @abstractmethod
    def _close(self) -> None:
        """Close the inputs."""

    def _observe_with(self, reads_late: bool, give_up: GiveUp) -> None:
        """Set `results`, after `engine` and `ema`."""
        self.results = StepResults(self.spikes, self.ema, reads_late, give_up)

    def loop(self) -> None:
        """Train to the last step, or until a signal stops the run.

        Raises:
            UserError: a rank cannot read its data, too many samples are damaged, too many steps were skipped, or the
                last checkpoint cannot be written. If the data are the cause, the run has a checkpoint.
            SystemExit: with EXIT_STOPPED, if a signal stopped the run.
        """
        self.metrics, self.bad = self._begin()
        self._logs.callback(self.bad.close)
        if distributed.is_main():
            self.progress = Progress(self.num_steps, *map(self._samples_before, (self.step, self.num_steps)))
        self.results.outputs = self.metrics, self.progress, self.on_step
        self.stopped = not self._prepare()
        while self.step < self.num_steps:
            if not self.stopped:
                self._train_step()
            if self.stopped:
                self.results.finish()
                if self.metrics is not None and self.problem is None:
                    self.metrics.event(self.step, "stop")
                break
            if self._is_checkpoint_due():
                self._save()
        self.results.finish()
        if self.step and self.saved_step != self.step:
            self._save()
        self._finish_writing()
        if self.problem is not None:
            saved = f"; step {self.step} is saved, and --resume continues from there" if self.step else ""
            raise UserError(f"{self.problem}{saved}") from self.problem
        if self.stopped:
            if distributed.is_main():
                log.warning("stopped after step %d of %d; --resume continues the run", self.step, self.num_steps)
            raise SystemExit(EXIT_STOPPED)
        self._end()

    def _finish_writing(self) -> None:
        try:
            run_on_rank0(lambda: self.writer.finish() if self.writer else None)
        except UserError as error:
            raise UserError(f"{self.problem}; {error}" if self.problem else str(error)) from error

    def _agree(self, bad: Sequence[BadRecord], problem: str | None) -> bool:
        """Whether all ranks go on with the step. If not, `stopped` is set. Collective.

        A rank without a batch reports its problem to the others, which would otherwise wait for it in a collective.

        Args:
            bad: damaged samples of this rank's batch.
            problem: error of this rank, if it has no batch.
        """
        try:
            self.stopped = self.bad.agree(self.step + 1, list(bad), problem, bool(self.signals.received))
        except UserError as error:
            # Every rank has this error, so all can save the steps so far.
            self.problem, self.stopped = error, True
        return not self.stopped

    def _save(self) -> None:
        """Start to write a checkpoint. Rank 0 copies the state after the previous checkpoint is written."""
        self.results.finish()
        if self.writer is not None:
            self.writer.wait()
        write = self._checkpoint()
        step = self.saved_step = self.step

        def write_and_log() -> None:
            write()
            if self.metrics is not None:
                self.metrics.event(step, "checkpoint")

        if self.writer is not None:
            self.writer.submit(write_and_log)

    def load_weights(self, model: Any, saved: checkpoints.Checkpoint) -> None:
        """Load the weights of a checkpoint, and the state of the skipped steps.

        Raises:
            UserError: the checkpoint is of another model.
        """
        if problem := checkpoints.misfit(saved.model, model.state_dict()):
            raise UserError(f"cannot resume {self.folder.path}: its checkpoint is of another model: {problem}")
        model.load_state_dict(saved.model)
        if "spikes" in saved.rest:
            self.spikes.load_state_dict(saved.rest["spikes"])
        log.info("resuming after step %d", saved.step)

    def __enter__(self) -> RunLoop:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self.writer is not None and kind is not KeyboardInterrupt:
            self.writer.wait()
        self._close()
        self._logs.close()
        if self.metrics is not None:
            if error is not None and kind is not SystemExit:
                self.results.finish_after_error()
                self.metrics.event(self.step, "error", reason=f"{type(error).__name__}: {error}")
            self.metrics.close()
        if self.progress is not None:
            self.progress.close()
        self.engine.close()

"""The metrics of a run: metrics.jsonl, events.jsonl, TensorBoard and Weights & Biases.

A step's line of metrics.jsonl has these keys:

    step, epoch, samples, loss, lr, logit_scale
    samples/NAME                            samples of each dataset so far, if data.shards lists several
    contrastive_loss, distill_loss          terms of the loss with a teacher
    contrastive_loss, caption_loss          terms of the loss of a CoCa, with their weights
    grad_norm                               before clipping
    shared_positives                        number of pairs with more than one positive, unless data.positives is pair
    samples_per_second, tokens_per_second   over all ranks; the tokens are estimated from those of rank 0
    mfu                                     of rank 0, if the peak rate of its device is known
    step_seconds                            of the host, which on a GPU waits in each step for the step before
    data_wait_seconds, forward_seconds, loss_seconds, backward_seconds, optimizer_seconds
                                            parts of the step on rank 0 (step_timer.py), by the GPU's clock if there
                                            is one; backward includes GradCache's second forward pass
    communication_seconds                   see Engine.communication
    peak_memory_bytes                       peak of rank 0 so far, on its GPU if it has one
    bad_samples                             number of different damaged samples so far, over all ranks
    skipped                                 number of steps so far that the section `spikes` skipped
"""

from __future__ import annotations

import logging
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError
from bclip_fast.io.atomic import write_text
from bclip_fast.io.jsonl import JsonLinesWriter, truncate_after_step
from bclip_fast.io.runs import EVENTS, METRICS

from .config import LogConfig

log = logging.getLogger(__name__)


class MetricsLog:
    """Writes the metrics of each step to RUN/metrics.jsonl, RUN/tb and Weights & Biases, and events to
    RUN/events.jsonl.

    Args:
        folder: run folder.
        first_step: step after which the run continues. Lines of later steps are removed: a run that stopped after its
            last checkpoint left them. Their events stay.
        config: whether to use Weights & Biases.
        settings: configuration of the run, for Weights & Biases.

    Raises:
        UserError: `config.wandb` is set, but wandb is not installed or cannot be started.
    """

    def __init__(
        self, folder: Path, first_step: int, config: LogConfig | None = None, settings: dict[str, Any] | None = None
    ) -> None:
        path = folder / METRICS
        # It can fail, and metrics.jsonl must then be as it was.
        self._wandb = _start_wandb(folder, config, settings or {}) if config is not None and config.wandb else None
        truncate_after_step(path, first_step)
        self._lines = JsonLinesWriter(path)
        self._events = JsonLinesWriter(folder / EVENTS)
        self._former_hook = threading.excepthook
        threading.excepthook = self._report_thread
        self._board = _start_tensorboard(folder / "tb", first_step)

    def write(self, record: dict[str, Any]) -> None:
        """Write one line of metrics. `record` has a key "step"."""
        self._lines.write(record)
        scalars = {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
        if self._board is not None:
            try:
                for name, value in scalars.items():
                    self._board.add_scalar(name, value, record["step"])
            except OSError as error:
                _warn_of_tensorboard(error)
                self._board = None
        if self._wandb is not None:
            self._wandb.log(scalars, step=record["step"])

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """Write one line of events.jsonl: step, event, time (UTC) and `facts`."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._events.write({"step": step, "event": kind, "time": now, **facts})

    def close(self) -> None:
        """Close the files and end the wandb run."""
        self._lines.close()
        self._events.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                _warn_of_tensorboard(error)
        threading.excepthook = self._former_hook
        if self._wandb is not None:
            self._wandb.finish()

    def _report_thread(self, problem: threading.ExceptHookArgs) -> None:
        """Report a failed write of TensorBoard's thread in one line, and the failures of other threads as before."""
        error = problem.exc_value
        if type(problem.thread).__name__ == "_AsyncWriterThread" and isinstance(error, OSError):
            _warn_of_tensorboard(error)
        else:
            self._former_hook(problem)


def _start_tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed, so only metrics.jsonl has the metrics")
        return None
    try:
        return SummaryWriter(str(folder), purge_step=first_step + 1)
    except OSError as error:
        _warn_of_tensorboard(error)
        return None


def _warn_of_tensorboard(error: OSError) -> None:
    log.warning("TensorBoard's file cannot be written: %s; only metrics.jsonl has the rest of the run", error)


def _start_wandb(folder: Path, config: LogConfig, settings: dict[str, Any]) -> Any:
    """The wandb run of this run folder. RUN/wandb_id holds its id, so that a resumed run continues it.

    wandb requires increasing steps. A resumed run repeats some lines with the same values, and wandb drops them.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"log.wandb=true: {error}; pip install wandb, or set log.wandb=false") from error
    path = folder / "wandb_id"
    run_id = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    try:
        run = wandb.init(
            project=config.wandb_project,
            name=folder.name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=settings,
        )
    except Exception as error:
        raise UserError(
            f"log.wandb=true: wandb cannot be started ({error}); set WANDB_MODE=offline to run without network"
        ) from error
    write_text(path, run.id + "\n")
    return run

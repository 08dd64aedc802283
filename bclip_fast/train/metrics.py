"""Where the figures of a run go: metrics.jsonl, TensorBoard where it is installed, Weights & Biases, the terminal."""

from __future__ import annotations

import logging
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError
from bclip_fast.io.jsonl import JsonLinesWriter, truncate_after_step
from bclip_fast.io.runs import EVENTS, METRICS

from .config import LogConfig

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 15.0


class MetricsLog:
    """Appends a JSON object a line to RUN/metrics.jsonl, the same scalars to RUN/tb and Weights & Biases, and what
    happens to a run besides steps to RUN/events.jsonl.

    Args:
        folder: the run folder.
        first_step: lines of later steps, which a run that stopped after its last checkpoint leaves, are removed. Events
            stay: they tell of those steps too.
        config: wandb or not.
        settings: the run's configuration, for Weights & Biases.

    Raises:
        UserError: wandb is wanted and not installed, or can't be started.
    """

    def __init__(
        self, folder: Path, first_step: int, config: LogConfig | None = None, settings: dict[str, Any] | None = None
    ) -> None:
        path = folder / METRICS
        truncate_after_step(path, first_step)
        self._wandb = _wandb(folder, config, settings or {}) if config is not None and config.wandb else None
        self._lines = JsonLinesWriter(path)
        self._events = JsonLinesWriter(folder / EVENTS)
        self._board = _tensorboard(folder / "tb", first_step)

    def write(self, record: dict[str, Any]) -> None:
        self._lines.write(record)
        scalars = {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
        if self._board is not None:
            try:
                for name, value in scalars.items():
                    self._board.add_scalar(name, value, record["step"])
            except OSError as error:
                log.warning("TensorBoard's file cannot be written: %s; it ends here, metrics.jsonl doesn't", error)
                self._board = None
        if self._wandb is not None:
            self._wandb.log(scalars, step=record["step"])

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """A line of events.jsonl: step, event, time (UTC) and what there is to say about it."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._events.write({"step": step, "event": kind, "time": now, **facts})

    def close(self) -> None:
        self._lines.close()
        self._events.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed; metrics go to metrics.jsonl alone")
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _wandb(folder: Path, config: LogConfig, settings: dict[str, Any]) -> Any:
    """The wandb run that belongs to this run folder: RUN/wandb_id keeps its name, so that a resumed run goes on in it.

    wandb keeps steps in order: lines that a resumed run writes a second time, the same as before, it leaves out.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"log.wandb: {error}; pip install wandb, or leave log.wandb out") from error
    path = folder / "wandb_id"
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    try:
        run = wandb.init(
            project=config.wandb_project,
            name=folder.name,
            id=known,
            resume="allow",
            dir=str(folder),
            config=settings,
        )
    except Exception as error:
        raise UserError(f"log.wandb: wandb can't be started ({error}); WANDB_MODE=offline needs no network") from error
    path.write_text(run.id + "\n", encoding="utf-8")
    return run


class Progress:
    """A bar where stderr is a terminal, a line now and then elsewhere.

    Args:
        first_sample, num_samples: where the run begins and ends; time goes by samples, since batches may grow.
    """

    def __init__(self, num_steps: int, first_sample: int, num_samples: int) -> None:
        self._num_steps, self._first_sample, self._num_samples = num_steps, first_sample, num_samples
        self._start = time.monotonic()
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("training"),
                progress.BarColumn(bar_width=None),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[figures]}"),
                console=Console(stderr=True),
                expand=True,
            )
            self._task = self._bar.add_task("training", total=num_samples, completed=first_sample, figures="")
            self._bar.start()

    def update(self, record: dict[str, Any]) -> None:
        step, figures = record["step"], describe(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["samples"], figures=f"{step}/{self._num_steps}  {figures}")
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._num_steps:
            self._last_line = time.monotonic()
            rate = (record["samples"] - self._first_sample) / (self._last_line - self._start)
            left = timedelta(seconds=round((self._num_samples - record["samples"]) / rate))
            log.info("step %d of %d  %s  %s left", step, self._num_steps, figures, left)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(record: dict[str, Any]) -> str:
    """The figures of a step in one line."""
    parts = [
        "loss {loss:.4f}  scale {logit_scale:.1f}  gradient {grad_norm:.3g}".format(**record),
        "{samples_per_second:,.0f} samples/s  {tokens_per_second:,.0f} tokens/s".format(**record),
    ]
    if "mfu" in record:
        parts.append("MFU {mfu:.0%}".format(**record))
    parts.append(f"waited {record['data_wait_seconds'] / record['step_seconds']:.0%}")
    return "  ".join(parts)

"""Validation during training: its schedule, its metrics, and the best value so far."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bclip_fast import distributed
from bclip_fast.data.transform import Preprocess
from bclip_fast.errors import UserError, choices
from bclip_fast.io.jsonl import read_lines
from bclip_fast.io.runs import METRICS, VALIDATION, VALIDATION_EMA
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.tokenizer import Tokenizer

from .config import TrainConfig, ValidationConfig
from .ema import Ema
from .engine import Engine
from .metrics import MetricsLog

log = logging.getLogger(__name__)

Validate = Callable[[BiomedClip, Preprocess, Tokenizer], dict[str, float]]


class ValidationSchedule:
    """Decides after which steps to validate. Build it on every rank, after `RunFolder.begin`.

    last_step: the latest step that was validated, -1 before the first.
    """

    def __init__(self, config: ValidationConfig, run: Path, num_steps: int) -> None:
        self._config, self._num_steps = config, num_steps
        self.last_step = distributed.broadcast_object(_last_validated_step(run) if distributed.is_main() else -1)

    def is_due(self, step: int, epoch: int, epoch_before: int) -> bool:
        """Whether to validate after `step` steps.

        Args:
            epoch: epoch of the next step.
            epoch_before: epoch of the last step.
        """
        config = self._config
        if (not config.every_steps and not config.every_epochs) or step == self.last_step:
            return False
        by_steps = config.every_steps > 0 and step % config.every_steps == 0
        by_epochs = config.every_epochs > 0 and epoch > epoch_before and epoch % config.every_epochs == 0
        return by_steps or by_epochs or step == self._num_steps


def _last_validated_step(run: Path) -> int:
    path = run / METRICS
    records = read_lines(path) if path.is_file() else []
    steps = (record["step"] for record in records if any(name.startswith(VALIDATION) for name in record))
    return max(steps, default=-1)


class BestMetric:
    """The best value so far of one validation metric.

    Args:
        name: name of the metric. A leading minus means that lower is better. If empty, nothing is ever an improvement.
    """

    def __init__(self, name: str) -> None:
        self._name = name.removeprefix("-")
        self._sign = -1 if name.startswith("-") else 1
        self.state: dict[str, Any] = {}
        """The best value and its step, for the checkpoint. Empty before the first validation."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `state`. The best value of another metric doesn't count."""
        self.state = dict(state) if state.get("figure") == self._name else {}

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the metrics of `step` improve on the best value.

        Raises:
            UserError: the metric is missing.
        """
        name = self._name
        if not name:
            return False
        if name not in metrics:
            raise UserError(f"checkpoint.best={name} is not a validation metric{choices(name, metrics)}")
        if self.state and self._sign * metrics[name] <= self._sign * self.state["value"]:
            return False
        self.state = {"step": step, "figure": name, "value": metrics[name]}
        return True


class Validator:
    """Validates the weights of a run, and their EMA.

    Args:
        config: configuration of the model.
        validate: function that returns the metrics of a model. Only rank 0 calls it.
        best: the best value so far.
    """

    def __init__(
        self,
        config: BiomedClipConfig,
        validate: Validate | None,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        best: BestMetric,
    ) -> None:
        self._config, self._validate, self._best = config, validate, best
        self._preprocess, self._tokenizer = preprocess, tokenizer

    def run(self, step: int, engine: Engine, ema: Ema | None, metrics: MetricsLog | None) -> bool:
        """Validate the weights and their EMA, and write the metrics. Collective.

        Returns:
            Whether the weights improve on the best value.
        """
        state = engine.model_state()
        values = distributed.run_on_rank0(lambda: self._run(step, state, engine.device, metrics, VALIDATION))
        if ema is not None:
            ema_state = {**state, **ema.state()}
            distributed.run_on_rank0(lambda: self._run(step, ema_state, engine.device, metrics, VALIDATION_EMA))
        return self._best.update(step, values)

    def _run(
        self, step: int, state: dict[str, Tensor], device: torch.device, metrics: MetricsLog | None, prefix: str
    ) -> dict[str, float]:
        start = time.perf_counter()
        with torch.device("meta"):
            model = BiomedClip(self._config)
        model.load_state_dict(state, assign=True)
        assert metrics is not None
        assert self._validate is not None
        values = self._validate(model.to(device).eval(), self._preprocess, self._tokenizer)
        record = {"step": step, "validation_seconds": time.perf_counter() - start}
        metrics.write(record | {f"{prefix}{name}": value for name, value in values.items()})
        shown = [f"{name} {value:.4g}" for name, value in values.items()][:8]
        log.info("step %d  %s%s", step, "  ".join(shown), "  ..." if len(values) > len(shown) else "")
        return values


def build_on_rank0(config: TrainConfig) -> Validate | None:
    """`build_validation` on rank 0, and None on the others. Every rank raises its UserError."""
    results: list[Validate] = []
    distributed.run_on_rank0(lambda: results.append(build_validation(config)))
    return results[0] if results else None


def build_validation(config: TrainConfig) -> Validate:
    """The standard validation: retrieval on held-out pairs, and zero-shot tasks, whose name precedes their metrics.

    It opens all data at once and keeps them open. So a wrong path raises an error before training.

    Raises:
        UserError: data, split or task do not exist, or the packages of bclip_fast[eval] are not installed.
    """
    try:
        from bclip_fast.eval import EvalConfig, Evaluation
    except ImportError as error:
        raise UserError(f"validation: {error}; pip install 'bclip_fast[eval]'") from error
    settings = config.validation
    options: dict[str, Any] = {
        "split": settings.split,
        "batch_size": settings.batch_size,
        "num_workers": config.data.num_threads,
        "progress": False,
        "cache": "none",
    }
    evaluations = [Evaluation(EvalConfig(task=("retrieval",), data=config.data.shards, **options))]
    if settings.zero_shot:
        data = settings.zero_shot_data or config.data.shards
        evaluations.append(Evaluation(EvalConfig(task=settings.zero_shot, data=data, **options)))
        for task, _ in evaluations[1].tasks:
            if task.protocol != "zero_shot":
                raise UserError(f"validation.zero_shot={task.name} is not a task of zero-shot classification")

    def validate(model: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer) -> dict[str, float]:
        metrics: dict[str, float | None] = {}
        for evaluation in evaluations:
            for name, result in evaluation.run((model, preprocess, tokenizer))["tasks"].items():
                prefix = "" if name == "retrieval" else f"{name} "
                metrics |= {f"{prefix}{metric['name']}": metric["value"] for metric in result["figures"]}
        return {name: value for name, value in metrics.items() if value is not None}

    return validate

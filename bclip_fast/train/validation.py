"""Validation while training: when it is due, and what it is: retrieval and zero-shot tasks by `bclip_fast.eval`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bclip_fast import distributed
from bclip_fast.data.transform import Preprocess
from bclip_fast.errors import UserError
from bclip_fast.io.jsonl import read_lines
from bclip_fast.io.runs import METRICS, VALIDATION
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer

from .config import TrainConfig, ValidationConfig

Validate = Callable[[BiomedClip, Preprocess, Tokenizer], dict[str, float]]


class Validation:
    """When the model is validated; made on every rank at once, after metrics.jsonl was cut.

    last_step: the latest step that was validated, -1 before.
    """

    def __init__(self, config: ValidationConfig, run: Path, num_steps: int) -> None:
        self._config, self._num_steps = config, num_steps
        self.last_step = distributed.broadcast_object(_last_step(run) if distributed.is_main() else -1)

    def is_due(self, step: int, epoch: int, epoch_before: int) -> bool:
        """After `step` steps, the next one being in `epoch` and the last one in `epoch_before`."""
        config = self._config
        if not config.every_steps and not config.every_epochs or step == self.last_step:
            return False
        by_steps = config.every_steps > 0 and step % config.every_steps == 0
        by_epochs = config.every_epochs > 0 and epoch > epoch_before and epoch % config.every_epochs == 0
        return by_steps or by_epochs or step == self._num_steps


def _last_step(run: Path) -> int:
    path = run / METRICS
    records = read_lines(path) if path.is_file() else []
    steps = (record["step"] for record in records if any(name.startswith(VALIDATION) for name in record))
    return max(steps, default=-1)


def standard(config: TrainConfig) -> Validate:
    """Retrieval on the held-out pairs, then the zero-shot tasks, whose figures are named by task and figure.

    All data are opened now and stay open, so that a wrong path costs no time.

    Raises:
        UserError: data, split or task that isn't there; the packages of evaluation are not installed.
    """
    try:
        from bclip_fast.eval import EvalConfig, Evaluation
    except ImportError as error:
        raise UserError(f"validation: {error}; pip install 'bclip_fast[eval]'") from error
    settings = config.validation
    options: dict[str, Any] = dict(
        split=settings.split,
        batch_size=settings.batch_size,
        num_workers=config.data.num_threads,
        progress=False,
        cache="none",
    )
    evaluations = [Evaluation(EvalConfig(task=("retrieval",), data=config.data.shards, **options))]
    if settings.zero_shot:
        data = settings.zero_shot_data or config.data.shards
        evaluations.append(Evaluation(EvalConfig(task=settings.zero_shot, data=data, **options)))
        wrong = [task.name for task, _ in evaluations[1].tasks if task.protocol != "zero_shot"]
        if wrong:
            raise UserError(f"validation.zero_shot={wrong[0]}: this task is no zero-shot classification")

    def validate(model: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer) -> dict[str, float]:
        figures: dict[str, float | None] = {}
        for evaluation in evaluations:
            for name, result in evaluation.run((model, preprocess, tokenizer))["tasks"].items():
                prefix = "" if name == "retrieval" else f"{name} "
                figures |= {f"{prefix}{each['name']}": each["value"] for each in result["figures"]}
        return {name: value for name, value in figures.items() if value is not None}

    return validate

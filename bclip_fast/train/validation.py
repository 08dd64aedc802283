"""Validation while training: when it is due, retrieval and zero-shot by `bclip_fast.eval`, and which step was best."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bclip_fast import distributed
from bclip_fast.data.transform import Preprocess
from bclip_fast.errors import UserError
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer

from .config import TrainConfig

PREFIX = "validation/"

Validate = Callable[[BiomedClip, Preprocess, Tokenizer], dict[str, float]]


class Validation:
    """When the model is validated and how it did; made on every rank at once, after metrics.jsonl was cut.

    Attributes:
        last_step: the latest step that was validated; -1: none yet.
        best: (step, value) of the best figure named by `validation.best`, of the first one where several are equal.
    """

    def __init__(self, config: TrainConfig, run: Path, num_steps: int) -> None:
        self.config = config.validation
        self.last_step = -1
        self.best: tuple[int, float] | None = None
        self._num_steps = num_steps
        for step, figures in distributed.broadcast_object(_lines(run) if distributed.is_main() else []):
            self.note(step, figures)

    def is_due(self, step: int, epoch: int, epoch_before: int) -> bool:
        """After `step` steps, the next one being in `epoch` and the one before in `epoch_before`."""
        config = self.config
        if not config.every_steps and not config.every_epochs or step == self.last_step:
            return False
        by_steps = config.every_steps > 0 and step % config.every_steps == 0
        by_epochs = config.every_epochs > 0 and epoch > epoch_before and epoch % config.every_epochs == 0
        return by_steps or by_epochs or step == self._num_steps

    def note(self, step: int, figures: dict[str, float]) -> bool:
        """Whether this is the best step so far.

        Raises:
            UserError: `validation.best` names none of the figures.
        """
        self.last_step = step
        config = self.config
        if not config.best:
            return False
        if config.best not in figures:
            known = ", ".join(figures)
            raise UserError(f"validation.best={config.best!r}: not among the figures of validation: {known}")
        value = figures[config.best]
        sign = 1 if config.best_is == "highest" else -1
        if self.best is not None and not sign * value > sign * self.best[1]:
            return False
        self.best = step, value
        return True

    def write_best(self, run: Path) -> None:
        assert self.best is not None
        step, value = self.best
        record = {"step": step, "figure": self.config.best, "value": value, "best_is": self.config.best_is}
        (run / "best.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def _lines(run: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, figures) of each validation in metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if PREFIX in line]
    return [
        (record["step"], {key.removeprefix(PREFIX): record[key] for key in record if key.startswith(PREFIX)})
        for record in records
    ]


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

"""Linear probes on frozen features: hyper-parameters are chosen on validation data, and the test set is used once.

The arithmetic is ELEVATER's: features are standardised, and a linear layer starts at the class embeddings of the text
tower. SGD with momentum 0.9 and weight decay trains it on batches of 64. The search covers six learning rates and, from
coarse to fine, 97 values of weight decay, with ten epochs per trial.

The use of the test set differs. ELEVATER reports the best of 50 test epochs. For comparison, `protocol="elevater"` does
the same. The default protocol chooses the number of epochs on validation data too, and then opens the test set once.

For multi-label samples, each class is a separate problem (binary relevance): logistic regression on the same features.
The macro AUROC chooses the hyper-parameters. As in MedMNIST (getAUC and getACC of its evaluator), the metrics are the
macro AUROC and the mean accuracy of the classes at probability 1/2.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.io.progress import track

from . import calibration, decision_curve, statistics, zero_shot
from .linear_heads import LabelledFeatures, LinearHeads

log = logging.getLogger(__name__)

Protocol = Literal["held_out", "elevater"]

LEARNING_RATES = tuple(10.0**i for i in range(-6, 0))
WEIGHT_DECAYS = tuple(float(value) for value in np.logspace(-6, 6, 97))
_COARSE, _REFINEMENTS = 16, (8, 4, 2, 1)
_TRIAL_EPOCHS, _FINAL_EPOCHS = 10, 50
_METRICS = {
    False: ("accuracy", "balanced accuracy", "ECE"),
    True: ("AUROC, macro", "accuracy", "ECE, mean over labels"),
}
"""Metrics of each setting, by whether a sample has several labels."""


@dataclass(frozen=True)
class Choice:
    """The hyper-parameters of the final run, chosen without the test set."""

    lr: float
    weight_decay: float
    num_epochs: int
    val_score: float


@dataclass
class HeldOutTestSet:
    """The test set. It opens only for a `Choice`, so that it cannot influence the hyper-parameters.

    num_opened: how often it was opened.
    """

    _test: LabelledFeatures
    num_opened: int = field(default=0)

    def open(self, choice: Choice) -> LabelledFeatures:
        """Return the test set. Raises RuntimeError without a `Choice`."""
        if not isinstance(choice, Choice):
            raise RuntimeError("the test set can only be opened after the hyper-parameters are chosen; pass a Choice")
        self.num_opened += 1
        return self._test


@torch.inference_mode()
def choose(
    train: LabelledFeatures,
    val: LabelledFeatures,
    init: Tensor,
    *,
    protocol: Protocol = "held_out",
    seed: int = 0,
) -> Choice:
    """Choose learning rate, weight decay and epochs by the score on `val`. On ties, the smallest rate wins.

    Each rate has its own search for the weight decay. It tries every 16th of the 97 values, then 8, 4, 2 and 1 steps to
    each side of the best one.
    """
    batch_statistics = protocol == "elevater"

    def trials(points: Sequence[tuple[int, int]], num_epochs: int, first_epoch: int = 1) -> Tensor:
        """Return the scores on val (epochs, points), from epoch `first_epoch` on."""
        pairs = [(LEARNING_RATES[rate], WEIGHT_DECAYS[decay]) for rate, decay in points]
        heads, val_scores = LinearHeads(pairs, init, batch_statistics), []

        def after_epoch(epoch: int) -> None:
            if epoch >= first_epoch:
                val_scores.append(heads.score(val))

        heads.train(train, num_epochs, seed, after_epoch)
        return torch.stack(val_scores)

    scores: dict[tuple[int, int], float] = {}

    def score(points: Sequence[tuple[int, int]]) -> None:
        new = [point for point in points if point not in scores]
        if new:
            scores.update(zip(new, trials(new, _TRIAL_EPOCHS, _TRIAL_EPOCHS)[0].tolist(), strict=True))

    rates = range(len(LEARNING_RATES))
    score([(rate, decay) for rate in rates for decay in range(0, len(WEIGHT_DECAYS), _COARSE)])

    def best_decay(rate: int) -> int:
        decays = sorted(decay for other, decay in scores if other == rate)
        return max(decays, key=lambda decay: scores[rate, decay])

    for step in _REFINEMENTS:
        score(
            [
                (rate, decay)
                for rate in rates
                for decay in (best_decay(rate) - step, best_decay(rate) + step)
                if 0 <= decay < len(WEIGHT_DECAYS)
            ]
        )
    point = max(sorted(scores), key=lambda point: scores[point])
    lr, decay = LEARNING_RATES[point[0]], WEIGHT_DECAYS[point[1]]
    if protocol == "elevater":
        return Choice(lr, decay, _FINAL_EPOCHS, scores[point])
    by_epoch = trials([point], _FINAL_EPOCHS)[:, 0]
    epoch = int(by_epoch.argmax())
    return Choice(lr, decay, epoch + 1, float(by_epoch[epoch]))


@torch.inference_mode()
def train_and_test(
    train: LabelledFeatures,
    val: LabelledFeatures,
    held_out: HeldOutTestSet,
    init: Tensor,
    choice: Choice,
    *,
    protocol: Protocol,
    seed: int,
) -> tuple[Tensor, int]:
    """Train a head on train and val together. Return its logits on the test set (N, C), and their epoch.

    Under `elevater` the epoch is the one with the best test score, so its score is optimistic.
    """
    heads = LinearHeads([(choice.lr, choice.weight_decay)], init, protocol == "elevater")
    test: LabelledFeatures | None = None
    best: tuple[float, Tensor, int] = (-1.0, torch.empty(0), 0)

    def after_epoch(epoch: int) -> None:
        nonlocal test, best
        if protocol == "held_out" and epoch < choice.num_epochs:
            return
        test = held_out.open(choice) if test is None else test
        score = float(heads.score(test))
        if score > best[0]:
            best = score, heads.logits(test.features)[0], epoch

    heads.train(train.concat(val), choice.num_epochs, seed, after_epoch)
    return best[1], best[2]


def subset(
    labels: Tensor,
    num_classes: int,
    *,
    train_fraction: float = 1.0,
    shots: int = 0,
    seed: int = 0,
    split: str = "training",
    class_names: Sequence[str] = (),
) -> Tensor:
    """Draw a random subset of rows: `shots` of each class, or `train_fraction` of each, but at least one.

    Multi-label samples are drawn without regard to their classes. `split` and `class_names` are for errors.

    Raises:
        UserError: a class has fewer than `shots` samples, or the samples are multi-label.
    """
    generator = torch.Generator().manual_seed(seed)
    if labels.ndim == 2:
        if shots:
            raise UserError("multi-label samples cannot be drawn by shots per class; use --share")
        num = max(1, round(len(labels) * train_fraction))
        return torch.randperm(len(labels), generator=generator)[:num].sort().values
    rows = []
    for number in range(num_classes):
        class_rows = (labels.cpu() == number).nonzero()[:, 0]
        num = shots or min(len(class_rows), max(1, round(len(class_rows) * train_fraction)))
        if num > len(class_rows):
            name = repr(class_names[number]) if class_names else number
            raise UserError(f"class {name} has only {len(class_rows)} {split} samples for {num} shots; use fewer")
        rows.append(class_rows[torch.randperm(len(class_rows), generator=generator)[:num]])
    return torch.cat(rows).sort().values


def measure(
    train: LabelledFeatures,
    val: LabelledFeatures,
    test: LabelledFeatures,
    class_names: Sequence[str],
    init: Tensor,
    *,
    train_fractions: Sequence[float] = (0.01, 0.1, 1.0),
    shots: Sequence[int] = (),
    num_seeds: int = 3,
    protocol: Protocol = "held_out",
    progress: bool = False,
) -> dict[str, Any]:
    """Train probes on subsets of the training data and report the mean and the standard deviation over seeds.

    The metrics are accuracy and balanced accuracy, or macro AUROC and mean accuracy for multi-label samples. Val is
    reduced like train: 1 % of train comes with 1 % of val. The deviation covers the draw of the subset and the order of
    the samples. Its denominator is n - 1.

    `progress` shows a bar of the probes.

    Returns:
        JSON-ready dict, as for zero-shot classification, of the last setting's first seed. In addition, `protocol`,
        `settings` with each seed's choice, and `figures` with the metrics of all settings.
    """
    for name, data in (("train", train), ("val", val), ("test", test)):
        if not len(data) or not bool(torch.isfinite(data.features).all()):
            raise UserError(f"the probe's {name} features must be non-empty and finite")
    num_classes, multi_label = len(class_names), test.labels.ndim == 2
    settings: list[tuple[str, dict[str, Any]]]
    settings = [(f"{100 * fraction:g} % of train", {"train_fraction": fraction}) for fraction in train_fractions]
    settings += [(f"{num} shots", {"shots": num}) for num in shots]
    rows: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    with track("probes", len(settings) * num_seeds, show=progress) as advance:
        for name, size in settings:
            runs = []
            for seed in range(num_seeds):
                train_part, val_part = (
                    data[subset(data.labels, num_classes, **size, seed=seed, split=split, class_names=class_names)]
                    for split, data in (("training", train), ("validation", val))
                )
                if seed == 0 and (num := len(train_part)) > 1.5 * size.get("train_fraction", 1.0) * len(train):
                    text = "probe: %s is %d of %d samples, because every class gives at least one"
                    log.warning(text, name, num, len(train))
                held_out = HeldOutTestSet(test)
                choice = choose(train_part, val_part, init, protocol=protocol, seed=seed)
                logits, epoch = train_and_test(
                    train_part, val_part, held_out, init, choice, protocol=protocol, seed=seed
                )
                targets, logits = test.labels.cpu(), logits.cpu()
                if multi_label:
                    probabilities = logits.double().sigmoid()
                    result = zero_shot.measure_multi_label(targets, logits.sigmoid(), class_names, threshold=0.5)
                else:
                    probabilities = logits.double().softmax(1)
                    result = zero_shot.measure(targets, logits.argmax(1), class_names, logits.softmax(1))
                calibration.add(result, targets.numpy(), probabilities.numpy(), class_names)
                if num_classes == 2 and not multi_label and seed == 0:
                    curve = decision_curve.measure(targets.numpy() == 1, probabilities[:, 1].numpy(), class_names[1])
                    result["decision_curve"] = curve
                details = result if seed == 0 else details
                advance()
                runs.append(
                    {
                        "seed": seed,
                        "lr": choice.lr,
                        "weight_decay": choice.weight_decay,
                        "epoch": epoch,
                        "val_score": choice.val_score,
                        "num_train": len(train_part),
                        "num_val": len(val_part),
                        **{metric["name"]: metric["value"] for metric in result["figures"]},
                    }
                )
            rows.append({"setting": name, "runs": runs})
            for kind in _METRICS[multi_label]:
                scores = [run[kind] for run in runs]
                mean = math.fsum(scores) / len(scores)
                deviation = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
                baseline = next(metric for metric in details["figures"] if metric["name"] == kind)
                metrics.append(
                    statistics.metric(
                        f"{kind}, {name}",
                        mean,
                        baseline["chance"],
                        baseline["chance_is"],
                        len(test),
                        deviation=deviation,
                        higher_is_better=baseline["higher_is_better"],
                    )
                )
    return details | {"protocol": protocol, "settings": rows, "figures": metrics}


def text_init(classes: Tensor | None, num_classes: int, dim: int) -> Tensor:
    """Return the initial weights of a head (C, D): the normalised class embeddings, or zeros without prompts."""
    return torch.zeros(num_classes, dim) if classes is None else F.normalize(classes.float(), dim=1)

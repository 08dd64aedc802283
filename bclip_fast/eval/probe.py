"""Linear probes on frozen features: regularisation and learning rate chosen on validation data, tested once.

The arithmetic is ELEVATER's: standardised features, a linear layer that starts at the class embeddings of the text
tower, SGD with momentum 0.9 and weight decay, batches of 64, six learning rates, and a coarse-to-fine search over 97
values of weight decay, ten epochs a trial. What it does with the test set is not ours: there, the best of 50 test
epochs is reported. `protocol="elevater"` does the same, for comparison, and says so; ours chooses the number of epochs
on validation data too and opens the test set once, with everything chosen.

Where a sample may have several classes, each class is a problem of its own (binary relevance): logistic regression on
the same features, chosen and judged by the macro AUROC, and by the mean accuracy of the classes at probability 1/2, as
MedMNIST does it (its evaluator's getAUC and getACC).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from . import statistics

Protocol = Literal["held_out", "elevater"]

LEARNING_RATES = tuple(10.0**i for i in range(-6, 0))
WEIGHT_DECAYS = tuple(float(value) for value in np.logspace(-6, 6, 97))
_COARSE, _REFINEMENTS = 16, (8, 4, 2, 1)
_TRIAL_EPOCHS, _FINAL_EPOCHS, _BATCH, _MOMENTUM = 10, 50, 64, 0.9


@dataclass(frozen=True)
class Labelled:
    """Features (N, D) float32; labels (N,) int64, or (N, C) bool where a sample may have several."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Labelled:
        return Labelled(self.features[rows], self.labels[rows])

    def with_(self, other: Labelled) -> Labelled:
        return Labelled(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))


@dataclass(frozen=True)
class Choice:
    """What was chosen without the test set: the hyper-parameters of the final run."""

    lr: float
    weight_decay: float
    num_epochs: int
    val_score: float


@dataclass
class Sealed:
    """The test set. It opens for a `Choice` only, so nothing can be chosen by it; `num_opened` counts."""

    _test: Labelled
    num_opened: int = field(default=0)

    def open(self, choice: Choice) -> Labelled:
        if not isinstance(choice, Choice):
            raise RuntimeError("the test set was asked for before the hyper-parameters were chosen")
        self.num_opened += 1
        return self._test


class _Heads:
    """Linear layers trained side by side, one for each (learning rate, weight decay), in one matmul."""

    def __init__(self, pairs: Sequence[tuple[float, float]], init: Tensor, batch_statistics: bool) -> None:
        """init: (C, D). batch_statistics: standardise as BatchNorm1d(affine=False) does, else by the training set."""
        device = init.device
        self.num, self.num_classes = len(pairs), len(init)
        self.weight = init.T[:, None].expand(-1, self.num, -1).reshape(init.shape[1], -1).clone()
        self.bias = torch.zeros(self.num * self.num_classes, device=device)
        self.rate, self.decay = (
            torch.tensor(values, device=device).repeat_interleave(self.num_classes)
            for values in zip(*pairs, strict=True)
        )
        self.norm: Any = torch.nn.BatchNorm1d(init.shape[1], affine=False).to(device) if batch_statistics else None
        self.velocity = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def train(self, data: Labelled, num_epochs: int, seed: int, after_epoch: Callable[[int], None]) -> None:
        if self.norm is None:
            # A feature that never varies says nothing: it is left at 0.
            std = data.features.std(0, correction=0)
            self.mean, self.scale = data.features.mean(0), torch.where(std > 1e-6, 1 / std.clamp(min=1e-6), 0.0)
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(num_epochs):
            order = torch.randperm(len(data), generator=generator).to(data.features.device)
            for rows in order.split(_BATCH):
                if self.norm is not None and len(rows) < 2:
                    continue  # a batch of one has no variance
                self._step(data.features[rows], data.labels[rows])
            after_epoch(epoch + 1)

    def _step(self, x: Tensor, labels: Tensor) -> None:
        x = self._standardise(x, training=True)
        logits = (x @ self.weight + self.bias).view(len(x), self.num, self.num_classes)
        # The gradient of the mean cross-entropy: softmax less the one-hot label; of each class for itself: sigmoid.
        if labels.ndim == 2:
            error = logits.sigmoid() - labels[:, None].to(logits.dtype)
        else:
            error = logits.softmax(-1)
            error[torch.arange(len(x), device=x.device), :, labels] -= 1
        error = error.flatten(1) / len(x)
        for parameter, gradient, velocity in (
            (self.weight, x.T @ error, self.velocity[0]),
            (self.bias, error.sum(0), self.velocity[1]),
        ):
            # torch.optim.SGD's update, a rate and a decay a column.
            velocity.mul_(_MOMENTUM).add_(gradient).add_(self.decay * parameter)
            parameter -= self.rate * velocity

    def _standardise(self, x: Tensor, training: bool) -> Tensor:
        if self.norm is None:
            return (x - self.mean) * self.scale
        return self.norm.train(training)(x)

    def logits(self, features: Tensor) -> Tensor:
        """(G, N, C)."""
        x = self._standardise(features, training=False)
        return (x @ self.weight + self.bias).view(len(x), self.num, self.num_classes).transpose(0, 1)

    def score(self, data: Labelled) -> Tensor:
        """(G,) float64: accuracy, macro AUROC of several labels; a head that diverged, with infinite logits, has 0."""
        if data.labels.ndim == 2:
            truth = data.labels.cpu().numpy()
            return torch.tensor([_macro_auroc(truth, logits) for logits in self.logits(data.features).double().cpu()])
        hits = torch.zeros(self.num, dtype=torch.float64)
        for rows in torch.arange(len(data), device=data.labels.device).split(8192):
            logits = self.logits(data.features[rows])
            right = (logits.argmax(-1) == data.labels[rows]) & logits.isfinite().all(-1)
            hits += right.sum(1).double().cpu()
        return hits / len(data)


def _macro_auroc(truth: np.ndarray, logits: Tensor) -> float:
    if not bool(logits.isfinite().all()):
        return 0.0
    areas = [statistics.auroc(own, column) for own, column in zip(truth.T, logits.numpy().T, strict=True)]
    known = [area for area in areas if area is not None]
    if not known:
        raise UserError("no class of the probe's data has both samples with it and samples without")
    return sum(known) / len(known)


@torch.inference_mode()
def choose(train: Labelled, val: Labelled, init: Tensor, *, protocol: Protocol = "held_out", seed: int = 0) -> Choice:
    """Learning rate, weight decay and epochs by the score on `val`; of equals, the first in rising order of rate.

    For each rate the weight decay is searched on its own: every 16th of the 97, then 8, 4, 2 and 1 steps to each side.
    """
    batch_statistics = protocol == "elevater"

    def trials(points: Sequence[tuple[int, int]], num_epochs: int, look_from: int = 1) -> Tensor:
        """(epochs, points) of the score on val, from epoch `look_from` on."""
        pairs = [(LEARNING_RATES[rate], WEIGHT_DECAYS[decay]) for rate, decay in points]
        heads, found = _Heads(pairs, init, batch_statistics), []
        heads.train(
            train, num_epochs, seed, lambda epoch: found.append(heads.score(val)) if epoch >= look_from else None
        )
        return torch.stack(found)

    scores: dict[tuple[int, int], float] = {}

    def score(points: Sequence[tuple[int, int]]) -> None:
        new = [point for point in points if point not in scores]
        if new:
            scores.update(zip(new, trials(new, _TRIAL_EPOCHS, _TRIAL_EPOCHS)[0].tolist(), strict=True))

    rates = range(len(LEARNING_RATES))
    score([(rate, decay) for rate in rates for decay in range(0, len(WEIGHT_DECAYS), _COARSE)])

    def best(rate: int) -> int:
        known = sorted(decay for other, decay in scores if other == rate)
        return max(known, key=lambda decay: scores[rate, decay])

    for step in _REFINEMENTS:
        score(
            [
                (rate, decay)
                for rate in rates
                for decay in (best(rate) - step, best(rate) + step)
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
def final(
    train: Labelled, val: Labelled, sealed: Sealed, init: Tensor, choice: Choice, *, protocol: Protocol, seed: int
) -> tuple[Tensor, int]:
    """(N, C) logits on the test set of the head trained on train and val together, and the epoch they are of.

    Under `elevater` that is the epoch of the best test score, which is why its figure is optimistic.
    """
    heads = _Heads([(choice.lr, choice.weight_decay)], init, protocol == "elevater")
    test: Labelled | None = None
    best: tuple[float, Tensor, int] = (-1.0, torch.empty(0), 0)

    def look(epoch: int) -> None:
        nonlocal test, best
        if protocol == "held_out" and epoch < choice.num_epochs:
            return
        test = sealed.open(choice) if test is None else test
        score = float(heads.score(test))
        if score > best[0]:
            best = score, heads.logits(test.features)[0], epoch

    heads.train(train.with_(val), choice.num_epochs, seed, look)
    return best[1], best[2]


def subset(labels: Tensor, num_classes: int, *, share: float = 1.0, shots: int = 0, seed: int = 0) -> Tensor:
    """Rows of a random part, drawn class by class: `shots` of each, else `share` of each, one at least if there is one.

    Where samples have several classes the part is drawn from all alike.

    Raises:
        UserError: a class with fewer than `shots` samples, or shots of samples with several classes.
    """
    generator = torch.Generator().manual_seed(seed)
    if labels.ndim == 2:
        if shots:
            raise UserError("samples with several classes cannot be drawn by shots of a class: use shares")
        return torch.randperm(len(labels), generator=generator)[: max(1, round(len(labels) * share))].sort().values
    rows = []
    for kind in range(num_classes):
        own = (labels.cpu() == kind).nonzero()[:, 0]
        num = shots or min(len(own), max(1, round(len(own) * share)))
        if num > len(own):
            raise UserError(f"class {kind} has {len(own)} training samples, {num} are asked for: use fewer shots")
        rows.append(own[torch.randperm(len(own), generator=generator)[:num]])
    return torch.cat(rows).sort().values


def measure(
    train: Labelled,
    val: Labelled,
    test: Labelled,
    class_names: Sequence[str],
    init: Tensor,
    *,
    shares: Sequence[float] = (0.01, 0.1, 1.0),
    shots: Sequence[int] = (),
    num_seeds: int = 3,
    protocol: Protocol = "held_out",
) -> dict[str, Any]:
    """Accuracy and balanced accuracy, of several labels macro AUROC and mean accuracy, of probes on parts of the
    training data: mean and deviation over seeds.

    Train and val are cut alike: with 1 % to train on there is 1 % to choose by. Beyond one seed the deviation is that
    of the draw of the part and of the order, n - 1 in its denominator.

    Returns:
        A JSON-ready dict: num_samples, classes, protocol, settings (with each seed's choice), figures, samples (of the
        last setting's first seed), confusion and chance as zero-shot gives them.
    """
    from . import zero_shot

    for name, data in (("train", train), ("val", val), ("test", test)):
        if not len(data) or not bool(torch.isfinite(data.features).all()):
            raise UserError(f"the probe's {name} features must be there and finite")
    num_classes, several = len(class_names), test.labels.ndim == 2
    settings = [(f"{100 * share:g} % of train", dict(share=share)) for share in shares]
    settings += [(f"{num} shots", dict(shots=num)) for num in shots]
    rows: list[dict[str, Any]] = []
    figures: list[dict[str, Any]] = []
    whole: dict[str, Any] = {}
    for name, cut in settings:
        runs = []
        for seed in range(num_seeds):
            part, held = [data[subset(data.labels, num_classes, **cut, seed=seed)] for data in (train, val)]  # type: ignore[arg-type]
            sealed = Sealed(test)
            choice = choose(part, held, init, protocol=protocol, seed=seed)
            logits, epoch = final(part, held, sealed, init, choice, protocol=protocol, seed=seed)
            truth, logits = test.labels.cpu(), logits.cpu()
            if several:
                found = zero_shot.measure_multi_label(truth, logits.sigmoid(), class_names, threshold=0.5)
            else:
                found = zero_shot.measure(truth, logits.argmax(1), class_names, logits.softmax(1))
            whole = found if seed == 0 else whole
            runs.append(
                {
                    "seed": seed,
                    "lr": choice.lr,
                    "weight_decay": choice.weight_decay,
                    "epoch": epoch,
                    "val_score": choice.val_score,
                    "num_train": len(part),
                    "num_val": len(held),
                    **{figure["name"]: figure["value"] for figure in found["figures"]},
                }
            )
        rows.append({"setting": name, "runs": runs})
        for kind in ("AUROC, macro", "accuracy") if several else ("accuracy", "balanced accuracy"):
            values = [run[kind] for run in runs]
            mean = math.fsum(values) / len(values)
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
            chance = next(figure for figure in whole["figures"] if figure["name"] == kind)
            figures.append(
                statistics.figure(
                    f"{kind}, {name}", mean, chance["chance"], chance["chance_is"], len(test), deviation=deviation
                )
            )
    return whole | {"protocol": protocol, "settings": rows, "figures": figures}


def text_init(classes: Tensor | None, num_classes: int, dim: int) -> Tensor:
    """(C, D): the class embeddings the head starts at, or zeros where there are no prompts."""
    return torch.zeros(num_classes, dim) if classes is None else F.normalize(classes.float(), dim=1)

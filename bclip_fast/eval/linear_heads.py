"""Linear classifiers on frozen features. Many of them train side by side, each with its hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bclip_fast.errors import UserError

from . import statistics

_BATCH, _MOMENTUM = 64, 0.9


@dataclass(frozen=True)
class LabelledFeatures:
    """Features (N, D) float32 with labels: (N,) int64, or (N, C) bool for multi-label samples."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> LabelledFeatures:
        return LabelledFeatures(self.features[rows], self.labels[rows])

    def concat(self, other: LabelledFeatures) -> LabelledFeatures:
        """Return the samples of both."""
        return LabelledFeatures(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))


class LinearHeads:
    """Linear layers trained side by side in one matmul, one for each pair (learning rate, weight decay)."""

    def __init__(self, pairs: Sequence[tuple[float, float]], init: Tensor, batch_statistics: bool) -> None:
        """init: (C, D). batch_statistics: standardise as BatchNorm1d(affine=False), else by the training set."""
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

    def train(self, data: LabelledFeatures, num_epochs: int, seed: int, after_epoch: Callable[[int], None]) -> None:
        """Train all heads. `after_epoch` is called with the number of finished epochs."""
        if self.norm is None:
            # A constant feature carries no information and becomes 0.
            std = data.features.std(0, correction=0)
            self.mean, self.scale = data.features.mean(0), torch.where(std > 1e-6, 1 / std.clamp(min=1e-6), 0.0)
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(num_epochs):
            order = torch.randperm(len(data), generator=generator).to(data.features.device)
            for rows in order.split(_BATCH):
                if self.norm is not None and len(rows) < 2:
                    continue  # a single sample has no variance
                self._step(data.features[rows], data.labels[rows])
            after_epoch(epoch + 1)

    def _step(self, x: Tensor, labels: Tensor) -> None:
        x = self._standardise(x, training=True)
        logits = (x @ self.weight + self.bias).view(len(x), self.num, self.num_classes)
        # The gradient of the mean cross-entropy is softmax minus the one-hot label, or sigmoid minus the label of each
        # class.
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
            # The update of torch.optim.SGD, with a learning rate and a decay for each column.
            velocity.mul_(_MOMENTUM).add_(gradient).add_(self.decay * parameter)
            parameter -= self.rate * velocity

    def _standardise(self, x: Tensor, training: bool) -> Tensor:
        if self.norm is None:
            return (x - self.mean) * self.scale
        return self.norm.train(training)(x)

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (G, N, C) of the G heads."""
        x = self._standardise(features, training=False)
        return (x @ self.weight + self.bias).view(len(x), self.num, self.num_classes).transpose(0, 1)

    def score(self, data: LabelledFeatures) -> Tensor:
        """Return each head's accuracy, or macro AUROC for multi-label samples, float64 (G,). Diverged heads score 0."""
        if data.labels.ndim == 2:
            targets = data.labels.cpu().numpy()
            return torch.tensor([_macro_auroc(targets, logits) for logits in self.logits(data.features).double().cpu()])
        num_correct = torch.zeros(self.num, dtype=torch.float64)
        for rows in torch.arange(len(data), device=data.labels.device).split(8192):
            logits = self.logits(data.features[rows])
            is_correct = (logits.argmax(-1) == data.labels[rows]) & logits.isfinite().all(-1)
            num_correct += is_correct.sum(1).double().cpu()
        return num_correct / len(data)


def _macro_auroc(targets: np.ndarray, logits: Tensor) -> float:
    if not bool(logits.isfinite().all()):
        return 0.0
    aurocs = [statistics.auroc(labels, scores) for labels, scores in zip(targets.T, logits.numpy().T, strict=True)]
    defined = [value for value in aurocs if value is not None]
    if not defined:
        raise UserError("the probe's data have no class with both positive and negative samples; use more data")
    return sum(defined) / len(defined)

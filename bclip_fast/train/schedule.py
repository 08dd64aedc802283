"""Learning rate as a function of the step, and which parameters decay: open_clip's rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from bclip_fast.errors import UserError
from bclip_fast.model.transformer import layer_depth

MAX_LOG_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW; the defaults are BiomedCLIP's (table S9 of the paper)."""

    lr: float = 5e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 2000
    """Steps of linear warm-up; at most the run's length."""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    """Of matrices and larger; biases, norms and the logit scale don't decay."""
    layer_decay: float = 1.0
    """Learning rate of a layer relative to the layer above it, in both towers; 1: all learn at the same rate."""
    decay: Literal["cosine", "linear"] = "cosine"
    """From the peak to min_lr."""
    batch_lr: Literal["none", "sqrt", "linear"] = "none"
    """How the rate follows batch_schedule: by the batch over the first one, or by its root. The paper names none."""
    grad_clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 leaves it as it is."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or not 0 <= self.min_lr <= self.lr:
            raise UserError(f"optim.lr={self.lr}, optim.min_lr={self.min_lr}: need 0 <= min_lr <= lr, lr above 0")
        for name in ("warmup_steps", "weight_decay", "grad_clip_norm"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name}={getattr(self, name)}: must not be negative")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"optim.layer_decay={self.layer_decay}: must lie in (0, 1]")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0):
            raise UserError(
                f"optim.beta1={self.beta1}, beta2={self.beta2}, eps={self.eps}: need betas in [0, 1), eps above 0"
            )


def learning_rate(step: float, num_steps: float, config: OptimConfig, batch_ratio: float = 1.0) -> float:
    """The rate of step 0 <= step < num_steps: rising to lr, then half a cosine or a line from lr to min_lr.

    Where the batch changes during a run, steps are counted in the first batch size, so that the curve is one over
    samples, and `batch_ratio` is the batch over the first one.
    """
    warmup = min(config.warmup_steps, num_steps)
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[config.batch_lr]
    peak = config.lr * batch_ratio**power
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    progress = (step - warmup) / max(1, num_steps - warmup)
    share = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (peak - config.min_lr) * share


_IN_TOWER = re.compile(r"(.*\b(?:visual|text)\.)(.+)")


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Factor of the learning rate by parameter: BEiT's rule (arXiv 2106.08254), layer_decay_rate in its code.

    decay^(L + 1 - place) in a tower of L layers: place 0 holds the embeddings, i + 1 layer i, and L + 1 norm and
    projection, which learn at the full rate as whatever is in no tower does.
    """
    inside = {name: match.groups() for name in names if (match := _IN_TOWER.fullmatch(name))}
    depths = {tower: 0 for tower, _ in inside.values()}
    for tower, rest in inside.values():
        if rest.startswith("layers."):
            depths[tower] = max(depths[tower], layer_depth(rest, 0))
    return {
        name: decay ** (depths[tower] + 1 - layer_depth(rest, depths[tower])) for name, (tower, rest) in inside.items()
    }


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Groups for torch.optim.AdamW: matrices decay, the rest doesn't; the logit scale has bounds of its own.

    open_clip's rule: no decay for parameters of fewer than 2 dimensions. "bounds" of a group are what `optimizer.AdamW`
    clamps its parameters to after each step: the scale stays in [1, 100]. "lr_scale" multiplies the learning rate of
    parameters whose name begins with a key of `lr_scales`, and by config.layer_decay. Empty groups are left out.
    """
    parameters = list(parameters)
    layers = layer_scales((name for name, _ in parameters), config.layer_decay)
    groups: dict[tuple[float, str], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        scale = next((value for prefix, value in (lr_scales or {}).items() if name.startswith(prefix)), 1.0)
        scale *= layers.get(name, 1.0)
        if name.rsplit(".", 1)[-1] == "logit_scale":
            kind, rest = "scale", {"weight_decay": 0.0, "bounds": (0.0, MAX_LOG_LOGIT_SCALE)}
        elif parameter.ndim >= 2 and not name.endswith("bias"):
            kind, rest = "decay", {"weight_decay": config.weight_decay}
        else:
            kind, rest = "rest", {"weight_decay": 0.0}
        groups.setdefault((scale, kind), {"params": [], "lr_scale": scale, **rest})["params"].append(parameter)
    order = ("decay", "rest", "scale")
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], order.index(key[1])))]

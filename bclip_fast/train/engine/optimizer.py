"""AdamW, its state, and the loss scale of fp16, whichever engine drives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bclip_fast.train.schedule import OptimConfig, parameter_groups


@dataclass
class OptimizerState:
    """AdamW's state by parameter name, whole and fp32, on the CPU; `num_steps` updates were made."""

    num_steps: int
    moments: dict[str, dict[str, Tensor]]
    loss_scale: dict[str, Any]


class Guarded(torch.optim.Optimizer):
    """An AdamW, named beside it as a base, which then clamps the parameters of a group that has "bounds" = (low, high)
    to them.

    Inside the optimiser it works on whatever the engine hands it: whole parameters or ZeRO's flat shards. Where
    `allowed()` is false a step does nothing.
    """

    allowed: Callable[[], bool] = staticmethod(lambda: True)

    def step(self, closure: Any = None) -> Any:
        if not self.allowed():
            return None
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                if "bounds" in group:
                    for parameter in group["params"]:
                        parameter.clamp_(*group["bounds"])
        return result

    def set_state(self, parameter: Tensor, num_steps: int, moments: Mapping[str, Tensor]) -> None:
        """Of a parameter that `num_steps` updates were made of."""
        self.state[parameter] = {"step": self._count(num_steps, parameter), **moments}

    def _count(self, num_steps: int, parameter: Tensor) -> Any:
        return num_steps


class AdamW(Guarded, torch.optim.AdamW):
    """torch's fused one."""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, fused=True, **options)

    def _count(self, num_steps: int, parameter: Tensor) -> Any:
        return torch.tensor(float(num_steps), device=parameter.device)


def make_optimizer(model: nn.Module, optim: OptimConfig, kind: Callable[..., Guarded] = AdamW) -> Guarded:
    groups = parameter_groups(model.named_parameters(), optim, getattr(model, "lr_scales", None))
    return kind(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def is_within(norm: float, limit: float) -> bool:
    return math.isfinite(norm) and norm <= limit


class LossScale:
    """The dynamic scale of fp16's loss: torch.amp.GradScaler's rule and state, for an overflow known on every rank."""

    def __init__(self) -> None:
        self._state = torch.amp.GradScaler("cpu").state_dict()

    @property
    def value(self) -> float:
        return self._state["scale"]

    def update(self, overflow: bool) -> None:
        state = self._state
        good = 0 if overflow else state["_growth_tracker"] + 1
        grown = good == state["growth_interval"]
        state["scale"] *= state["backoff_factor"] if overflow else state["growth_factor"] if grown else 1.0
        state["_growth_tracker"] = 0 if grown else good

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)

"""AdamW, its state, and the loss scale of fp16, for both engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bclip_fast.train.schedule import OptimConfig, parameter_groups


@dataclass
class OptimizerState:
    """The gathered fp32 state of AdamW on the CPU.

    num_steps: number of updates.
    moments: `exp_avg` and `exp_avg_sq` by parameter name.
    loss_scale: state of fp16's loss scale. Empty for other precisions.
    """

    num_steps: int
    moments: dict[str, dict[str, Tensor]]
    loss_scale: dict[str, Any]


class GatedOptimizer(torch.optim.Optimizer):
    """Mixin for an AdamW class. A step does nothing if `refusal()` is 1.

    After each step, it clamps the parameters of every group that has a `bounds = (low, high)` entry. It works on the
    tensors that the engine passes: parameters, or ZeRO's flat shards.

    The host doesn't read the decision. torch's fused kernels read it on the device, as they read GradScaler's
    `found_inf`. Only an optimiser on the host waits for a decision that was made on a GPU.
    """

    refusal: Callable[[], Tensor | None] = staticmethod(lambda: None)
    """Function that returns 1 if the step must update nothing, else 0: a float32 scalar. None is 0."""
    takes_found_inf = True
    """Whether the AdamW class reads `found_inf`."""
    found_inf: Tensor | None
    _overflow: Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        """Update the parameters and clamp them, unless `refusal()` is 1."""
        # GradScaler sets this attribute before the call and deletes it afterwards.
        self._overflow, has_scaler = getattr(self, "found_inf", None), hasattr(self, "found_inf")
        refused = self.refusal()
        if self._overflow is not None:
            refused = self._overflow if refused is None else torch.maximum(refused, self._overflow)
        if refused is not None:
            # AdamW would copy the decision to the host without a wait, and would read it too early.
            refused = refused.to(self._device)
            if not self.takes_found_inf and bool(refused):
                return None
            self.found_inf = refused
        result = super().step(closure)
        if refused is not None and not has_scaler:
            del self.found_inf
        with torch.no_grad():
            for group in self.param_groups:
                if "bounds" in group:
                    for parameter in group["params"]:
                        clamped = parameter.clamp(*group["bounds"])
                        parameter.copy_(clamped if refused is None else torch.where(refused > 0, parameter, clamped))
        return result

    def overflow_of(self, like: Tensor) -> Tensor:
        """1 if GradScaler found an overflow in the last step, else 0: a scalar like `like`."""
        return torch.zeros_like(like) if self._overflow is None else (self._overflow > 0).to(like)

    @property
    def _device(self) -> torch.device:
        return next(parameter.device for group in self.param_groups for parameter in group["params"])

    def set_state(self, parameter: Tensor, num_steps: int, moments: Mapping[str, Tensor]) -> None:
        """Set the state of a parameter after `num_steps` updates."""
        self.state[parameter] = {"step": self._step_count(num_steps, parameter), **moments}

    def _step_count(self, num_steps: int, parameter: Tensor) -> Any:
        return num_steps


class AdamW(GatedOptimizer, torch.optim.AdamW):
    """torch's fused AdamW."""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, fused=True, **options)

    def _step_count(self, num_steps: int, parameter: Tensor) -> Any:
        return torch.full((), float(num_steps), device=parameter.device)


def make_optimizer(
    model: nn.Module, optim: OptimConfig, optimizer_class: Callable[..., GatedOptimizer] = AdamW
) -> GatedOptimizer:
    """The optimiser of the model's trainable parameters, in the groups of `parameter_groups`."""
    options = getattr(model, "lr_scales", None), getattr(model, "vectors", ())
    groups = parameter_groups(model.named_parameters(), optim, *options)
    return optimizer_class(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of each group to `lr` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def refusal(norm: Tensor, limit: float, allowed: Tensor | None = None) -> Tensor:
    """1 if the norm is not finite or above `limit`, or if `allowed` is false, else 0: a float32 scalar on its device.

    Compare in float64, which holds both numbers exactly.
    """
    is_within = norm.isfinite() & (norm.double() <= limit)
    return 1 - (is_within if allowed is None else is_within & allowed).float()


def scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """The number as a scalar on the device. A kernel writes a number of the host, because a copy could wait."""
    if isinstance(value, Tensor):
        return value.reshape(()).to(device, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)


class LossScale:
    """The dynamic loss scale of fp16, with the rule and state of torch.amp.GradScaler.

    GradScaler detects overflows by itself. Here, `update` takes a flag that is the same on every rank.
    """

    def __init__(self) -> None:
        self._state = torch.amp.GradScaler("cpu").state_dict()

    @property
    def value(self) -> float:
        """The factor of the loss."""
        return self._state["scale"]

    def update(self, overflow: bool) -> None:
        """Lower the scale after an overflow, and raise it after enough steps without one."""
        state = self._state
        num_good_steps = 0 if overflow else state["_growth_tracker"] + 1
        grows = num_good_steps == state["growth_interval"]
        state["scale"] *= state["backoff_factor"] if overflow else state["growth_factor"] if grows else 1.0
        state["_growth_tracker"] = 0 if grows else num_good_steps

    def state_dict(self) -> dict[str, Any]:
        """The state in GradScaler's format."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self._state = dict(state)

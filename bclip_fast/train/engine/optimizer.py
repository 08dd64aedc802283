"""The optimisers, their state, and the loss scale of fp16, for both engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bclip_fast.errors import UserError
from bclip_fast.train.schedule import OptimConfig, is_muon_matrix, parameter_groups

from .own_optimizer import import_optimizer, options_of, traits_of

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class OptimizerState:
    """The gathered state of the optimiser on the CPU.

    num_steps: number of updates.
    moments: states by parameter name, then by their own name. AdamW has `exp_avg` and `exp_avg_sq`, Muon has
        `momentum_buffer`, each fp32 of the parameter's shape. A class of the user's may have others, and numbers ().
    loss_scale: state of fp16's loss scale. Empty for other precisions.
    """

    num_steps: int
    moments: dict[str, dict[str, Tensor]]
    loss_scale: dict[str, Any]


class GatedOptimizer(torch.optim.Optimizer):
    """Mixin for an optimiser class. A step does nothing if `refusal()` is 1.

    After each step, it clamps the parameters of every group that has a `bounds = (low, high)` entry. It works on the
    tensors that the engine passes: parameters, or ZeRO's flat shards.

    The host doesn't read AdamW's decision. torch's fused kernels read it on the device, as they read GradScaler's
    `found_inf`. An optimiser on the host and any other class wait for a decision that was made on a GPU.
    """

    refusal: Callable[[], Tensor | None] = staticmethod(lambda: None)
    """Function that returns 1 if the step must update nothing, else 0: a float32 scalar. None is 0."""
    takes_found_inf = True
    """Whether the class reads `found_inf`."""
    moments: tuple[str, ...] = MOMENTS
    """Names of the states that have a parameter's shape, of the parameters under ZeRO 1 to 3."""
    creates_states = True
    """Whether `set_state` with moments of zeros gives the states before the first update."""
    is_elementwise = True
    """Whether an element's update depends on no other element, as ZeRO 1 to 3 needs it."""
    _step_supports_amp_scaling = True
    """GradScaler then calls `step` after an overflow too, with `found_inf`."""
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
            if self.takes_found_inf:
                self.found_inf = refused
            elif bool(refused):
                return None
            elif has_scaler:
                # Classes with a fused variant, such as torch.optim.SGD, refuse a value without it.
                self.found_inf = None
        result = super().step(closure)
        if self.takes_found_inf and refused is not None and not has_scaler:
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

    @property
    def num_updates(self) -> int:
        """Number of updates. 0 before the first one, and for a class without such a state."""
        # Only the device knows which steps were refused, so the kernels count.
        return next((int(state["step"]) for state in self.state.values() if "step" in state), 0)

    def saved_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter that `set_state` restores. Empty before the first update."""
        state = self.state.get(parameter, {})
        return {key: state[key] for key in self.moments if key in state}

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


class _MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for the groups with "muon", and AdamW for the others. They share groups and states."""

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, **options: Any) -> None:
        super().__init__(groups, {})
        matrices = [group for group in groups if "muon" in group]
        others = [group for group in groups if "muon" not in group]
        # Orthogonal updates, of the size of AdamW's: Liu et al. 2025 (arXiv 2502.16982), section 2.2.
        muon = torch.optim.Muon(matrices, lr=options["lr"], momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._parts = [muon, torch.optim.AdamW(others, fused=True, **options)] if others else [muon]
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Any = None) -> Any:
        for part in self._parts:
            part.step()


class Muon(GatedOptimizer, _MuonAndAdamW):
    """torch's Muon for matrices of layers, with AdamW for the other parameters."""

    takes_found_inf = False
    is_elementwise = False
    moments = ("momentum_buffer", *MOMENTS)

    def set_state(self, parameter: Tensor, num_steps: int, moments: Mapping[str, Tensor]) -> None:
        """Set the state of a matrix, or AdamW's of another parameter after `num_steps` updates."""
        if "momentum_buffer" in moments:
            self.state[parameter] = dict(moments)
        else:
            super().set_state(parameter, num_steps, moments)

    def _step_count(self, num_steps: int, parameter: Tensor) -> Any:
        return torch.full((), float(num_steps), device=parameter.device)


class OwnOptimizer(GatedOptimizer):
    """Mixin for a class of the user's."""

    takes_found_inf = False
    creates_states = False
    numbers: Mapping[str, type]
    """Types of the states that are Python numbers."""

    def saved_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """All tensors and numbers of the parameter's state."""
        return {
            key: value if isinstance(value, Tensor) else torch.tensor(value)
            for key, value in self.state.get(parameter, {}).items()
            if value is not None
        }

    def set_state(self, parameter: Tensor, num_steps: int, moments: Mapping[str, Tensor]) -> None:
        """Set the state of a parameter. `num_steps` is unused: the state has the class's own count."""
        self.state[parameter] = {
            # torch's optimisers count the steps on the host.
            key: self.numbers[key](value)
            if key in self.numbers
            else value.to("cpu" if key == "step" else parameter.device, copy=True)
            for key, value in moments.items()
        }


def make_optimizer(
    model: nn.Module, optim: OptimConfig, adamw_class: Callable[..., GatedOptimizer] = AdamW
) -> GatedOptimizer:
    """The optimiser of the model's trainable parameters, in the groups of `parameter_groups`.

    Raises:
        UserError: torch lacks Muon, the model has no matrices for it, or a class of the user's cannot be used.
    """
    scales_and_vectors = getattr(model, "lr_scales", None), getattr(model, "vectors", ())
    groups = parameter_groups(model.named_parameters(), optim, *scales_and_vectors)
    options: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if optim.name == "adamw":
        return adamw_class(groups, **options)
    if optim.name == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"optim.name=muon needs torch 2.9 or newer, but this is {torch.__version__}; update torch")
        if not any("muon" in group for group in groups):
            raise UserError("optim.name=muon: the model trains no matrix of a transformer layer; set optim.name=adamw")
        return Muon(groups, momentum=optim.muon_momentum, **options)
    own = import_optimizer(optim.name)
    traits = traits_of(own, optim)
    fields = {"moments": traits.moments, "numbers": traits.numbers, "is_elementwise": traits.is_elementwise}
    gated: Any = type(own.__name__, (OwnOptimizer, own), fields)
    optimizer: GatedOptimizer = gated(groups, **options_of(own, optim))
    return optimizer


def state_sizes(model: nn.Module, optim: OptimConfig) -> float:
    """Bytes of the fp32 states of the trainable parameters, of their shape. A trial counts those of a user's class.

    Raises:
        UserError: a class of the user's cannot be used.
    """
    count = traits_of(import_optimizer(optim.name), optim).num_moments if optim.is_own else len(MOMENTS)
    return 4.0 * sum(
        parameter.numel() * (1 if optim.name == "muon" and is_muon_matrix(name, parameter) else count)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


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

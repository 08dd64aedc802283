"""Functions of the step: learning rate, patch dropout and seeds. Groups of parameters, by open_clip's rules."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from torch import nn

from bclip_fast.errors import UserError
from bclip_fast.model.transformer import layer_depth

NAMES = ("adamw", "muon")
MAX_LOG_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its learning rate. The defaults are BiomedCLIP's (table S9 of the paper)."""

    name: Annotated[str, tyro.conf.arg(aliases=["--optim.class"])] = "adamw"
    """adamw is AdamW. muon is torch's Muon for the matrices of the towers' layers, and AdamW for all other parameters.
    For a class of your own, write module:Class, also as optim.class. It is a torch.optim.Optimizer, and gets lr,
    weight_decay, betas and eps if it takes them."""
    lr: float = 5e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the run."""
    warmup_steps: int = 2000
    """Steps of linear warm-up, at most the length of the run."""
    beta1: float = 0.9
    """Decay of AdamW's mean of the gradients. A class of your own gets it as part of betas."""
    beta2: float = 0.98
    """Decay of AdamW's mean of the squared gradients."""
    eps: float = 1e-6
    """Number that AdamW adds to the root of the squared gradients' mean."""
    weight_decay: float = 0.2
    """Weight decay of matrices and larger tensors. Biases, norms and the logit scale do not decay."""
    layer_decay: float = 1.0
    """Ratio of a layer's learning rate to that of the layer above it, in both towers. 1 gives all layers the same
    rate."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Shape of the decay from lr to min_lr."""
    batch_lr: Literal["none", "sqrt", "linear"] = "none"
    """How the learning rate follows batch_schedule: in proportion to the batch size (linear), or to its square root.
    The paper names no rule."""
    grad_clip_norm: float = 0.0
    """Largest norm of the gradient of all parameters. 0 turns clipping off."""
    muon_lr: float = 0.0
    """Peak learning rate of Muon's matrices, which then follows the curve of lr. Muon's updates are scaled to the size
    of AdamW's (arXiv 2502.16982), so 0 takes lr."""
    muon_weight_decay: float | None = None
    """Weight decay of Muon's matrices. None takes weight_decay."""
    muon_momentum: float = 0.95
    """Decay of Muon's mean of the gradients, with Nesterov's momentum."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or not 0 <= self.min_lr <= self.lr:
            raise UserError(f"optim.lr={self.lr} must be above 0, and optim.min_lr={self.min_lr} must lie in [0, lr]")
        for name in ("warmup_steps", "weight_decay", "grad_clip_norm"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name}={getattr(self, name)} must not be negative")
        if self.name not in NAMES and not self.is_own:
            raise UserError(f"optim.name={self.name} must be {', '.join(NAMES)} or module:Class")
        muon = {"muon_lr": 0.0, "muon_weight_decay": None, "muon_momentum": 0.95}
        for name, default in muon.items():
            if self.name != "muon" and getattr(self, name) != default:
                raise UserError(f"optim.{name}={getattr(self, name)} needs optim.name=muon, but it is {self.name}")
        if self.muon_lr < 0 or (self.muon_weight_decay or 0.0) < 0 or not 0 <= self.muon_momentum < 1:
            raise UserError(
                f"optim.muon_lr={self.muon_lr} and optim.muon_weight_decay={self.muon_weight_decay} must not be "
                f"negative, and optim.muon_momentum={self.muon_momentum} must lie in [0, 1)"
            )
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"optim.layer_decay={self.layer_decay} must lie in (0, 1]")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0):
            raise UserError(
                f"optim.beta1={self.beta1} and optim.beta2={self.beta2} must lie in [0, 1), and "
                f"optim.eps={self.eps} must be above 0"
            )

    @property
    def is_own(self) -> bool:
        """Whether the optimiser is a class of the user's."""
        module, _, name = self.name.partition(":")
        return bool(module) and name.isidentifier()


def learning_rate(step: float, num_steps: float, config: OptimConfig, batch_ratio: float = 1.0) -> float:
    """The learning rate of step 0 <= step < num_steps: a linear warm-up to lr, then a decay to min_lr.

    If the batch size changes during a run, count steps in units of the first batch size. Then the curve is a function
    of the samples.

    Args:
        batch_ratio: current batch size divided by the first one.
    """
    warmup = min(config.warmup_steps, num_steps)
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[config.batch_lr]
    peak = config.lr * batch_ratio**power
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    progress = (step - warmup) / max(1, num_steps - warmup)
    remaining = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (peak - config.min_lr) * remaining


def patch_dropout(step: float, num_steps: float, rate: float, until: float) -> float:
    """The share of patches dropped in step 0 <= step < num_steps: `rate` in the first `until` of the steps, then 0."""
    return rate if step < until * num_steps else 0.0


def step_seed(seed: int, step: int, micro_batch: int) -> int:
    """The seed of a micro-batch's random numbers, 63 bits. `micro_batch` counts over all ranks."""
    digest = hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


_IN_LAYER = re.compile(r"(.*\.)?layers\.\d+\..*weight")
_IN_TOWER = re.compile(r"(.*\b(?:visual|text)\.)(.+)")


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Factor of the learning rate for each parameter of a tower: BEiT's rule (arXiv 2106.08254).

    The factor is decay^(L + 1 - depth) in a tower of L layers. The embeddings have depth 0, layer i has depth i + 1,
    and norm and projection have depth L + 1. Parameters outside of the towers are missing: they keep the full rate.
    """
    in_towers = {name: match.groups() for name in names if (match := _IN_TOWER.fullmatch(name))}
    depths = {tower: 0 for tower, _ in in_towers.values()}
    for tower, rest in in_towers.values():
        if rest.startswith("layers."):
            depths[tower] = max(depths[tower], layer_depth(rest, 0))
    return {
        name: decay ** (depths[tower] + 1 - layer_depth(rest, depths[tower]))
        for name, (tower, rest) in in_towers.items()
    }


def is_muon_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates a parameter: it is a matrix of a layer. Embeddings and projections to other spaces are not.

    The projections to queries, keys and values of a layer are one matrix.
    """
    return parameter.ndim == 2 and _IN_LAYER.fullmatch(name) is not None


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    lr_scales: Mapping[str, float] | None = None,
    vectors: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for `engine.optimizer.make_optimizer`, without empty groups.

    Weight decay follows open_clip's rule: biases and parameters of fewer than 2 dimensions do not decay. The logit
    scale has its own group. Its "bounds" make the optimiser clamp the scale to [1, 100] after each step. The "lr_scale"
    of a group is its factor of the learning rate, from `lr_scales` and config.layer_decay. The groups of the matrices
    that Muon updates have an entry "muon".

    Args:
        lr_scales: factor of the learning rate by prefix of the parameter's name.
        vectors: names of parameters that are vectors in open_clip, whatever their shape is here.
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
        elif config.name == "muon" and is_muon_matrix(name, parameter):
            scale *= config.muon_lr / config.lr if config.muon_lr else 1.0
            decay = config.weight_decay if config.muon_weight_decay is None else config.muon_weight_decay
            kind, rest = "muon", {"weight_decay": decay, "muon": True}
        elif parameter.ndim >= 2 and not name.endswith("bias") and name not in vectors:
            kind, rest = "decay", {"weight_decay": config.weight_decay}
        else:
            kind, rest = "rest", {"weight_decay": 0.0}
        groups.setdefault((scale, kind), {"params": [], "lr_scale": scale, **rest})["params"].append(parameter)
    order = ("muon", "decay", "rest", "scale")
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], order.index(key[1])))]

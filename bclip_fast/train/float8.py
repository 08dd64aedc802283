"""FP8 products in the towers' layers, by torchao's float8 linear layers.

A layer multiplies inputs and weights in E4M3, and incoming gradients in E5M2 (Micikevicius et al. 2022,
arXiv 2209.05433). Each tensor has one scale, from its largest absolute value in the same pass. Sums are float32.
Results and everything between the products are those of engine.precision=bf16. The parameters stay fp32 and keep their
names, so checkpoints don't depend on torchao.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bclip_fast.errors import UserError
from bclip_fast.model.transformer import Linear, Tower

log = logging.getLogger(__name__)

# "emulate" computes the products in float32 from rounded operands, on any device. It is slow: only for tests.
VARIABLE = "BCLIP_FP8"

# The first compute capability with FP8 matrix units: sm_89 (Ada), sm_90 (Hopper).
CAPABILITY = (8, 9)

# torch's FP8 products need dimensions that are multiples of this (torch._scaled_mm). torchao pads the tokens.
_MULTIPLE = 16


def emulated() -> bool:
    """Whether BCLIP_FP8=emulate is set.

    Raises:
        UserError: the variable has another value.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "emulate"):
        raise UserError(f"{VARIABLE}={value} must be emulate, or unset")
    return value == "emulate"


def refusal(device: torch.device) -> str | None:
    """The reason why this process cannot compute FP8 on its device, or None.

    Raises:
        UserError: BCLIP_FP8 has a wrong value.
    """
    if not emulated():
        if device.type != "cuda":
            return f"needs a GPU of compute capability 8.9 or newer, such as an H100, but the device is {device.type}"
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return (
                "needs a GPU of compute capability 8.9 or newer, such as an H100, but "
                f"{name} has {capability[0]}.{capability[1]}"
            )
    try:
        _torchao()
    except ImportError as error:
        return f"needs torchao ({error}); pip install 'bclip_fast[fp8]'"
    return None


def convert(model: nn.Module) -> list[str]:
    """Replace the linear layers of the towers' layers by float8 ones with the same parameters. Return their names.

    The layers are the projections of attention and both layers of the MLP. Patch embedding, output projections, caption
    decoder and LoRA's factors stay.

    Raises:
        UserError: no layer has dimensions that are multiples of 16.
    """
    torchao = _torchao()
    config = torchao.Float8LinearConfig(emulate=emulated(), pad_inner_dim=True)
    names = [name for name, layer in _linear_layers(model) if _fits(layer)]
    if not names:
        raise UserError(
            "engine.precision=fp8: no linear layer of the towers has dimensions that are multiples of 16; set "
            "engine.precision=bf16"
        )
    chosen = set(names)
    torchao.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in chosen)
    log.info(
        "engine.precision fp8: %d linear layers multiply in FP8%s",
        len(names),
        ", emulated: this is slow, and only for tests" if emulated() else "",
    )
    return names


def cast_bytes(tower: nn.Module, num_rows: int) -> int:
    """Bytes of the FP8 operands that the backward pass of a tower's largest layer holds at once.

    These are its input, the incoming gradient and its weight, each in both orders of dimensions.
    """
    sizes = [(layer.in_features, layer.out_features) for _, layer in _linear_layers(tower) if _fits(layer)]
    return max((2 * (num_rows * (width + columns) + width * columns) for width, columns in sizes), default=0)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The linear layers of the towers' layers, by name in the model."""
    for prefix, tower in model.named_modules():
        if not isinstance(tower, Tower):
            continue
        for name, layer in tower.layers.named_modules():
            # peft's two factors are narrow, and read neither by attention nor by an activation.
            if isinstance(layer, Linear) and "lora_" not in name:
                yield f"{prefix}.layers.{name}".removeprefix("."), layer


def _fits(layer: Linear) -> bool:
    return layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0


def _torchao() -> Any:
    """The module torchao.float8. Raises ImportError."""
    # It warns about kernels that were built for other releases of Python or torch. Training needs none of them.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    pytree = logging.getLogger("torch.utils._pytree")
    level = pytree.level
    pytree.setLevel(logging.ERROR)
    try:
        import torchao.float8
    finally:
        pytree.setLevel(level)
    return torchao.float8

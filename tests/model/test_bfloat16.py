"""bfloat16 on a processor without bfloat16 instructions: products run in float32, results are those of bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from synthetic import tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from towers import GPT, RESNET

from bclip_fast.loss import ClipLoss, SigLipLoss
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.meter import MeterConfig, VqaModel, vqa_loss
from bclip_fast.ops import processor
from bclip_fast.train.lora import add_lora

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "linear", "convolution", "scaled_dot_product", "matmul", "mv", "dot")


@pytest.fixture(autouse=True)
def _without_bfloat16(monkeypatch: pytest.MonkeyPatch, unmeasured: None) -> None:
    pytest.importorskip("bclip_fast._cpu")
    monkeypatch.setattr(processor, "BFLOAT16_INSTRUCTIONS", "")
    monkeypatch.setattr(processor, "HAS_AMX", False)
    monkeypatch.setattr("bclip_fast._cpu.has_amx", lambda: False)


class Products(TorchDispatchMode):
    """Records the names of torch's products of bfloat16 operands."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        halves = any(isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 for leaf in tree_leaves((args, kwargs)))
        if halves and name.startswith("aten::") and any(part in name for part in PRODUCTS):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def images(config: BiomedClipConfig) -> Tensor:
    side = config.vision.image_size
    return torch.randint(0, 256, (4, side, side, 3), dtype=torch.uint8)


def ids(config: BiomedClipConfig) -> Tensor:
    return torch.randint(1, config.text.vocab_size - 1, (4, config.text.context_length))


def clip_model(config: BiomedClipConfig) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    model, inputs = BiomedClip(config), (images(config), ids(config))

    def loss(model: Any) -> Tensor:
        output = model(*inputs)
        features = output["image_features"], output["text_features"], output["logit_scale"]
        return ClipLoss()(*features) + ClipLoss().get_logits(*features)[0].sum()

    return model, loss


def lora() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    pytest.importorskip("peft")
    model, loss = clip_model(tiny_model())
    add_lora(model, 2, 16)
    return model, loss


def meter() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    config = tiny_model()
    model = VqaModel(BiomedClip(config), MeterConfig(3, width=32, layers=1, heads=2), ("a", "b", "c"))
    inputs, targets = (images(config), ids(config)), torch.eye(3)[[0, 1, 2, 0]]
    return model, lambda model: vqa_loss(model(*inputs)["logits"], targets)


MODELS = {
    "vit and bert": lambda: clip_model(tiny_model()),
    "vit and gpt": lambda: clip_model(BiomedClipConfig(embed_dim=24, vision=tiny_model().vision, text=GPT)),
    "resnet and gpt": lambda: clip_model(RESNET),
    "lora": lora,
    "meter": meter,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_training_step_has_no_bfloat16_products(name: str, checkpointing: bool) -> None:
    model, loss = MODELS[name]()
    model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
    with Products() as products:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model.train())
        value.backward()
    assert value.isfinite()
    assert products.names == []


def test_recorder_sees_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "BFLOAT16_INSTRUCTIONS", "AVX512-BF16")
    model, loss = clip_model(RESNET)
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        loss(model).backward()
    assert {"aten::mm", "aten::convolution", "aten::convolution_backward"} <= set(products.names)


@pytest.mark.parametrize("name", ["vit and bert", "resnet and gpt"])
def test_bfloat16_weights_are_multiplied_in_float32(name: str) -> None:
    model = MODELS[name]()[0].bfloat16()
    config: Any = model.config
    with Products() as products:
        output: Any = model(images(config), ids(config))
        logits = SigLipLoss().get_logits(output["image_features"], output["text_features"], 10.0)
    assert logits.dtype == torch.bfloat16
    assert products.names == []


@pytest.mark.parametrize("name", MODELS)
def test_gradient_error_close_to_that_of_bfloat16_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = MODELS[name]()
    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(enabled: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss(model)
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        return [value.detach(), *(gradient for gradient in grads if gradient is not None)]

    def distance(values: list[Tensor]) -> float:
        return sum(float((one - two).norm() ** 2) for one, two in zip(values, exact, strict=True)) ** 0.5

    exact, ours = gradients(False), gradients(True)
    monkeypatch.setattr(processor, "BFLOAT16_INSTRUCTIONS", "AVX512-BF16")
    with_instructions = gradients(True)
    assert 0 < distance(ours) <= 1.5 * distance(with_instructions)

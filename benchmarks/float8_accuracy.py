"""`python -m benchmarks.float8_accuracy`: the loss of accuracy by engine.precision=fp8, emulated on a CPU.

Each precision starts from the same weights and trains on one fixed batch. The batch has random images with a low
frequency pattern each, and random captions. So the numbers describe the arithmetic, not what a model learns.
"""

from __future__ import annotations

import argparse
import copy
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRECISIONS = "fp32", "bf16", "fp8"


def main() -> None:
    """Print a table: for each precision the losses, and the cosines of embeddings and gradients with those of fp32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="biomedclip_s16", help="model of model/presets.py")
    parser.add_argument("--batch", type=int, default=32, help="pairs of the batch")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate of AdamW")
    options = parser.parse_args()
    os.environ["BCLIP_FP8"] = "emulate"
    from bclip_fast.model.biomedclip import BiomedClip
    from bclip_fast.model.presets import PRESETS
    from bclip_fast.train import float8

    torch.manual_seed(0)
    config = PRESETS[options.preset]
    original = BiomedClip(config)
    side, generator = config.vision.image_size, torch.Generator().manual_seed(1)
    coarse = torch.rand(options.batch, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bilinear").permute(0, 2, 3, 1)
    noise = 0.1 * torch.rand(smooth.shape, generator=generator)
    images = ((smooth + noise) / 1.1 * 255).byte()
    length = min(32, config.text.context_length)
    captions = torch.randint(5, config.text.vocab_size - 1, (options.batch, length), generator=generator)
    rows: list[tuple[str, list[float], list[float], list[float]]] = []
    exact: list[list[Tensor]] = []
    for precision in PRECISIONS:
        model = copy.deepcopy(original).eval()
        if precision == "fp8":
            float8.convert(model)
        first = _outputs(model, images, captions, precision)
        losses = _train(model, images, captions, precision, options.steps, options.lr)
        last = _outputs(model, images, captions, precision)
        exact = exact or [first, last]
        before, after = (
            [_cosines(one, two) for one, two in zip(results, truth, strict=True)]
            for results, truth in zip((first, last), exact, strict=True)
        )
        rows.append((precision, losses, before, after))
    print(f"preset {options.preset}, {options.batch} pairs, {options.steps} steps, torch {torch.__version__}")
    print("cosine with fp32: lowest of the batch for embeddings (image, text), and of the whole gradient")
    print("precision  first loss  last loss  images   texts    gradient  images after  texts after")
    for precision, losses, before, after in rows:
        print(
            f"{precision:<9}{losses[0]:12.5f}{losses[-1]:11.5f}  "
            + "  ".join(f"{value:.5f}" for value in (*before, *after[:2]))
        )


def _outputs(model: nn.Module, images: Tensor, captions: Tensor, precision: str) -> list[Tensor]:
    """The embeddings of images and captions, and the gradient of the loss as one vector (1, P)."""
    model.zero_grad(set_to_none=True)
    loss, output = _loss(model, images, captions, precision)
    loss.backward()
    gradient = torch.cat([part.grad.flatten() for part in model.parameters() if part.grad is not None])
    features = [output[name].detach().float() for name in ("image_features", "text_features")]
    return [*features, gradient[None]]


def _loss(model: nn.Module, images: Tensor, captions: Tensor, precision: str) -> tuple[Tensor, dict[str, Tensor]]:
    from bclip_fast.loss import ClipLoss

    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        output = model(images, captions)
    features = output["image_features"].float(), output["text_features"].float()
    return ClipLoss()(*features, output["logit_scale"]), output


def _train(
    model: nn.Module, images: Tensor, captions: Tensor, precision: str, steps: int, learning_rate: float
) -> list[float]:
    """The losses of the steps, and the loss after the last one."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss, _output = _loss(model, images, captions, precision)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(_loss(model, images, captions, precision)[0].item())
    return losses


def _cosines(one: Tensor, other: Tensor) -> float:
    """The lowest cosine of corresponding rows."""
    return F.cosine_similarity(one.double(), other.double(), dim=-1).min().item()


if __name__ == "__main__":
    main()

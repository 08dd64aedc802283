"""Towers, batches and definitions that the tests of the losses share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import bclip_fast
from bclip_fast import ClipLoss, SigLipLoss
from bclip_fast.ops.contrastive import reference

WIDTH = 8
MODES = [(False, False), (False, True), (True, False), (True, True)]  # (local_loss, gather_with_grad)
EXACT = {"rtol": 1e-10, "atol": 1e-14}


def open_clip_losses():
    """Return open_clip's loss.py, or None. Importing the whole package would take seconds on every rank."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return None
    spec = importlib.util.spec_from_file_location("open_clip_losses", Path(package.origin).with_name("loss.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Towers(nn.Module):
    """Two linear towers in float64, with a scale and a bias."""

    def __init__(self, seed=1):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image, self.text = nn.Linear(6, WIDTH, dtype=torch.float64), nn.Linear(5, WIDTH, dtype=torch.float64)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, image, text):
        return F.normalize(self.image(image)), F.normalize(self.text(text)), self.scale.exp(), self.bias


def data(sizes):
    """Inputs of images and texts, by rank."""
    generator = torch.Generator().manual_seed(2)
    total = sum(sizes)
    images = torch.randn(total, 6, generator=generator, dtype=torch.float64)
    texts = torch.randn(total, 5, generator=generator, dtype=torch.float64)
    return images.split(sizes), texts.split(sizes)


@torch.no_grad()
def teacher(image, text):
    return Towers(seed=3)(image, text)[:3]


def smoothed(image, text, scale, bias):
    logits, labels = scale * image @ text.T + bias, torch.arange(len(image))
    return sum(F.cross_entropy(part, labels, label_smoothing=0.1) for part in (logits, logits.T)) / 2


def siglip_smoothed(image, text, scale, bias):
    targets = 0.9 * torch.eye(len(image), dtype=image.dtype) + 0.05
    logits = scale * image @ text.T + bias
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(image)


def half_missing(image, text, scale, bias):
    """A loss with the gradient of open_clip's local_loss without gather_with_grad.

    Each term misses the gradient of one operand.
    """
    labels = torch.arange(len(image))
    per_image, per_text = scale * image @ text.detach().T + bias, scale * text @ image.detach().T + bias
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def gradients(loss, towers):
    """Loss, and gradients of the towers' parameters. As in DDP, a parameter without a path to the loss has zeros."""
    loss.backward()
    return [loss.detach()] + [torch.zeros_like(p) if p.grad is None else p.grad for p in towers.parameters()]


def single_process(sizes, definition=reference.dense):
    images, texts = (torch.cat(parts) for parts in data(sizes))
    towers = Towers()
    return gradients(definition(*towers(images, texts)), towers)


def averaged(rank, sizes, call):
    """Loss, and gradients after DDP's averaging, of this rank's part of the batch.

    call: function of the inputs and the features.
    """
    image, text = (parts[rank] for parts in data(sizes))
    towers = nn.parallel.DistributedDataParallel(Towers())
    return gradients(call((image, text), *towers(image, text)), towers.module)


def results_of(rank, sizes, losses, clip=True, **extras):
    """The losses and averaged gradients of every loss class in the module `losses`, by name."""
    options = {"rank": rank, "world_size": len(sizes), **extras}

    def distill(inputs, image, text, scale, bias):
        pair = losses.DistillClipLoss(True, True, **options)(image, text, scale, *teacher(*inputs))
        return pair[0] + 3 * pair[1] + 0 * bias  # DDP needs a path to every parameter

    calls = {"siglip": lambda _, *features: losses.SigLipLoss(**options)(*features), "distill": distill}
    for mode in MODES if clip else [MODES[3]]:
        calls[f"clip {mode}"] = lambda _, *features, mode=mode: losses.ClipLoss(*mode, **options)(*features)
    if losses is bclip_fast:
        calls["smoothed"] = lambda _, *features: ClipLoss(label_smoothing=0.1, **options)(*features)
        calls["siglip-smoothed"] = lambda _, *features: SigLipLoss(label_smoothing=0.1, **options)(*features)
    return {name: averaged(rank, sizes, call) for name, call in calls.items()}


def distilled(losses, sizes):
    inputs = [torch.cat(parts) for parts in data(sizes)]

    def definition(image, text, scale, bias):
        pair = losses.DistillClipLoss()(image, text, scale, *teacher(*inputs))
        return pair[0] + 3 * pair[1]

    return single_process(sizes, definition)


def assert_global(results, sizes, losses):
    """Assert that each rank's results are those of one process that has the whole batch."""
    truths = {
        "clip": single_process(sizes),
        "siglip": single_process(sizes, reference.dense_siglip),
        "smoothed": single_process(sizes, smoothed),
        "siglip-smoothed": single_process(sizes, siglip_smoothed),
        "distill": distilled(losses, sizes) if losses else None,
    }
    for of_rank in results:
        for name, values in of_rank.items():
            for ours, true in zip(values, truths[name.split()[0]] or values, strict=True):
                torch.testing.assert_close(ours, true, **EXACT, msg=lambda text, name=name: f"{name}: {text}")

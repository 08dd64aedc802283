"""The count of FLOPs against PyTorch's own count of a step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from coca_models import COCA
from synthetic import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from bclip_fast import hardware, ops
from bclip_fast.model import flops
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.packed import Packed

LENGTHS = [12, 3, 7]


@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_forward_flops_equal_torchs_count(patch_dropout: float):
    """torch can't count inside our attention operator, so the test adds attention by hand."""
    config = tiny_model()
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, patch_dropout=patch_dropout))
    model = BiomedClip(config).train()
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"):
        model(torch.zeros(3, 3, 32, 32), Packed.of(torch.full((sum(LENGTHS),), 5), LENGTHS))
    counted = sum(counter.get_flop_counts()["Global"].values())
    image, text = flops.forward_flops(config, LENGTHS, patch_dropout)
    # Our count leaves out the projections to the embedding, one row per sample.
    heads = 2 * 3 * sum(p.numel() for tower in (model.visual.head, model.text.proj) for p in tower.parameters())
    # Q K^T and P V of width 32: all pairs of tokens in the first layer, one token with all in the last.
    patches = 1 + (16 if patch_dropout == 0 else 8)
    attention = sum(4 * 32 * (n * n + n) for n in [*LENGTHS, *3 * [patches]])
    assert counted + attention == image + text + heads
    assert flops.step_flops(config, LENGTHS, patch_dropout) == 3 * (image + text)


@pytest.mark.parametrize(
    ("image", "text", "missing"),
    [
        # If all layers of a tower are locked, its projection needs no gradient of its input.
        (0, None, 2 * 3 * 32 * 24),
        # BERT's first layer reads locked embeddings. A layer that begins with a norm needs the norm's gradient.
        (1, 2, 2 * 22 * 32 * 96),
        (2, 0, 2 * 3 * 32 * 28),
    ],
)
def test_step_flops_exclude_backward_of_locked_layers(image: int, text: int | None, missing: int):
    """Keep `image` and `text` of two layers trainable. PyTorch counts everything outside our attention operator."""
    config = tiny_model()
    model = BiomedClip(config).train()
    model.visual.lock(image)
    if text is not None:
        model.text.lock(text)
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"):
        output = model(torch.zeros(3, 3, 32, 32), Packed.of(torch.full((sum(LENGTHS),), 5), LENGTHS))
        (output["image_features"].sum() + output["text_features"].sum()).backward()
    counted = sum(counter.get_flop_counts()["Global"].values())
    heads = 2 * 3 * sum(p.numel() for tower in (model.visual.head, model.text.proj) for p in tower.parameters())
    count = flops.step_flops(config, LENGTHS, locked=(model.visual.num_locked, model.text.num_locked))
    # Attention of a layer: all pairs of tokens, or one token with all in the last layer.
    attention = 0
    for lengths, trained in (([17] * 3, image), (LENGTHS, 2 if text is None else text)):
        squares, tokens = (4 * 32 * sum(n**power for n in lengths) for power in (2, 1))
        attention += squares + tokens + 2 * (tokens * (trained >= 1) + squares * (trained == 2))
    assert count + 3 * heads == counted + attention + missing


def test_peak_flops_are_looked_up_by_device_name():
    assert hardware.peak_flops_per_second("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert hardware.peak_flops_per_second("NVIDIA H100 80GB HBM3", "fp16") == 989.4e12
    assert hardware.peak_flops_per_second("NVIDIA H100 PCIe", "fp32") == 51.2e12
    assert hardware.peak_flops_per_second("NVIDIA H200 NVL", "bf16") == 835.5e12
    assert hardware.peak_flops_per_second("NVIDIA GeForce RTX 4090", "bf16") is None
    assert hardware.device_peak(torch.device("cpu"), "bf16") is None


@pytest.mark.parametrize("captions", [False, True])
def test_flops_of_coca_equal_torchs_count(captions: bool):
    """torch can't count inside attention on a CPU, so the test adds attention by hand."""
    model, lengths = BiomedClip(COCA).train(), [7, 7, 7]
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"):
        model(torch.zeros(3, 3, 32, 32), Packed.of(torch.full((21,), 5), lengths), captions=captions)
    counted = sum(counter.get_flop_counts()["Global"].values())
    heads = 2 * 3 * (model.visual.head.weight.numel() + model.text.projection.numel())
    # Self-attention of 17 image tokens and of 9 rows of each caption, and the decoder's of 7 tokens.
    images, texts, decoder = (3 * 4 * width * n * n for width, n in ((48, 17), (32, 9), (32, 7)))
    last = 3 * 4 * 32 * 9
    # The pool's queries attend to 17 image tokens, and each token in both layers of the decoder to 4 pooled ones.
    cross = 3 * 4 * 32 * (5 * 17 + 2 * 7 * 4 if captions else 17)
    attention = 3 * images + 3 * texts + 2 * decoder if captions else 3 * images + 2 * texts + last
    assert counted + attention + cross == sum(flops.forward_flops(COCA, lengths, captions=captions)) + heads
    image, text, captioning = flops.forward_flops(COCA, lengths, captions=True)
    assert flops.step_flops(COCA, lengths) == 3 * (image + text + captioning)
    # The layers before the last one have no backward pass.
    layer = 3 * flops.full_layer_flops([17], 48, 4.0)
    locked = flops.step_flops(COCA, lengths, locked=(3, 0))
    assert flops.step_flops(COCA, lengths) - locked == 2 * (2 * layer + 3 * 2 * 16 * 48 * 3 * 64)

"""The count of operations against what PyTorch itself counts in a step, and where the peak rates apply."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from synthetic import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from bclip_fast import hardware, ops
from bclip_fast.model import flops
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.packed import Packed

LENGTHS = [12, 3, 7]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_forward_pass_has_as_many_matmuls_as_torch_counts(share: float):
    """torch counts all but what runs inside our attention operator; that is put beside it by hand."""
    config = tiny_model()
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, patch_dropout=share))
    model = BiomedClip(config).train()
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"):
        model(torch.zeros(3, 3, 32, 32), Packed.of(torch.full((sum(LENGTHS),), 5), LENGTHS))
    counted = sum(counter.get_flop_counts()["Global"].values())
    image, text = flops.forward_flops(config, LENGTHS, share)
    # The projections to the embedding, a row a sample, are left out of our count.
    heads = 2 * 3 * sum(p.numel() for tower in (model.visual.head, model.text.proj) for p in tower.parameters())
    # Q K^T and P V of width 32: each token with each other in the first layer, one with the others in the last.
    patches = 1 + (16 if share == 0 else 8)
    attention = sum(4 * 32 * (n * n + n) for n in [*LENGTHS, *3 * [patches]])
    assert counted + attention == image + text + heads
    assert flops.step_flops(config, LENGTHS, share) == 3 * (image + text)


@pytest.mark.parametrize(
    "image, text, missing",
    [
        # Where a tower is locked whole, the gradient of what its projection is given isn't computed.
        (0, None, 2 * 3 * 32 * 24),
        # BERT's first layer reads locked embeddings; a layer that begins with a norm needs the norm's gradient.
        (1, 2, 2 * 22 * 32 * 96),
        (2, 0, 2 * 3 * 32 * 28),
    ],
)
def test_nothing_goes_back_through_locked_layers(image: int, text: int | None, missing: int):
    """Of two layers `image` and `text` are left to train; torch counts what runs outside our attention operator."""
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
    # A layer's attention, of each token with each other or, in the last layer, of one with the others.
    attention = 0
    for lengths, trained in (([17] * 3, image), (LENGTHS, 2 if text is None else text)):
        squares, tokens = (4 * 32 * sum(n**power for n in lengths) for power in (2, 1))
        attention += squares + tokens + 2 * (tokens * (trained >= 1) + squares * (trained == 2))
    assert count + 3 * heads == counted + attention + missing


def test_peaks_are_known_by_name():
    assert hardware.peak_flops_per_second("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert hardware.peak_flops_per_second("NVIDIA H100 80GB HBM3", "fp16") == 989.4e12
    assert hardware.peak_flops_per_second("NVIDIA H100 PCIe", "fp32") == 51.2e12
    assert hardware.peak_flops_per_second("NVIDIA H200 NVL", "bf16") == 835.5e12
    assert hardware.peak_flops_per_second("NVIDIA GeForce RTX 4090", "bf16") is None
    assert hardware.device_peak(torch.device("cpu"), "bf16") is None

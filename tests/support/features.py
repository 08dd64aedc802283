"""Images, and the comparison of their features, for tests of checkpoints against peers."""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image


def check_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare features of different inputs."""
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * expected.abs().max()


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    """Two images of noise on different greys."""
    noise = np.random.default_rng(5)
    # transformers and open_clip cut other squares out of images with odd margins.
    images = (noise.normal(grey, 40, (50, side, 3)) for side, grey in ((40, 60), (60, 190)))
    return tuple(Image.fromarray(image.clip(0, 255).astype(np.uint8)) for image in images)

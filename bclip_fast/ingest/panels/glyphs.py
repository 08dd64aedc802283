"""Classify small pictures of characters as the letters of panels, with integers.

The weights come from `benchmarks/train_panel_letters.py`. Sums of integers are the same on every CPU, so figures give
the same panels everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

CLASSES = "ABCDEFGHIJKLMNOPabcdefghijklmnop"
SIDE = 20
HIDDEN_SHIFT = 7
# Steps of the table of exponentials per unit of the logits.
_STEPS = 64
_WEIGHTS = Path(__file__).with_name("letters.safetensors")
# Letters whose capital and small form differ only in size.
SAME_FORMS = "CKOP"


def normalised_glyph(ink: np.ndarray) -> np.ndarray:
    """Return ink, (height, width) uint8, stretched to 0 to 255 and scaled into the middle of (SIDE, SIDE) uint8."""
    height, width = ink.shape
    low, high = int(ink.min()), int(ink.max())
    stretched = ((ink.astype(np.int32) - low) * 255 // max(1, high - low)).astype(np.uint8)
    longer = max(height, width)
    size = max(1, (width * SIDE + longer // 2) // longer), max(1, (height * SIDE + longer // 2) // longer)
    scaled = np.asarray(Image.fromarray(stretched).resize(size, Image.Resampling.BILINEAR))
    glyph = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
    glyph[top : top + size[1], left : left + size[0]] = scaled
    return glyph


def logits(glyphs: np.ndarray, weights: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    """Return integer logits, (N, len(CLASSES) + 1) int64, of glyphs, (N, SIDE * SIDE) uint8. The last is "other"."""
    weights = _weights() if weights is None else weights
    # Products of at most 400 * 255 * 127 are exact in float32 up to 2 ** 24.
    sums = glyphs.astype(np.float32) @ weights["hidden.weight"].T.astype(np.float32)
    hidden = np.clip((sums.astype(np.int64) + weights["hidden.bias"]) >> HIDDEN_SHIFT, 0, 256)
    return (hidden.astype(np.float64) @ weights["output.weight"].T.astype(np.float64)).astype(np.int64) + weights[
        "output.bias"
    ]


def probabilities(glyphs: np.ndarray) -> np.ndarray:
    """Return the probability of each class in thousandths, (N, len(CLASSES) + 1) int64."""
    values = logits(glyphs)
    below = values.max(axis=1, keepdims=True) - values
    table = _exponentials()
    parts = table[np.minimum(below * _STEPS // int(_weights()["scale"][0]), len(table) - 1)]
    totals = parts.sum(axis=1, keepdims=True)
    return (2000 * parts + totals) // (2 * totals)


@functools.cache
def _exponentials() -> np.ndarray:
    """Return exp(-i / _STEPS) in units of 2 ** -24, int64. `np.exp` differs between CPUs, `Decimal.exp` doesn't."""
    return np.array([round(2**24 * (Decimal(-i) / _STEPS).exp()) for i in range(16 * _STEPS + 1)])


@functools.cache
def _weights() -> dict[str, np.ndarray]:
    return load_file(_WEIGHTS)

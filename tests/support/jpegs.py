"""JPEG files for the tests of decoding and resizing."""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image

from bclip_fast import ops

MODES = ["RGB", "L", "CMYK"]
OPTIONS = [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1, "restart_marker_blocks": 5}]
SIZES = [(53, 37), (37, 53), (1, 1), (300, 7), (7, 300), (401, 299), (224, 224), (90, 700)]  # width, height


def jpeg(mode="RGB", size=(53, 37), pixels=None, **options) -> bytes:
    """A JPEG file with `pixels`, or with a gradient and noise. `options` are those of Pillow."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(0).integers(0, 40, (height, width, channels))
    if pixels is None:
        pixels = (np.stack([x * 3 + y * (c + 1) for c in range(channels)], -1) + noise) % 256
    image = Image.fromarray(pixels.astype(np.uint8)[..., 0 if channels == 1 else slice(None)], mode)
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def boxes_in(files, seed=0):
    """A random crop (top, left, height, width) inside each file's image."""
    draw, boxes = random.Random(seed), []
    for data in files:
        height, width = ops.image.peek_size(data)
        size = draw.randint(1, height), draw.randint(1, width)
        boxes.append((draw.randint(0, height - size[0]), draw.randint(0, width - size[1]), *size))
    return boxes

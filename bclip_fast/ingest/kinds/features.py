"""Cheap features of a figure and its caption, from which `classifier` tells the kind of the figure.

All sums are sums of integers, and each feature is one rounded quotient. So every processor gives the same features.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

# The features are integers from 0 to SCALE.
SCALE = 4096
# The features come from a copy whose longer side has this many pixels.
_SIDE = 192
_WHITE, _BLACK = 242, 14
_GRID = 4
# A difference of neighbouring pixels that counts as an edge, and one that counts as texture.
_EDGE, _TEXTURE = 40, 6
# Least length of a straight dark line, as a share of the image's side.
_LINE = 0.25


def image_features(image: Image.Image) -> np.ndarray:
    """Return the features (F,) int64 of an RGB image, each from 0 to SCALE."""
    ratio = _SIDE / max(image.size)
    size = max(8, round(image.width * ratio)), max(8, round(image.height * ratio))
    pixels = np.asarray(image.resize(size, Image.Resampling.BOX)).astype(np.int64)
    grey = (pixels * [77, 150, 29]).sum(2) >> 8
    highest, lowest = pixels.max(2), pixels.min(2)
    chroma = highest - lowest
    values = [_share(min(image.size), max(image.size)), SCALE * (image.width > image.height)]
    values += [_log_size(image.width), _log_size(image.height)]
    values += _tones(grey, chroma)
    values += _hues(pixels, chroma)
    values += _edges(grey)
    values += _lines(grey)
    values += _colours(pixels)
    values += _cells(grey, chroma)
    # The square root spreads small shares. It is exact: the root of an integer of 24 bits, rounded down.
    return np.floor(np.sqrt(np.clip(np.array(values, np.int64), 0, SCALE) * float(SCALE))).astype(np.int64)


def _share(part: int, whole: int) -> int:
    """Return part / whole in units of 1 / SCALE."""
    return round(SCALE * int(part) / max(1, int(whole)))


def _log_size(pixels: int) -> int:
    return pixels.bit_length() * (SCALE // 16)


def _tones(grey: np.ndarray, chroma: np.ndarray) -> list[int]:
    """Return histograms of grey and of chroma, and the shares of pixels that are white, black and without colour."""
    count = grey.size
    tones = np.bincount((grey >> 4).ravel(), minlength=16)
    chromas = np.bincount(np.minimum(chroma >> 4, 11).ravel(), minlength=12)
    shares = [(grey >= _WHITE).sum(), (grey <= _BLACK).sum(), (chroma <= 12).sum(), (chroma > 60).sum()]
    mean = int(grey.sum()) // count
    spread = int(np.abs(grey - mean).sum())
    return [_share(n, count) for n in (*tones, *chromas, *shares)] + [_share(mean, 255), _share(spread, 128 * count)]


def _hues(pixels: np.ndarray, chroma: np.ndarray) -> list[int]:
    """Return the histogram of the hues of coloured pixels, in 12 sectors, as shares of all pixels."""
    is_coloured = chroma > 30
    red, green, blue = (pixels[..., i][is_coloured] for i in range(3))
    width = chroma[is_coloured]
    highest = pixels.max(2)[is_coloured]
    sector = np.where(
        highest == red,
        (2 * (green - blue) + 12 * width) // width % 12,
        np.where(highest == green, (2 * (blue - red) + 4 * width) // width, (2 * (red - green) + 8 * width) // width),
    )
    return [_share(n, chroma.size) for n in np.bincount(sector, minlength=12)[:12]]


def _edges(grey: np.ndarray) -> list[int]:
    """Return the shares of edges and of fine texture: horizontal, vertical and both, at three scales."""
    values = []
    for step in (1, 2, 4):
        scaled = grey[: grey.shape[0] // step * step, : grey.shape[1] // step * step]
        scaled = scaled.reshape(scaled.shape[0] // step, step, -1, step).sum((1, 3)) // (step * step)
        across = np.abs(np.diff(scaled, axis=1))[:-1] if min(scaled.shape) > 1 else np.zeros((1, 1), np.int64)
        down = np.abs(np.diff(scaled, axis=0))[:, :-1] if min(scaled.shape) > 1 else np.zeros((1, 1), np.int64)
        count = across.size
        is_across, is_down = across > _EDGE, down > _EDGE
        values += [(is_across & ~is_down).sum(), (is_down & ~is_across).sum(), (is_across & is_down).sum()]
        larger = np.maximum(across, down)
        values += [((larger > _TEXTURE) & (larger <= _EDGE)).sum(), (larger <= 1).sum()]
        values[-5:] = [_share(n, count) for n in values[-5:]]
    return values


def _lines(grey: np.ndarray) -> list[int]:
    """Return the shares of rows and columns that are background, or that hold a long straight dark line."""
    values = []
    for picture in (grey, grey.T):
        is_light = picture >= _WHITE
        background = is_light.mean(1) >= 0.995
        dark = picture < 140
        steps = dark.shape[1]
        length = max(8, int(_LINE * steps))
        padded = np.cumsum(np.pad(dark, ((0, 0), (1, 0))).astype(np.int64), axis=1)
        runs = padded[:, length:] - padded[:, :-length] if steps >= length else np.zeros((len(dark), 1), np.int64)
        has_line = (runs == length).any(1)
        # A line is thin: the rows two above and two below don't have it.
        is_thin = has_line & ~np.roll(has_line, 3) | has_line & ~np.roll(has_line, -3)
        starts = np.diff(np.concatenate([[False], background]).astype(np.int8)) == 1
        rows = len(picture)
        values += [_share(n, rows) for n in (background.sum(), has_line.sum(), is_thin.sum(), 4 * starts.sum())]
        values += [_share(dark[:, : max(1, steps // 12)].sum(), rows * max(1, steps // 12))]
    return values


def _colours(pixels: np.ndarray) -> list[int]:
    """Return how many different colours there are, and the shares of the most frequent ones."""
    codes = (pixels[..., 0] >> 4 << 8) | (pixels[..., 1] >> 4 << 4) | pixels[..., 2] >> 4
    counts = np.sort(np.bincount(codes.ravel(), minlength=4096))[::-1]
    total = codes.size
    used = int((counts > 0).sum())
    needed = int(np.searchsorted(np.cumsum(counts), 0.95 * total)) + 1
    shares = [_share(counts[:n].sum(), total) for n in (1, 2, 4, 8)]
    return [*shares, used.bit_length() * (SCALE // 13), needed.bit_length() * (SCALE // 13), _share(needed, 512)]


def _cells(grey: np.ndarray, chroma: np.ndarray) -> list[int]:
    """Return mean grey, its spread and mean chroma in the cells of a grid."""
    values = []
    rows = np.linspace(0, grey.shape[0], _GRID + 1).astype(int)
    columns = np.linspace(0, grey.shape[1], _GRID + 1).astype(int)
    for top, bottom in itertools.pairwise(rows):
        for left, right in itertools.pairwise(columns):
            cell, colour = grey[top:bottom, left:right], chroma[top:bottom, left:right]
            mean = int(cell.sum()) // cell.size
            values += [_share(mean, 255), _share(int(np.abs(cell - mean).sum()), 128 * cell.size)]
            values += [_share(int(colour.sum()), 255 * colour.size)]
    return values


_PUNCTUATION = re.compile(r"[^a-z0-9+]+")


def caption_features(caption: str, keywords: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the features (K + 3,) int64 of a caption, each from 0 to SCALE.

    Args:
        keywords: the words and phrases of each of K kinds, lower case.
    """
    text = f" {_PUNCTUATION.sub(' ', caption.lower())} "
    values = [min(3, sum(_contains(text, word) for word in words)) * SCALE // 3 for words in keywords]
    num_words = text.count(" ")
    num_labels = min(12, len(re.findall(r"\(?\b[A-La-l]\b[),.:]", caption)))
    return np.array(
        [*values, min(SCALE, num_words * SCALE // 256), num_labels * SCALE // 12, SCALE * (num_labels > 1)], np.int64
    )


def _contains(text: str, word: str) -> bool:
    """Return whether a text has a word. A word that ends with `*` is the beginning of a word."""
    return f" {word[:-1]}" in text if word.endswith("*") else f" {word} " in text

"""Samples of kept embeddings that are computed again, to notice a change that no key can show.

Such a change may affect only some samples: images of 16 bits, or texts beyond the context length. So `choose` takes a
sample of every kind, and the extremes of size and shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bclip_fast.data.image_files import ImageError, open_image
from bclip_fast.data.image_files.decode import CORRUPT

MAX_KINDS = 8
"""Largest number of kinds with a sample."""
_UNIT_ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}


class Kind(NamedTuple):
    """Kind of a sample. Samples of one `name` take the same way through the code.

    size: pixels of an image, or characters of a text. shape: width divided by height, at least 1. 1 for texts.
    """

    name: str
    size: int
    shape: float = 1.0


def kind_of_image(content: bytes) -> Kind:
    """Return the kind of an image file: format, mode, orientation and what else its header tells a decoder."""
    try:
        image = open_image(content)
    except ImageError:
        return Kind("unreadable", 0)
    tags: list[object] = [image.format, image.mode, image.is_upright]
    if image.format != "DICOM":
        info = image.image.info
        tags += [name in info for name in ("transparency", "icc_profile", "gamma", "progressive", "compression")]
        tags.append(info.get("adobe_transform"))
        try:
            tags.append(getattr(image.image, "n_frames", 1) > 1)
        except CORRUPT:
            tags.append("damaged")
    sides = image.width, image.height
    return Kind(str(tags), sides[0] * sides[1], max(sides) / max(1, min(sides)))


def kind_of_text(text: str) -> Kind:
    """Return the kind of a text: length within a factor of 2, other characters than ASCII, entities, capitals."""
    tags = len(text).bit_length(), text.isascii(), "&" in text, text == text.lower(), text == " ".join(text.split())
    return Kind(str(tags), len(text))


def choose(kinds: Sequence[Kind], rows: Sequence[int]) -> list[int]:
    """Return at most 15 of the samples `rows`: the first of each kind, the extremes, and 4 evenly spaced ones.

    If there are more than `MAX_KINDS` kinds, the check covers evenly spaced ones, sorted by name.
    """
    if not rows:
        return []
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(kinds[row].name, row)
    names = sorted(first)
    chosen = {first[names[i * len(names) // MAX_KINDS]] for i in range(MAX_KINDS)}
    chosen |= {max(rows, key=lambda row: kinds[row].size), min(rows, key=lambda row: kinds[row].size)}
    chosen |= {max(rows, key=lambda row: kinds[row].shape), *(rows[i * (len(rows) - 1) // 3] for i in range(4))}
    return sorted(chosen)


def tolerance(precision: str, kept: str, device: torch.device) -> float:
    """Return the largest distance between two embeddings of unit norm that rounding explains.

    Another batch size changes the order of sums. Roundings act like independent errors, so about 100 in turn, which
    store results in the format of the towers, give 10 unit roundoffs. Sums of about 3,000 float32 products in each give
    500 unit roundoffs of float32. The bound is twice that, and the rounding of the kept format.
    """
    if precision == "fp32" and device.type == "cuda" and _has_tf32():
        precision = "tf32"
    if precision == "fp32" and torch.get_float32_matmul_precision() == "medium":
        precision = "bf16"
    roundoff = 10 * _UNIT_ROUNDOFF[precision] + 500 * _UNIT_ROUNDOFF["fp32"]
    return 2 * roundoff + (0.0 if kept == "fp32" else _UNIT_ROUNDOFF[kept])


def largest_distance(rows: Tensor, others: Tensor) -> tuple[float, int]:
    """Return the largest distance between rows (n, D) of two matrices, and its row. NaN counts as infinity."""
    distances = (rows.double() - others.double()).norm(dim=1).nan_to_num(torch.inf)
    return float(distances.max()), int(distances.argmax())


def _has_tf32() -> bool:
    return torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"

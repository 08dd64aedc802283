"""Square crops of single images: DICOM files, photographs and micrographs that packages contain.

A straight line divides the region of interest of each image into a training part and a held-out part, with a gap
between them. A crop lies completely in one of the two. Held-out crops therefore show other tissue, but of the same
image, so the validation measures recognition within these images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import dicom
from .captions import Facts

# (top, left, height, width) in pixels of the image.
Box = tuple[int, int, int, int]
# Gap between the two parts, as a share of the region's extent.
_GAP = 0.03
_MAX_TRIES = 200
# Least standard deviation of a crop's grey values. Below it, the crop counts as empty.
_LEAST_CONTRAST = 7.0
# Modalities with a usual orientation. Images of the others may be rotated.
_ORIENTED = frozenset({"MR", "CT", "CR", "US", "NM", "fundus"})


@dataclass(frozen=True)
class Source:
    """One image file in an installed package.

    Attributes:
        facts: facts about the image. None: the DICOM header states them.
        region: part of the image to use, without burned-in text and empty margins.
        side: side of the held-out part. None: all of the image is for training.
        fraction: held-out share of the region.
        frames: frames of the DICOM file to use.
        smallest: least side of a crop, relative to the shorter side of the smaller part.
        content: least share of a crop's pixels that are neither black nor white.
        stretch: percentiles of the pixels that become black and white.
    """

    name: str
    package: str
    path: str
    facts: Facts | None = None
    region: Box | None = None
    side: str | None = "right"
    fraction: float = 0.36
    frames: tuple[int, ...] = (0,)
    smallest: float = 0.45
    content: float = 0.35
    stretch: tuple[float, float] | None = None


def _dicom(name: str, path: str, **options: Any) -> Source:
    return Source(name, "pydicom-data", f"data/{path}", **options)


SOURCES: tuple[Source, ...] = (
    _dicom("head-ct", "693_UNCR.dcm"),
    Source("skull-base-ct", "pydicom", "data/test_files/J2K_pixelrep_mismatch.dcm", side="left"),
    _dicom("pancreas-ct", "explicit_VR-UN.dcm", region=(80, 40, 360, 432)),
    Source("spine-ct", "pydicom", "data/test_files/CT_small.dcm", side=None),
    _dicom("liver-mr", "MR-SIEMENS-DICOM-WithOverlays.dcm", region=(90, 0, 300, 484)),
    _dicom(
        "shoulder-mr",
        "MR2_UNCR.dcm",
        region=(140, 120, 780, 680),
        side="left",
        fraction=0.42,
        content=0.6,
    ),
    _dicom("chest-cr", "RG1_UNCR.dcm"),
    _dicom("leg-cr", "RG3_UNCR.dcm", region=(0, 400, 1760, 1000), side="bottom"),
    _dicom("node-us", "US1_UNCR.dcm", region=(110, 45, 226, 550)),
    _dicom(
        "heart-us",
        "color3d_jpeg_baseline.dcm",
        region=(60, 170, 340, 310),
        frames=(0, 20, 40, 60, 80, 100),
        content=0.4,
    ),
    _dicom("tee-us", "color-pl.dcm", region=(20, 70, 95, 145), side="left", smallest=0.6),
    _dicom("abdomen-us", "gdcm-US-ALOKA-16.dcm", region=(120, 35, 290, 560)),
    _dicom(
        "bone-nm",
        "JPEG2000_UNC.dcm",
        region=(60, 20, 830, 210),
        smallest=0.8,
        content=0.5,
    ),
    Source("retina", "scikit-image", "data/retina.jpg", Facts("fundus", "retina"), side="bottom"),
    Source(
        "microaneurysms",
        "scikit-image",
        "data/microaneurysms.png",
        Facts(
            "fundus",
            "retina",
            details=("green channel", "eye with microaneurysms", "magnified detail"),
        ),
        side="bottom",
        smallest=0.7,
        stretch=(0.5, 99.5),
    ),
    Source(
        "ihc",
        "scikit-image",
        "data/ihc.png",
        Facts("histology", "colon", stain="DAB", details=("FHL2 protein expression",)),
    ),
    Source(
        "he",
        "wsidicom-data",
        "data/test_tile.png",
        Facts("histology", stain="H&E", details=("brightfield", "tile of a whole slide image")),
        side="bottom",
        smallest=0.6,
    ),
    Source(
        "nuclei",
        "mahotas",
        "demos/data/nuclear.png",
        Facts("fluorescence", stain="DNA", details=("cell nuclei", "cultured cells")),
        smallest=0.35,
        content=0.15,
        stretch=(1, 98.5),  # a few dividing cells are far brighter than the rest
    ),
    # One cell in an empty field. As no second part shows a cell, the image is only for training.
    Source(
        "phase-cell",
        "scikit-image",
        "data/cell.png",
        Facts("phase", details=("single cell", "pixel spacing 0.107 micrometres")),
        region=(230, 300, 290, 250),
        side=None,
        smallest=0.7,
    ),
)


def load(source: Source, path: Path) -> list[tuple[np.ndarray, Facts]]:
    """Return the images (H, W, 3) uint8 of a source. The decoder's exceptions pass through."""
    if source.facts is None:
        return dicom.read(path, source.frames)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    if source.stretch is not None:
        low, high = np.percentile(pixels, source.stretch)
        pixels = (np.clip((pixels - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return [(pixels, source.facts)]


def parts(source: Source, height: int, width: int) -> dict[str, Box]:
    """Return the boxes of "train" and, if there is a held-out part, "val"."""
    top, left, rows, columns = source.region or (0, 0, height, width)
    if source.side is None:
        return {"train": (top, left, rows, columns)}
    extent = rows if source.side in ("top", "bottom") else columns
    held_out, gap = int(extent * source.fraction), max(2, int(extent * _GAP))
    kept = extent - held_out - gap
    if source.side == "bottom":
        train, val = (top, left, kept, columns), (top + kept + gap, left, held_out, columns)
    elif source.side == "top":
        train, val = (top + held_out + gap, left, kept, columns), (top, left, held_out, columns)
    elif source.side == "left":
        train, val = (top, left + held_out + gap, rows, kept), (top, left, rows, held_out)
    else:
        train, val = (top, left, rows, kept), (top, left + kept + gap, rows, held_out)
    return {"train": train, "val": val}


def _describe_position(box: Box, height: int, width: int) -> str:
    """Describe the position of the crop's centre in the image. The words become part of captions."""
    down = min(2, int(3 * (box[0] + box[2] / 2) / height))
    across = min(2, int(3 * (box[1] + box[3] / 2) / width))
    rows, columns = ("upper", "middle", "lower"), ("left", "central", "right")
    if (down, across) == (1, 1):
        return "centre of the picture"
    return f"{rows[down]} {columns[across]} part of the picture"


def _draw_box(part: Box, sizes: tuple[float, float], random: np.random.Generator) -> Box:
    top, left, height, width = part
    size = round(float(random.uniform(*sizes)))
    return (
        top + int(random.integers(height - size + 1)),
        left + int(random.integers(width - size + 1)),
        size,
        size,
    )


def _has_content(pixels: np.ndarray, content: float) -> bool:
    grey = pixels[::4, ::4].mean(axis=2)
    return bool(grey.std() >= _LEAST_CONTRAST and ((grey > 20) & (grey < 245)).mean() >= content)


def crops(
    source: Source, images: list[tuple[np.ndarray, Facts]], split: str, count: int, seed: int
) -> Iterator[tuple[Image.Image, Facts, dict[str, Any]]]:
    """Yield `count` square crops of one part with their facts and metadata."""
    number = [other.name for other in SOURCES].index(source.name)
    random = np.random.default_rng([seed, 1000 + number, split == "val"])
    height, width = images[0][0].shape[:2]
    boxes = parts(source, height, width)
    part = boxes[split]
    # The smaller part bounds the crops of both splits, so that their scales agree. Training crops may be 25 % larger.
    bound = min(min(box[2:]) for box in boxes.values())
    largest = min(1.25 * bound, *part[2:]) if split == "train" else bound
    sizes = (source.smallest * bound, largest)
    for _ in range(count):
        frame = int(random.integers(len(images)))
        pixels, facts = images[frame]
        for _ in range(_MAX_TRIES):
            box = _draw_box(part, sizes, random)
            crop = pixels[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
            if _has_content(crop, source.content):
                break
        else:
            raise ValueError(f"{source.name}: all {_MAX_TRIES} crops of the {split} part are empty")
        image = Image.fromarray(crop)
        if facts.modality not in _ORIENTED:
            image = Image.fromarray(np.rot90(crop, int(random.integers(4))).copy())
        else:
            position = _describe_position(box, height, width)
            facts = replace(facts, details=(*facts.details, position))
        meta = {"picture": source.name, "box": list(box), "part": list(part), "frame": frame}
        yield image, facts, meta

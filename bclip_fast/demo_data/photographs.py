"""Square crops of single pictures: DICOM, photographs and micrographs that packages ship.

Each picture's region of interest is cut by a straight line into a training part and a held-out
part with a gap between them; a crop lies wholly in one of the two. So held-out crops show other
tissue, but of the same picture: what is measured is recognition within these pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import dicom
from .captions import Facts

Box = tuple[int, int, int, int]  # top, left, height, width in pixels of the picture
_GAP = 0.03  # of the region's extent, on each side of which the two parts lie
_MAX_TRIES = 200
_LEAST_CONTRAST = 7.0  # standard deviation of a crop's grey values; less is an empty picture
_ORIENTED = frozenset({"MR", "CT", "CR", "US", "NM", "fundus"})  # the others may be turned


@dataclass(frozen=True)
class Source:
    """One picture in an installed package.

    `facts` is None where the DICOM header gives them. `region` excludes burned-in text and empty
    margins. `side` is where the held-out part lies, None: all training. `smallest` is the
    smallest crop relative to the smaller part's shorter side, `content` the least fraction of a
    crop's pixels that are neither black nor white. `stretch` gives the percentiles that become
    black and white.
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
    # One cell in an empty field: no second part shows a cell, so it is a training picture only.
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
    """The pictures (H, W, 3) uint8 of a source; raises what the decoder raises."""
    if source.facts is None:
        return dicom.read(path, source.frames)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    if source.stretch is not None:
        low, high = np.percentile(pixels, source.stretch)
        pixels = (np.clip((pixels - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return [(pixels, source.facts)]


def parts(source: Source, height: int, width: int) -> dict[str, Box]:
    """The boxes of "train" and, unless the source is for training only, "val"."""
    top, left, rows, columns = source.region or (0, 0, height, width)
    if source.side is None:
        return {"train": (top, left, rows, columns)}
    extent = rows if source.side in ("top", "bottom") else columns
    held, gap = int(extent * source.fraction), max(2, int(extent * _GAP))
    kept = extent - held - gap
    if source.side == "bottom":
        train, val = (top, left, kept, columns), (top + kept + gap, left, held, columns)
    elif source.side == "top":
        train, val = (top + held + gap, left, kept, columns), (top, left, held, columns)
    elif source.side == "left":
        train, val = (top, left + held + gap, rows, kept), (top, left, rows, held)
    else:
        train, val = (top, left, rows, kept), (top, left + kept + gap, rows, held)
    return {"train": train, "val": val}


def _place(box: Box, height: int, width: int) -> str:
    """Where in the whole picture the crop's centre lies, in words."""
    down = min(2, int(3 * (box[0] + box[2] / 2) / height))
    across = min(2, int(3 * (box[1] + box[3] / 2) / width))
    rows, columns = ("upper", "middle", "lower"), ("left", "central", "right")
    if (down, across) == (1, 1):
        return "centre of the picture"
    return f"{rows[down]} {columns[across]} part of the picture"


def _draw_box(part: Box, sizes: tuple[float, float], random: np.random.Generator) -> Box:
    top, left, height, width = part
    size = int(round(float(random.uniform(*sizes))))
    return (
        top + int(random.integers(height - size + 1)),
        left + int(random.integers(width - size + 1)),
        size,
        size,
    )


def _shows_something(pixels: np.ndarray, content: float) -> bool:
    grey = pixels[::4, ::4].mean(axis=2)
    return bool(grey.std() >= _LEAST_CONTRAST and ((grey > 20) & (grey < 245)).mean() >= content)


def crops(
    source: Source, pictures: list[tuple[np.ndarray, Facts]], split: str, count: int, seed: int
) -> Iterator[tuple[Image.Image, Facts, dict[str, Any]]]:
    """`count` square crops of one part with their facts and meta."""
    number = [other.name for other in SOURCES].index(source.name)
    random = np.random.default_rng([seed, 1000 + number, split == "val"])
    height, width = pictures[0][0].shape[:2]
    boxes = parts(source, height, width)
    part = boxes[split]
    # Both splits at one scale: the smaller part bounds the crops, a little less so in training.
    bound = min(min(box[2:]) for box in boxes.values())
    largest = min(1.25 * bound, *part[2:]) if split == "train" else bound
    sizes = (source.smallest * bound, largest)
    for _ in range(count):
        which = int(random.integers(len(pictures)))
        pixels, facts = pictures[which]
        for _ in range(_MAX_TRIES):
            box = _draw_box(part, sizes, random)
            crop = pixels[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
            if _shows_something(crop, source.content):
                break
        else:
            raise ValueError(f"no crop of the {split} part shows anything")
        image = Image.fromarray(crop)
        if facts.modality not in _ORIENTED:
            image = Image.fromarray(np.rot90(crop, int(random.integers(4))).copy())
        else:
            where = _place(box, height, width)
            facts = Facts(**{**facts.__dict__, "details": (*facts.details, where)})
        meta = {"picture": source.name, "box": list(box), "part": list(part), "frame": which}
        yield image, facts, meta

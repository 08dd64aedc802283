"""Articles, images and packages for tests of ingest, and readers of the results."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image


def encode_image(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """Return the image as a file in one of Pillow's formats."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def red_image(kind: str = "JPEG") -> bytes:
    """Return a red image of 32 x 24 pixels."""
    return encode_image(Image.new("RGB", (32, 24), "red"), kind)


def noise_image(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """Return a JPEG that resembles no image of another seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)
    return encode_image(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), quality=90)


def article_xml(*figures: tuple[str, str], number: int | None = None) -> bytes:
    """Return an article with figures (href, caption)."""
    identity = f'<article-id pub-id-type="pmc">{number}</article-id>' if number else ""
    body = "".join(
        f'<fig id="F{i}"><label>Figure {i}</label>{f"<caption><p>{text}</p></caption>" if text else ""}'
        f'<graphic xlink:href="{href}"/></fig>'
        for i, (href, text) in enumerate(figures, 1)
    )
    return (
        f'<article xmlns:xlink="http://www.w3.org/1999/xlink"><front><article-meta>{identity}</article-meta></front>'
        f"<body>{body}</body></article>"
    ).encode()


def article_files(number: int, num_figures: int = 2, *, has_panels: bool = False) -> dict[str, bytes]:
    """Return the files of an article with different images, by name. `has_panels`: the first figure is a row of two."""
    figures = [(f"f{i}", f"Text {i} of {number}") for i in range(num_figures)]
    images = {f"f{i}.jpg": noise_image(100 * number + i) for i in range(num_figures)}
    if has_panels:
        figures[0] = ("f0", f"Text 0 of {number}. (a) From above. (b) From below.")
        gap = np.full((120, 16, 3), 255, np.uint8)
        sides = [_noise(100 * number + 50 + side, (120, 120)) for side in range(2)]
        row = Image.fromarray(np.concatenate([sides[0], gap, sides[1]], axis=1))
        images["f0.jpg"] = encode_image(row, quality=95)
    return {"x.nxml": article_xml(*figures, number=number), **images}


def write_composites(folder: Path, count: int) -> Path:
    """Write articles with a figure of two panels that touch, and a figure without panels."""
    for number in range(1, count + 1):
        pixels = np.concatenate([_noise(10 * number + side, (120, 120)) for side in range(2)], axis=1)
        xml = article_xml(("f", "Views. (a) From above. (b) From below."), ("g", "A view of it"), number=number)
        files = {"f.png": encode_image(Image.fromarray(pixels), "PNG"), "g.jpg": noise_image(number)}
        write_files(folder / str(number), {"x.nxml": xml, **files})
    return folder


def _noise(seed: int, size: tuple[int, int]) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def write_articles(folder: Path, count: int, num_figures: int = 2, *, have_panels: bool = False) -> Path:
    """Write the articles 1 to `count`, each in its own folder."""
    for number in range(1, count + 1):
        write_files(folder / str(number), article_files(number, num_figures, has_panels=have_panels))
    return folder


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files by their names, which may contain folders."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz", extra: tuple[tarfile.TarInfo, ...] = ()) -> None:
    """Write a package: first the members `extra`, filled with zeros, then the files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for info in extra:
            tar.addfile(info, io.BytesIO(bytes(info.size)) if info.isreg() else None)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def read_tree(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder, by relative path."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def manifest_rows(dataset: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of the manifest, by key."""
    return {row["key"]: row for row in pq.read_table(dataset / "manifest.parquet").to_pylist()}


def reject_rows(dataset: Path) -> list[tuple[str, str, str, str]]:
    """Return (article, figure, file, reason) of each reject."""
    return [tuple(row.values()) for row in pq.read_table(dataset / "rejects.parquet").to_pylist()]

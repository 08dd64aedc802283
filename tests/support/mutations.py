"""Small inputs with one random byte changed, and the check that a build of ingest accounts for every one of them."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import image_layouts
import numpy as np
import pyarrow.parquet as pq
from articles import article_xml, encode_image, noise_image, write_files
from dicom_files import dicom
from PIL import Image


def mutate(data: bytes, generator: random.Random) -> bytes:
    """Return `data` with another value of one random byte."""
    position = generator.randrange(len(data))
    return data[:position] + bytes([data[position] ^ generator.randrange(1, 256)]) + data[position + 1 :]


def small_image(kind: str, number: int) -> bytes:
    """Return an image of 24 x 16 pixels in one of Pillow's formats."""
    return encode_image(Image.open(io.BytesIO(noise_image(number, (24, 16)))), kind)


def image_files() -> list[bytes]:
    """Return a small file of every layout that the project's decoder reads, and of the image formats above."""
    files = [layout.data for layout in (*image_layouts.tiffs(), *image_layouts.others()) if layout.pixels is not None]
    photograph = Image.fromarray(image_layouts.deep(image_layouts.COLOURS, "u1"))
    files += [encode_image(photograph, "JPEG", progressive=True), encode_image(photograph, "MPO", save_all=True)]
    files += [encode_image(photograph, "TIFF", compression=kind) for kind in ("jpeg", "lzma")]
    files += [encode_image(photograph.convert("1"), "TIFF", compression="group4")]
    files += [encode_image(photograph, kind, save_all=True, append_images=[photograph.rotate(90)])
              for kind in ("GIF", "TIFF", "PNG", "WEBP")]  # fmt: skip
    grey = image_layouts.deep(image_layouts.GREY, "u1")
    window = {"WindowCenter": ["1500", "9"], "WindowWidth": ["1000", "9"], "RescaleSlope": 2, "RescaleIntercept": -1024}
    files += [dicom(grey), dicom(grey.astype("u2") * 16, bits=12, **window), dicom(grey.astype("i2"))]
    return files + [encode(0) for encode in IMAGES.values()]


def small_tar(files: dict[str, bytes]) -> bytes:
    """Return an uncompressed tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# Encoders of the image formats whose bytes are changed. A new format is one line: suffix and encoder.
IMAGES: dict[str, Callable[[int], bytes]] = {
    "jpg": lambda number: small_image("JPEG", number),
    "png": lambda number: small_image("PNG", number),
    "tif": lambda number: small_image("TIFF", number),
    "gif": lambda number: small_image("GIF", number),
    "bmp": lambda number: small_image("BMP", number),
    "webp": lambda number: small_image("WEBP", number),
    "dcm": lambda number: dicom(np.asarray(Image.open(io.BytesIO(noise_image(number, (24, 16))))), "RGB"),
}
KINDS = ("xml", "tar", "tar.gz", *IMAGES)


def write_mutated(folder: Path, kind: str, count: int, seed: int) -> None:
    """Write the articles 1 to `count`, each with one figure and one changed byte in the file of `kind`."""
    generator = random.Random(f"{kind} {seed}")
    for number in range(1, count + 1):
        suffix = kind if kind in IMAGES else "jpg"
        image = IMAGES[suffix](number)
        image = mutate(image, generator) if kind in IMAGES else image
        xml = article_xml((f"i{number}", f"Figure of article {number}."), number=number)
        files = {"x.nxml": mutate(xml, generator) if kind == "xml" else xml, f"i{number}.{suffix}": image}
        if kind == "tar":
            write_files(folder, {f"{number}.tar": mutate(small_tar(files), generator)})
        elif kind == "tar.gz":
            write_files(folder, {f"{number}.tar.gz": mutate(gzip.compress(small_tar(files), mtime=0), generator)})
        else:
            write_files(folder / str(number), files)


def unaccounted(dataset: Path, count: int) -> list[int]:
    """Return the articles of which the dataset names neither a pair nor a reject.

    A change may hit the id of the article or the name of its file, but never both.
    """
    images = {row["file"].partition(".")[0] for row in pq.read_table(dataset / "manifest.parquet").to_pylist()}
    rejects = pq.read_table(dataset / "rejects.parquet").to_pylist()
    articles = {row["article"] for row in rejects}
    places = {row["file"].partition("/")[0].partition(".")[0] for row in rejects} | {
        row["file"].partition(".")[0] for row in rejects
    }
    return [
        number
        for number in range(1, count + 1)
        if not ({f"i{number}"} & (images | places) or str(number) in places or f"PMC{number}" in articles)
    ]

"""Cases of image decoding, on real figures of articles."""

from __future__ import annotations

import importlib

import torch

from bclip_fast import ops
from bclip_fast.ops import image

from .case import Case, Contender, Unavailable, ours, peer, shared_data


def image_case(num_images: int) -> Case:
    """Return a case that decodes JPEG figures of PMC articles."""

    def simplejpeg() -> Contender:
        module = peer(lambda: importlib.import_module("simplejpeg"))
        return lambda *files: [torch.from_numpy(module.decode_jpeg(data, "RGB")) for data in files]

    return Case(
        operator="image",
        name=f"decode-{num_images}-figures",
        make_inputs=lambda: figures(num_images),
        truth=lambda *files: [ops.image.decode(data, backend="reference") for data in files],
        contenders={
            **ours(
                image.FILE_LIMITS,
                lambda backend: lambda *files: [ops.image.decode(data, backend=backend) for data in files],
                b"",
            ),
            "simplejpeg": simplejpeg,
        },
        dtype=torch.uint8,
        unit="image",
        num_units=num_images,
    )


def figures(num_images: int, least: int | None = None) -> list[bytes]:
    """Return JPEG files of figures, evenly spaced in the sorted list of all figures of the shared PMC articles.

    num_images: number of files, or all files if there are fewer.
    least: smallest number of files that is enough. Below it, raises Unavailable. None is num_images.
    """
    folder = shared_data() / "pmc_articles"
    paths = sorted(folder.rglob("*.jpg"))
    least = num_images if least is None else least
    if len(paths) < least:
        raise Unavailable(f"{folder} holds {len(paths)} JPEGs, {least} are needed: set BCLIP_SHARED_DATA")
    number = min(num_images, len(paths))
    return [paths[i * len(paths) // number].read_bytes() for i in range(number)]

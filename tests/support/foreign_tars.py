"""Tar files as webdataset and img2dataset write them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pixels(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """Return a smooth random image, (height, width, 3) uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).convert(mode).save(data, kind, **options)
    return data.getvalue()


def write_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_tars(folder: Path, num_samples: int, per_tar: int = 8, first: int = 0, captions: str = "txt") -> Path:
    """Write samples 000000000, 000000001 ... as img2dataset does. captions: txt, or the key in the JSON."""
    for number in range(-(-num_samples // per_tar)):
        files: dict[str, bytes] = {}
        for place in range(per_tar * number, min(per_tar * (number + 1), num_samples)):
            key, caption = f"{number:05d}{place % per_tar:04d}", f"caption {first + place}"
            files[f"{key}.jpg"] = encoded(pixels(first + place), quality=95)
            if captions == "txt":
                files[f"{key}.txt"] = caption.encode()
            else:
                files[f"{key}.json"] = json.dumps({captions: caption, "url": "https://example.org"}).encode()
        write_tar(folder / f"{number:05d}.tar", files)
    return folder

"""Embeddings on disk under a name that says what they are of: weights, data, preprocessing, precision.

Each is fingerprinted by content or behaviour, never by path or date: a changed weight, image, crop or token is another
name, and what is found under a name is always right.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing
from bclip_fast.io.hashing import sha256, sha256_of_parts
from bclip_fast.version import __version__

log = logging.getLogger(__name__)

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_folder() -> Path:
    """BCLIP_CACHE, else ~/.cache/bclip_fast/embeddings."""
    return Path(os.environ.get("BCLIP_CACHE") or Path.home() / ".cache" / "bclip_fast" / "embeddings")


def of_weights(model: nn.Module) -> str:
    """SHA-256 of the class's name, and of every name, shape, dtype and byte of the state."""
    digest = hashlib.sha256(f"{__version__} {type(model).__name__}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def of_preprocess(preprocess: Callable[[Any], Tensor]) -> str:
    """SHA-256 of what it makes of three probes: any callable, open_clip's or one's own, is known by its behaviour.

    Raises:
        UserError: two runs differ, so it augments: embeddings of it mean nothing.
    """
    from PIL import Image

    generator = np.random.default_rng(0)
    probes = [generator.integers(0, 256, shape, dtype=np.uint8) for shape in ((61, 97, 3), (480, 640, 3), (300, 200))]
    probes = [np.ascontiguousarray(probe) for probe in probes]

    def run() -> str:
        results = [preprocess(Image.fromarray(probe)).contiguous() for probe in probes]
        return sha256_of_parts(
            f"{tuple(result.shape)} {result.dtype}".encode() + result.view(torch.uint8).numpy().tobytes()
            for result in results
        )

    first = run()
    if run() != first:
        raise UserError("preprocess gives two results for one image: evaluation needs one that does not augment")
    return first


def of_texts(texts: Sequence[str], tokenizer: Callable[[list[str]], Tensor]) -> str:
    """SHA-256 of the texts, and of the tokens of the first and last of them and of a probe."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
    ids = tokenizer([*texts[:16], *texts[-16:], "Chest X-ray, \u03b1-SMA \u00d7400; p<0.05 (A\u2013C)."])
    return digest.hexdigest() + sha256(ids.contiguous().numpy().tobytes())


class Cache:
    """A folder of `KEY.safetensors`, or nothing at all where `folder` is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, parts: Sequence[str], compute: Callable[[], Tensor]) -> Tensor:
        """What was stored under `parts`, else what `compute` gives, which is then stored. On the CPU, in its dtype."""
        if self.folder is None:
            return compute().cpu()
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        key = sha256("\0".join(parts))
        path = self.folder / f"{key}.safetensors"
        if path.is_file():
            try:
                found = load_file(path)["embeddings"]
                log.info("embeddings from %s", path)
                return found
            except (SafetensorError, OSError, KeyError) as error:
                log.warning("%s is broken (%s) and is computed anew", path, error)
        result = compute().cpu().contiguous()
        try:
            with replacing(path, shared=True) as partial:
                save_file({"embeddings": result}, partial)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder} takes no embeddings: {error}") from error
        return result

"""Embeddings on disk, keyed by the fingerprints of weights, data, preprocessing and precision.

A fingerprint covers content or behaviour, never a path or a date. A changed weight, image, crop or token gives another
key, so an entry is never out of date.
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
PROBE_TEXT = "Chest X-ray, \u03b1-SMA \u00d7400; p<0.05 (A\u2013C)."
"""A text that two tokenizers rarely split in the same way."""


def default_folder() -> Path:
    """Return BCLIP_CACHE, or ~/.cache/bclip_fast/embeddings if it is not set."""
    return Path(os.environ.get("BCLIP_CACHE") or Path.home() / ".cache" / "bclip_fast" / "embeddings")


def weights_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of the class name and of the name, shape, dtype and bytes of every tensor in the state."""
    digest = hashlib.sha256(f"{__version__} {type(model).__name__}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def preprocess_fingerprint(preprocess: Callable[[Any], Tensor]) -> str:
    """Return the SHA-256 of the results for three probe images. It covers any callable by its behaviour.

    Raises:
        UserError: two results for one image differ, so the callable augments.
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
        raise UserError("preprocess gives two results for one image; evaluate with a preprocess that does not augment")
    return first


def texts_fingerprint(texts: Sequence[str], tokenizer: Callable[[list[str]], Tensor]) -> str:
    """Return the SHA-256 of the texts, and of the tokens of the first 16 texts, the last 16 texts and a probe text."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
    ids = tokenizer([*texts[:16], *texts[-16:], PROBE_TEXT])
    return digest.hexdigest() + sha256(ids.contiguous().numpy().tobytes())


class EmbeddingCache:
    """A folder of `KEY.safetensors` files. Without a folder, the cache stores nothing."""

    def __init__(self, folder: Path | None) -> None:
        """folder: created by the first entry. None: no cache."""
        self.folder = folder

    def get_or_compute(self, parts: Sequence[str], compute: Callable[[], Tensor]) -> Tensor:
        """Return the entry of the key `parts`. If it is missing or damaged, compute and store it.

        Returns a CPU tensor in the dtype of `compute`. Raises UserError if the folder cannot be written.
        """
        if self.folder is None:
            return compute().cpu()
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        key = sha256("\0".join(parts))
        path = self.folder / f"{key}.safetensors"
        if path.is_file():
            try:
                cached = load_file(path)["embeddings"]
                log.info("embeddings from %s", path)
                return cached
            except (SafetensorError, OSError, KeyError) as error:
                log.warning("%s is damaged (%s); computing it again", path, error)
        embeddings = compute().cpu().contiguous()
        try:
            with replacing(path) as partial:
                save_file({"embeddings": embeddings}, partial)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write embeddings to {self.folder}: {error}; use --cache") from error
        return embeddings

"""Compare exported ONNX graphs in onnxruntime with the model in torch: embeddings of the same pixels and tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast.data.image_files import read_rgb
from bclip_fast.data.transform import Preprocess
from bclip_fast.errors import UserError
from bclip_fast.eval.datasets import image_name
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.search.index import open_images

from .onnx_files import TOWERS

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference of an element of two embeddings of unit length. float32 sums in another order differ by 1e-6."""
_BATCHES = (1, 7)
_MAX_SAMPLES = 64
_CAPTIONS = (
    "x-ray",
    "Axial T2-weighted MRI of the brain.",
    "Chest radiograph of a 54-year-old patient with right lower lobe consolidation (arrow).",
    "Haematoxylin and eosin staining of colon tissue, original magnification \u00d7200; scale bar, 50 \u00b5m.",
    "Kaplan-Meier curves of overall survival by treatment group. " * 6,
    "Fundus photograph",
    "(A) Western blot and (B) relative expression of \u03b2-actin in treated and control cells (n = 3).",
)


@dataclass(frozen=True)
class Loss:
    """The loss of accuracy of the 8-bit graphs, over pairs.

    image, text: mean cosine of a tower's embedding and its 8-bit embedding.
    recall: Recall@1 of the float32 graphs, image to text and text to image, and the same of the 8-bit graphs. None
        without data.
    """

    num_samples: int
    image: float
    text: float
    recall: tuple[tuple[float, float], tuple[float, float]] | None

    def __str__(self) -> str:
        text = f"8-bit embeddings, {self.num_samples} samples: mean cosine {self.image:.5f} for images and "
        text += f"{self.text:.5f} for texts"
        if self.recall is not None:
            (before, after) = self.recall
            text += (
                f"; Recall@1 image to text {before[0]:.3f} before and {after[0]:.3f} after, text to image "
                f"{before[1]:.3f} and {after[1]:.3f}"
            )
        return text


@dataclass(frozen=True)
class Samples:
    """Pixels (n, 3, S, S) from `Preprocess`, and n captions.

    are_pairs: image and caption of a sample belong together.
    """

    images: Tensor
    captions: Sequence[str]
    are_pairs: bool


def read_samples(path: str, split: str, preprocess: Preprocess) -> Samples:
    """The first pairs of some data, at most 64.

    Raises:
        UserError: the data have no captions, or fewer than two pairs.
    """
    data = open_images(path, split)
    captions = data.captions()
    if captions is None or len(captions) < 2:
        raise UserError(f"data={path} has {'no' if captions is None else 'fewer than two'} captions; pass shards, a "
                        "CSV with columns path,caption or a folder of images with .txt files")  # fmt: skip
    num = min(len(data), _MAX_SAMPLES)
    images = [preprocess(read_rgb(data.image(i), partial(image_name, data, i))) for i in range(num)]
    return Samples(torch.stack(images), captions[:num], are_pairs=True)


def made_up_samples(size: int) -> Samples:
    """Seven images of coloured patches, and seven captions of 3 to over 100 tokens."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(len(_CAPTIONS), 3, 5, 6, generator=generator)
    return Samples(F.interpolate(patches, (size, size), mode="bilinear"), _CAPTIONS, are_pairs=False)


def check(folder: Path, model: BiomedClip, tokenizer: Tokenizer, samples: Samples, *, int8: bool) -> Loss | None:
    """Compare the graphs in `folder` with the model, in batches of one and of seven samples.

    Returns:
        the loss of accuracy of the 8-bit graphs, or None without `int8`.

    Raises:
        UserError: a graph gives other embeddings than the model.
    """
    ids = tokenizer(list(samples.captions))
    used = int((ids != tokenizer.pad_id).sum(1).max())
    inputs = {"image": samples.images, "text": ids if model.config.text.computes_padding else ids[:, :used]}
    encode: dict[str, Callable[[Tensor], Tensor]] = {"image": model.encode_image, "text": model.encode_text}
    exact, rough = {}, {}
    for tower, rows in inputs.items():
        path = folder / f"{tower}.onnx"
        with torch.no_grad():
            expected = torch.cat([encode[tower](part) for part in rows.split(8)])
        for batch in _BATCHES:
            exact[tower] = run(path, rows, batch)
            difference = float((exact[tower] - expected).abs().max())
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{path.name} differs from the model by {difference:.1e} in batches of {batch}, more than "
                    f"{TOLERANCE:.0e}: onnxruntime or torch's exporter has a fault; try other versions of them"
                )
            log.info("%s: at most %.1e from torch in batches of %d", path.name, difference, batch)
        if int8:
            rough[tower] = run(folder / f"{tower}_int8.onnx", rows, max(_BATCHES))
    if not int8:
        return None
    cosines = {tower: float((exact[tower] * rough[tower]).sum(1).mean()) for tower in TOWERS}
    recall = (_recall(exact), _recall(rough)) if samples.are_pairs else None
    return Loss(len(ids), cosines["image"], cosines["text"], recall)


def run(path: Path, rows: Tensor, batch: int) -> Tensor:
    """Embeddings of `rows` by a graph, `batch` rows a call, with onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: part.numpy()})[0]) for part in rows.split(batch)])


def _recall(embeddings: dict[str, Tensor]) -> tuple[float, float]:
    """Recall@1 of images as queries and of texts as queries. The pair of row i is row i."""
    scores = embeddings["image"] @ embeddings["text"].T
    rows = torch.arange(len(scores))
    image_to_text, text_to_image = (float((table.argmax(1) == rows).float().mean()) for table in (scores, scores.T))
    return image_to_text, text_to_image

"""Tell the kind of a figure from cheap features of its image and caption: multinomial logistic regression.

`python -m benchmarks.figure_kinds` trains and measures it. The weights are integers, so the sums are exact, and
every processor gives the same probabilities.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from bclip_fast.data.image_files import ImageError, open_image
from bclip_fast.ingest.sanitize import MAX_PIXELS

from . import taxonomy
from .features import SCALE, caption_features, image_features

# How the column kind_by begins if this classifier decided.
VERSION_PREFIX = "features-"
WEIGHTS = "classifier.safetensors"
# A logit is a sum of feature * weight, divided by this number.
UNIT = SCALE << 12


@dataclass(frozen=True)
class Classifier:
    """Kinds by linear logits.

    Args:
        kinds: names of the N kinds.
        weights: (N, F) int64.
        bias: (N,) int64.
    """

    kinds: tuple[str, ...]
    weights: np.ndarray
    bias: np.ndarray

    @property
    def version(self) -> str:
        """Eight hexadecimal digits that differ between weights."""
        return hashlib.sha256(self.weights.tobytes() + self.bias.tobytes()).hexdigest()[:8]

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return the probabilities (..., N) float64, rounded to 4 digits, of features (..., F)."""
        logits = (features @ self.weights.T + self.bias) / UNIT
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return np.round(powers / powers.sum(-1, keepdims=True), 4)

    def __call__(self, image: Image.Image, caption: str) -> tuple[str, float]:
        """Return the most probable kind of an RGB image with its caption, and its probability."""
        probabilities = self.probabilities(features_of(image, caption))
        best = int(probabilities.argmax())
        return self.kinds[best], float(probabilities[best])


def kind_of(data: bytes, caption: str) -> tuple[str, float] | None:
    """Return the kind of an encoded image with its caption, and its probability. None if it can't be decoded."""
    try:
        image = open_image(data, MAX_PIXELS).rgb()
    except ImageError:
        return None
    return classifier()(image, caption)


def kind_columns(data: bytes, caption: str) -> dict[str, Any]:
    """Return the columns of the manifest about the kind of an encoded image with its caption."""
    found = kind_of(data, caption)
    columns = {"kind_by": f"{VERSION_PREFIX}{classifier().version}"}
    return columns if found is None else columns | {"kind": found[0], "kind_p": found[1]}


def features_of(image: Image.Image, caption: str) -> np.ndarray:
    """Return the features (F,) int64 of an RGB image with its caption."""
    return np.concatenate([image_features(image), caption_features(caption, keywords())])


@functools.cache
def keywords() -> tuple[tuple[str, ...], ...]:
    """Return the keywords of each kind of the package's taxonomy."""
    return tuple(kind.keywords for kind in taxonomy().kinds)


def fingerprint() -> str:
    """Return a hash of everything that defines the features, besides the code of `features`."""
    return hashlib.sha256(repr(keywords()).encode()).hexdigest()[:16]


@functools.cache
def classifier() -> Classifier:
    """Return the classifier of the package."""
    from safetensors import safe_open

    with safe_open(str(files(__package__) / WEIGHTS), "np") as file:
        facts = file.metadata()
        weights, bias = (file.get_tensor(name).astype(np.int64) for name in ("weights", "bias"))
    if facts["keywords"] != fingerprint():
        raise RuntimeError(f"{WEIGHTS} is of other keywords than kinds.toml; run python -m benchmarks.figure_kinds")
    return Classifier(tuple(facts["kinds"].split()), weights, bias)

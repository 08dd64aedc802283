"""Tell the kind of a figure from cheap features of its image and caption: multinomial logistic regression.

`python -m benchmarks.figure_kinds` trains and measures it. The weights are integers, so the sums are exact, and
every processor gives the same probabilities.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from PIL import Image

from . import taxonomy
from .features import SCALE, caption_features, image_features

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

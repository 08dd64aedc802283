"""Train and measure the classifier of figure kinds on labelled figures: python -m benchmarks.figure_kinds ARTICLES

ARTICLES has pairs.jsonl with image, caption and pmcid of each figure. The labels have image, kind, is_composite, sure.
The measurement is out of fold: the folds divide the articles, so no article trains a classifier that it measures.
With --write, it then trains on all figures and writes the weights of the package.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bclip_fast.data.shards.format import Sample
from bclip_fast.ingest import kinds
from bclip_fast.ingest.kinds import classifier as package
from bclip_fast.ingest.kinds.classifier import UNIT, Classifier, features_of
from bclip_fast.ingest.kinds.features import SCALE
from bclip_fast.ingest.label import Labeller, zero_shot

from .measure import environment, record

log = logging.getLogger(__name__)

LABELS = Path("tests/ingest/labels/kinds.json")
NUM_FOLDS = 10
# Strength of the L2 penalty, as scikit-learn's C.
PENALTY = 0.05


def read_figures(articles: Path, labels: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the features (n, F), the kinds (n,) as positions in the taxonomy, and the fold (n,) of each figure."""
    from bclip_fast.data.image_files import open_image
    from bclip_fast.ingest.sanitize import sanitize

    rows = {row["image"]: row for row in map(json.loads, (articles / "pairs.jsonl").read_text().splitlines())}
    labelled = json.loads(labels.read_text())
    names = kinds.taxonomy().names
    features, fold_of = [], folds([rows[label["image"]]["pmcid"] for label in labelled])
    for label in labelled:
        # As shards have it: reduced, and encoded as JPEG.
        image = open_image(sanitize((articles / label["image"]).read_bytes()).data).rgb()
        features.append(features_of(image, rows[label["image"]]["caption"]))
    return np.array(features), np.array([names.index(label["kind"]) for label in labelled]), fold_of


def zero_shot_kinds(articles: Path, labels: Path, labeller: Labeller) -> tuple[list[str | None], list[str]]:
    """Return the kind of each labelled figure by a model and its prompts, None if it is damaged, and by eye."""
    labelled = json.loads(labels.read_text())
    samples = (Sample("figure", (articles / label["image"]).read_bytes(), "") for label in labelled)
    found = [kind and kind[0] for kind in zero_shot(labeller, samples)]
    return found, [label["kind"] for label in labelled]


def folds(articles: Sequence[str]) -> np.ndarray:
    """Return the fold of each figure: the largest articles first, each to the fold with the fewest figures."""
    counts: dict[str, int] = {}
    for article in articles:
        counts[article] = counts.get(article, 0) + 1
    sizes, fold_of = [0] * NUM_FOLDS, {}
    for article in sorted(counts, key=lambda article: (-counts[article], article)):
        fold_of[article] = sizes.index(min(sizes))
        sizes[fold_of[article]] += counts[article]
    return np.array([fold_of[article] for article in articles])


def train(features: np.ndarray, targets: np.ndarray) -> Classifier:
    """Return a classifier of the kinds that occur in `targets`, with integer weights."""
    from sklearn.linear_model import LogisticRegression

    scaled = features / SCALE
    mean, spread = scaled.mean(0), np.maximum(scaled.std(0), 1e-3)
    model = LogisticRegression(C=PENALTY, max_iter=2000, tol=1e-6).fit((scaled - mean) / spread, targets)
    weights = model.coef_ / spread
    bias = model.intercept_ - weights @ mean
    names = kinds.taxonomy().names
    return Classifier(
        tuple(names[number] for number in model.classes_),
        np.round(weights * UNIT / SCALE).astype(np.int64),
        np.round(bias * UNIT).astype(np.int64),
    )


def out_of_fold(features: np.ndarray, targets: np.ndarray, fold_of: np.ndarray) -> np.ndarray:
    """Return the probabilities (n, kinds of the taxonomy) of each figure by a classifier that never saw the article."""
    names = kinds.taxonomy().names
    result = np.zeros((len(targets), len(names)))
    for fold in range(NUM_FOLDS):
        held_out = fold_of == fold
        model = train(features[~held_out], targets[~held_out])
        columns = [names.index(name) for name in model.kinds]
        result[np.ix_(held_out, columns)] = model.probabilities(features[held_out])
    return result


def measure(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return accuracy, mean recall of the kinds, calibration error, and how well medical images are found."""
    predicted, highest = probabilities.argmax(1), probabilities.max(1)
    is_right = predicted == targets
    recalls = [float(is_right[targets == kind].mean()) for kind in np.unique(targets)]
    bins = np.minimum((highest * 10).astype(int), 9)
    error = sum(abs(float((is_right[bins == b] - highest[bins == b]).sum())) for b in range(10)) / len(targets)
    medical = np.array([kind.medical for kind in kinds.taxonomy().kinds])
    is_medical, says_medical = medical[targets], probabilities[:, medical].sum(1) > 0.5
    hits = float((is_medical & says_medical).sum())
    return {
        "accuracy": float(is_right.mean()),
        "mean_recall": float(np.mean(recalls)),
        "ece": error,
        "accuracy_above_half": float(is_right[highest > 0.5].mean()),
        "share_above_half": float((highest > 0.5).mean()),
        "medical_precision": hits / max(1.0, float(says_medical.sum())),
        "medical_recall": hits / max(1.0, float(is_medical.sum())),
    }


def measure_zero_shot(predicted: np.ndarray, targets: np.ndarray, num_resamples: int = 10_000) -> dict[str, float]:
    """Return accuracy and mean recall of the kinds, with the ends of their 95 % intervals.

    The intervals are those of the bootstrap over figures, for the mean recall within each kind.
    """
    generator = np.random.default_rng(0)
    is_right = predicted == targets
    parts = {"accuracy": [is_right], "mean_recall": [is_right[targets == kind] for kind in np.unique(targets)]}
    result: dict[str, float] = {}
    for name, groups in parts.items():
        # The number of right answers among n drawn ones is binomial.
        drawn = np.mean([generator.binomial(len(g), g.mean(), num_resamples) / len(g) for g in groups], axis=0)
        low, high = np.quantile(drawn, [0.025, 0.975])
        value = float(np.mean([g.mean() for g in groups]))
        result |= {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
    return result


def _row(contender: str, count: int, measured: dict[str, float]) -> dict[str, Any]:
    return {**environment(), "operator": "figure_kinds", "case": f"{count} figures", "contender": contender, **measured}


def confusion(predicted: np.ndarray, targets: np.ndarray) -> str:
    """Return the confusion matrix as text: a row for each kind by eye, a column for each prediction."""
    names = kinds.taxonomy().names
    lines = [" " * 14 + " ".join(name[:4].rjust(4) for name in names)]
    for number, name in enumerate(names):
        counts = np.bincount(predicted[targets == number], minlength=len(names))
        lines.append(f"{name:13} " + " ".join(f"{count or '.':>4}" for count in counts))
    return "\n".join(lines)


def write(model: Classifier, path: Path) -> None:
    """Write the weights of the package."""
    from safetensors.numpy import save

    facts = {"kinds": " ".join(model.kinds), "keywords": package.fingerprint()}
    path.write_bytes(save({"weights": np.ascontiguousarray(model.weights, np.int32), "bias": model.bias}, facts))


def main() -> None:
    """Print the measurement. With --write, write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("articles", type=Path)
    parser.add_argument("--labels", type=Path, default=LABELS)
    parser.add_argument("--write", action="store_true", help="train on all figures, and write the package's weights")
    parser.add_argument("--record", action="store_true", help="append rows to benchmarks/results/<device>.jsonl")
    parser.add_argument("--model", default="", help="measure zero-shot classification by this model instead")
    arguments = parser.parse_args()
    if arguments.model:
        found, by_eye = zero_shot_kinds(arguments.articles, arguments.labels, Labeller(arguments.model))
        names = kinds.taxonomy().names
        # A damaged image counts as `other`.
        predicted = np.array([names.index(kind or "other") for kind in found])
        targets = np.array([names.index(kind) for kind in by_eye])
        measured = measure_zero_shot(predicted, targets)
        print(f"{arguments.model}: " + " ".join(f"{key}={value:.3f}" for key, value in measured.items()))
        print(confusion(predicted, targets))
        if arguments.record:
            record([_row(f"zero-shot {Path(arguments.model).name}", len(targets), measured)])
        return
    features, targets, fold_of = read_figures(arguments.articles, arguments.labels)
    num_image = features.shape[1] - len(kinds.taxonomy().kinds) - 3
    parts: dict[str, Any] = {
        "image": features[:, :num_image],
        "caption": features[:, num_image:],
        "image and caption": features,
    }
    majority = float(np.bincount(targets).max() / len(targets))
    print(f"{len(targets)} figures, {len(np.unique(targets))} kinds; the most frequent kind alone: {majority:.3f}")
    rows = []
    for name, part in parts.items():
        probabilities = out_of_fold(part, targets, fold_of)
        measured = measure(probabilities, targets)
        rows.append(_row(name, len(targets), measured))
        print(f"{name}: " + " ".join(f"{key}={value:.3f}" for key, value in measured.items()))
    print(confusion(probabilities.argmax(1), targets))
    if arguments.record:
        record(rows)
    if arguments.write:
        model = train(features, targets)
        path = Path(package.__file__).with_name(package.WEIGHTS)
        write(model, path)
        print(f"wrote {path.name}: version {model.version}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""Build the quickstart's dataset from real biomedical images that Python packages contain.

The packages (extra `quickstart`), their images and licences:

=================  ===================================================  =========================
package            images                                               licence
=================  ===================================================  =========================
nilearn            MNI152 2009a template: T1, grey and white matter     BSD-3; template: free to
                                                                        use with its notice (MNI)
pydicom            CT of skull base and spine                           MIT
pydicom-data       CT, MR, CR, US, NM                                   MIT
scikit-image       immunohistochemistry, retina, microaneurysms, cell   BSD-3; images CC0 or no
                                                                        known restriction
mahotas            fluorescent nuclei                                   MIT
wsidicom-data      H&E tile of OpenSlide's CMU-1                        Apache-2.0; slide CC0
=================  ===================================================  =========================

The splits divide volumes by blocks of slices (`volumes`), and images by parts that don't overlap (`photographs`).
Captions of both splits follow the same rules (`captions`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import explained, write_text

from . import photographs, volumes
from .captions import LABELS, Facts, compose

__all__ = ["LABELS", "LabelSummary", "build", "summarize_labels"]

log = logging.getLogger(__name__)

SIDE = 112  # pixels. The quickstart's model sees 64 to 96.
SKIPPED_FILE = "skipped.json"
# Number of crops, divided evenly among the images of a modality.
_PER_MODALITY = {"train": 240, "val": 28}
# Limit for the crops of an image without a held-out part.
_MAX_TRAIN_ONLY = 60
_MODULES = {
    "nilearn": "nilearn",
    "pydicom": "pydicom",
    "pydicom-data": "data_store",
    "scikit-image": "skimage",
    "mahotas": "mahotas",
    "wsidicom-data": "wsidicom_data",
}


@dataclass(frozen=True)
class LabelSummary:
    """The classes of one kind of label among some samples.

    Attributes:
        counts: number of samples of each class.
        chance: 1 / number of classes.
        majority: share of the most frequent class.
    """

    counts: dict[str, int]
    chance: float
    majority: float


def summarize_labels(metas: Iterable[Mapping[str, Any]]) -> dict[str, LabelSummary]:
    """Return the classes of each kind of `LABELS` in the metadata of samples, most frequent first.

    Samples without a label of a kind don't count.
    """
    counters: dict[str, Counter[str]] = {kind: Counter() for kind in LABELS}
    for meta in metas:
        for kind, counter in counters.items():
            if (value := meta.get(kind)) is not None:
                counter[value] += 1
    return {
        kind: LabelSummary(
            dict(counter.most_common()),
            1 / len(counter),
            max(counter.values()) / counter.total(),
        )
        for kind, counter in counters.items()
        if counter
    }


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(_MODULES[package])
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the quickstart's images need the package {package}, which is not installed; "
            'run: pip install "bclip_fast[quickstart]"'
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _jpeg(image: Image.Image, random: np.random.Generator, split: str) -> bytes:
    """Return a baseline RGB JPEG of SIDE x SIDE. Training slices of volumes (mode "L") get a random gamma."""
    has_random_gamma = image.mode == "L" and split == "train"
    image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if has_random_gamma:
        gamma = float(np.exp(random.uniform(-0.25, 0.25)))
        image = image.point([round(255 * (level / 255) ** gamma) for level in range(256)])
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _sample(
    key: str,
    split: str,
    image: Image.Image,
    facts: Facts,
    meta: dict[str, Any],
    random: np.random.Generator,
) -> Sample:
    meta = {**facts.labels(), **meta}
    return Sample(key, _jpeg(image, random, split), compose(facts, random), meta)


def _origin(package: str, file: str) -> dict[str, str]:
    return {"source": package, "version": importlib.metadata.version(package), "file": file}


def _volume_samples(seed: int) -> Iterator[tuple[str, Sample]]:
    folder = _folder("nilearn")
    for number, (name, file) in enumerate(volumes.MAPS.items()):
        random = np.random.default_rng([seed, 2000 + number])
        origin = _origin("nilearn", file)
        cuts = volumes.slices(name, folder / file, seed)
        for index, (split, image, facts, meta) in enumerate(cuts):
            key = f"mni-{name.lower()}-{facts.plane}-{index:04d}"
            yield split, _sample(key, split, image, facts, {**origin, **meta}, random)


@dataclass(frozen=True)
class _Plan:
    """A number of crops of one source for one split. `images`: its images with their facts."""

    source: photographs.Source
    images: list[tuple[np.ndarray, Facts]]
    split: str
    count: int


def _plan_crops(skipped: list[dict[str, str]]) -> list[_Plan]:
    """Decode all images and divide the crops of each modality among them."""
    loaded = defaultdict(list)
    for source in photographs.SOURCES:
        path = _folder(source.package) / source.path
        try:
            images = photographs.load(source, path)
        # A decoder may be missing, or another version of the package may lack the file.
        except (OSError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            log.warning("skipping %s of %s: %s", source.path, source.package, reason)
            skipped.append({"package": source.package, "file": source.path, "reason": reason})
            continue
        loaded[images[0][1].modality].append((source, images))
    plans = []
    for entries in loaded.values():
        for split, total in _PER_MODALITY.items():
            sources = [entry for entry in entries if split == "train" or entry[0].side is not None]
            for i, (source, images) in enumerate(sources):
                count = total // len(sources) + (i < total % len(sources))
                if source.side is None:
                    count = min(count, _MAX_TRAIN_ONLY)
                plans.append(_Plan(source, images, split, count))
    return plans


def _crop_samples(plan: _Plan, seed: int) -> Iterator[tuple[str, Sample]]:
    source, split = plan.source, plan.split
    number = photographs.SOURCES.index(source)
    random = np.random.default_rng([seed, 3000 + number, split == "val"])
    origin = _origin(source.package, source.path)
    cuts = photographs.crops(source, plan.images, split, plan.count, seed)
    for index, (image, facts, meta) in enumerate(cuts):
        key = f"{source.name}-{split}-{index:04d}"
        yield split, _sample(key, split, image, facts, {**origin, **meta}, random)


def build(out: Path, *, seed: int = 0, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Write the splits "train" and "val" as shards below `out`. The same seed gives the same bytes.

    The metadata of each sample has source, version, file, and its labels of the kinds in `LABELS`. A slice also has
    volume, axis, slice_index and position_mm. A crop has `picture` (name of the source), frame, box and part, the last
    two as [top, left, height, width] in pixels.

    `skipped.json` lists unreadable files as [{package, file, reason}].

    Args:
        progress: function of (stage, number of finished items, number of items). It is called from time to time.

    Raises:
        UserError: a package is missing.
    """
    for package in _MODULES:
        _folder(package)
    report = progress or (lambda stage, done, total: None)
    skipped: list[dict[str, str]] = []
    plans = _plan_crops(skipped)
    total = volumes.count() + sum(plan.count for plan in plans)
    cuts = chain(_volume_samples(seed), *(_crop_samples(plan, seed) for plan in plans))
    samples: list[tuple[str, Sample]] = []
    for entry in cuts:
        samples.append(entry)
        if len(samples) % 50 == 0 or len(samples) == total:
            report("cutting images", len(samples), total)
    # Shuffle, so that neighbours in a volume are not neighbours in the shards.
    order = np.random.default_rng([seed, 4000]).permutation(total)
    with explained(Path(out)), ShardWriter(out) as writer:
        for done, i in enumerate(order, start=1):
            split, sample = samples[i]
            writer.write(sample, split)
            if done % 500 == 0 or done == total:
                report("writing shards", done, total)
    write_text(Path(out) / SKIPPED_FILE, json.dumps(skipped, indent=1) + "\n")
    _log_summary(samples, skipped)


def _log_summary(samples: list[tuple[str, Sample]], skipped: list[dict[str, str]]) -> None:
    for split in ("train", "val"):
        metas = [sample.meta for sample_split, sample in samples if sample_split == split]
        counts = summarize_labels(metas)["modality"].counts
        listed = ", ".join(f"{value} {count}" for value, count in counts.items())
        log.info("%s: %s samples (%s)", split, len(metas), listed)
    log.info("%s files skipped", len(skipped))

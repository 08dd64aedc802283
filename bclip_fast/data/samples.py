"""The quickstart's data: real biomedical images that Python packages ship, with captions.

Packages (extra `quickstart`) and what is taken from them:

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

Volumes are split by blocks of slices (`samples_volumes`), pictures by non-overlapping parts
(`samples_pictures`); captions of both splits come from the same rules (`samples_captions`).
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
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bclip_fast.data import samples_pictures, samples_volumes
from bclip_fast.data.samples_captions import LABELS, Facts, compose
from bclip_fast.data.shards import Sample, ShardWriter
from bclip_fast.errors import UserError

__all__ = ["LABELS", "LabelSummary", "build", "summarize_labels"]

log = logging.getLogger(__name__)

SIDE = 112  # pixels; the quickstart's model sees 64 to 96
SKIPPED_FILE = "skipped.json"
_PER_MODALITY = {"train": 240, "val": 28}  # crops, shared evenly among a modality's pictures
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
    """Classes of one kind among some samples: chance is 1 / number of classes."""

    counts: dict[str, int]
    chance: float
    majority: float


def summarize_labels(metas: Iterable[Mapping[str, Any]]) -> dict[str, LabelSummary]:
    """For each kind of `LABELS` the classes present in the metas of a split, most frequent first.

    Samples to which a kind does not apply are not counted.
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
    """Baseline RGB JPEG of SIDE x SIDE; greyscale training images get another gamma."""
    grey = image.mode == "L"
    image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if grey and split == "train":
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
    meta = {**facts.labels(), **meta, "num_pixels": SIDE}
    return Sample(key, _jpeg(image, random, split), compose(facts, random), meta)


def _volume_samples(seed: int) -> Iterator[tuple[str, Sample]]:
    folder = _folder("nilearn")
    version = importlib.metadata.version("nilearn")
    for name, file in samples_volumes.MAPS.items():
        random = np.random.default_rng([seed, 2000, list(samples_volumes.MAPS).index(name)])
        cuts = samples_volumes.slices(name, folder / file, seed)
        for number, (split, image, facts, meta) in enumerate(cuts):
            meta |= {"source": "nilearn", "version": version, "file": file}
            key = f"mni-{name.lower()}-{facts.plane}-{number:04d}"
            yield split, _sample(key, split, image, facts, meta, random)


def _picture_samples(seed: int, skipped: list[dict[str, str]]) -> Iterator[tuple[str, Sample]]:
    loaded: dict[str, list[tuple[samples_pictures.Source, list[tuple[np.ndarray, Facts]]]]]
    loaded = defaultdict(list)
    for source in samples_pictures.SOURCES:
        path = _folder(source.package) / source.path
        try:
            pictures = samples_pictures.load(source, path)
        # A decoder that is missing or a file that another version of the package lacks.
        except (OSError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            log.warning("skipping %s of %s: %s", source.path, source.package, reason)
            skipped.append({"package": source.package, "file": source.path, "reason": reason})
            continue
        loaded[pictures[0][1].modality].append((source, pictures))
    for entries in loaded.values():
        for split, total in _PER_MODALITY.items():
            used = [entry for entry in entries if split == "train" or entry[0].side is not None]
            for place, (source, pictures) in enumerate(used):
                count = total // len(used) + (place < total % len(used))
                version = importlib.metadata.version(source.package)
                number = samples_pictures.SOURCES.index(source)
                random = np.random.default_rng([seed, 3000 + number, split == "val"])
                cuts = samples_pictures.crops(source, pictures, split, count, seed)
                for index, (image, facts, meta) in enumerate(cuts):
                    meta |= {"source": source.package, "version": version, "file": source.path}
                    key = f"{source.name}-{split}-{index:04d}"
                    yield split, _sample(key, split, image, facts, meta, random)


def build(
    out: Path, *, seed: int = 0, progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Write the sets "train" and "val" as shards below `out`, the same bytes for the same seed.

    `progress(stage, done, total)` is called now and then. Files that could not be read are
    logged and listed in `skipped.json` ([{package, file, reason}]). UserError: a package is
    missing, or nothing could be read.
    """
    for package in _MODULES:
        _folder(package)
    skipped: list[dict[str, str]] = []
    samples: list[tuple[str, Sample]] = []
    expected = _expected_count()
    for generator in (_volume_samples(seed), _picture_samples(seed, skipped)):
        for sample in generator:
            samples.append(sample)
            if progress is not None and len(samples) % 50 == 0:
                progress("cutting images", len(samples), expected)
    # Neighbours in the shards should not be neighbours in a volume.
    order = np.random.default_rng([seed, 4000]).permutation(len(samples))
    with ShardWriter(out) as writer:
        for done, i in enumerate(order):
            split, sample = samples[i]
            writer.write(sample, split)
            if progress is not None and done % 500 == 0:
                progress("writing shards", done, len(samples))
    (Path(out) / SKIPPED_FILE).write_text(json.dumps(skipped, indent=1) + "\n", encoding="utf-8")
    if progress is not None:
        progress("writing shards", len(samples), len(samples))
    _log_summary(samples, skipped)


def _expected_count() -> int:
    volumes = sum(
        len(samples_volumes.split_positions(plane)[1]) + samples_volumes.TRAIN_PER_MAP_AND_PLANE
        for plane in samples_volumes.PLANES
    )
    modalities = 9
    return len(samples_volumes.MAPS) * volumes + modalities * sum(_PER_MODALITY.values())


def _log_summary(samples: list[tuple[str, Sample]], skipped: list[dict[str, str]]) -> None:
    for split in ("train", "val"):
        metas = [sample.meta for which, sample in samples if which == split]
        counts = summarize_labels(metas)["modality"].counts
        listed = ", ".join(f"{value} {count}" for value, count in counts.items())
        log.info("%s: %s samples (%s)", split, len(metas), listed)
    log.info("%s files skipped", len(skipped))

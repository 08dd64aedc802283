"""Samples that are positives of one another, by what the manifest of a dataset says of them.

Ingest keeps pairs whose image or caption occurs more than once. A contrastive loss that takes them as negatives pushes
equal images and captions apart. `group_ids` gives such pairs one number, and the losses take these numbers as `groups`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bclip_fast.data.storage import LocalStorage
from bclip_fast.errors import UserError

from .filtered import FilteredDataset
from .format import CAPTION
from .manifest import MANIFEST
from .mixed import Dataset, MixedDataset
from .reader import ShardDataset

# Per kind, the columns of the manifest that it needs besides those that locate a sample.
KINDS: dict[str, tuple[str, ...]] = {
    "pair": (),
    "captions": ("caption",),
    "images": ("duplicate_of",),
    "duplicates": ("caption", "duplicate_of"),
    "figure": ("article", "figure_number"),
    "article": ("article",),
}
_PLACE = ("key", "split", "shard", "position")


def group_ids(dataset: Dataset, kind: str, texts: Sequence[str] = (CAPTION,)) -> np.ndarray | None:
    """The group of each sample of `dataset`, (samples,) int64. Samples of one group are positives of one another.

    Samples of different datasets of a mixture are in different groups.

    Args:
        kind: which samples belong together.
            pair: none. The result is None.
            captions: samples with a text in common, ignoring case and white space.
            images: samples whose images ingest found to be duplicates or near duplicates.
            duplicates: both, also through a third sample.
            figure: the panels of a figure.
            article: the figures of an article.
        texts: the kinds of texts that count for captions and duplicates, those that the loader draws.

    Raises:
        UserError: the manifest is missing, is damaged, lacks a column or does not list the samples of the split.
    """
    if not KINDS[kind]:
        return None
    if isinstance(dataset, MixedDataset):
        parts = []
        for name, member, start in zip(dataset.names, dataset.members, dataset.starts, strict=False):
            try:
                parts.append(start + _groups_of(member, kind, texts))
            except UserError as error:
                raise type(error)(f"dataset {name}: {error}") from None
        return np.concatenate(parts)
    return _groups_of(dataset, kind, texts)


def _groups_of(dataset: ShardDataset, kind: str, texts: Sequence[str]) -> np.ndarray:
    """The group of each sample of one dataset."""
    if isinstance(dataset, FilteredDataset):
        groups = _groups_of(dataset.unfiltered, kind, texts)[dataset.rows]
        _, first, numbers = np.unique(groups, return_index=True, return_inverse=True)
        return first[numbers]
    if not dataset.has_manifest:
        raise UserError(
            f"data.positives={kind} needs {MANIFEST}, which the tar files of {dataset.root} lack; set it to pair"
        )
    compares_texts = "caption" in KINDS[kind]
    further = [name for name in texts if name != CAPTION] if compares_texts else []
    table = _read_manifest(dataset, kind, (*KINDS[kind], *(("texts",) if further else ())))
    places = _places(dataset, table)
    groups = np.arange(len(dataset))
    edges = []
    if compares_texts and not further:
        edges.append(_equal(_normalised(table["caption"])))
    elif compares_texts:
        edges.append(_common_texts(table, texts))
    if kind in ("images", "duplicates"):
        edges.append(_duplicates(table))
    if kind in ("figure", "article"):
        edges.append(_equal(*(table[name] for name in KINDS[kind])))
    for first, second in edges:
        groups = connect(groups, places[first], places[second])
    return groups


def connect(groups: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The groups after those of first[i] and second[i] have become one for every i, each named by its lowest number."""
    groups = groups.copy()
    while True:
        left, right = groups[first], groups[second]
        lowest = np.minimum(left, right)
        if (left == right).all():
            return groups
        # The roots of both trees point to the lower one, and then every sample to the root of its tree.
        np.minimum.at(groups, left, lowest)
        np.minimum.at(groups, right, lowest)
        while (groups[groups] != groups).any():
            groups = groups[groups]


def _read_manifest(dataset: ShardDataset, kind: str, wanted: Sequence[str]) -> Any:
    """The rows of the dataset's split, with the columns `wanted`."""
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise UserError(f"data.positives={kind} reads {MANIFEST}, which needs pip install pyarrow") from error
    storage = dataset.storage
    path = storage.path(MANIFEST)
    try:
        # A URL's manifest is read in one piece. Of a local file, only the columns are read.
        source: Any = path if isinstance(storage, LocalStorage) else io.BytesIO(storage.read_all(MANIFEST))
        names = pq.read_schema(source).names
        if isinstance(source, io.BytesIO):
            source.seek(0)
        if missing := [name for name in wanted if name not in (*names, "duplicate_of", "texts")]:
            raise UserError(f"{path} has no column {missing[0]}, which data.positives={kind} needs")
        table = pq.read_table(
            source,
            columns=[name for name in (*_PLACE, *wanted) if name in names],
            filters=pc.field("split") == dataset.split,
        )
    except FileNotFoundError:
        raise UserError(f"{path} is missing, and data.positives={kind} needs it; copy it, or use pair") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}; copy it again, or set data.positives=pair") from error
    if len(table) != len(dataset):
        raise UserError(
            f"{path} lists {len(table)} samples of the split {dataset.split}, which has {len(dataset)}; build the "
            "dataset again, or set data.positives=pair"
        )
    return table


def _places(dataset: ShardDataset, table: Any) -> np.ndarray:
    """The dataset index of each row."""
    starts = dataset.shard_starts()
    shards = table["shard"].combine_chunks().dictionary_encode()
    names = shards.dictionary.to_pylist()
    if unknown := [name for name in names if name not in starts]:
        raise UserError(
            f"{dataset.storage.path(MANIFEST)} names the shard {unknown[0]}, which the dataset does not have"
        )
    first = np.array([starts[name] for name in names], dtype=np.int64)
    places = first[shards.indices.to_numpy()] + table["position"].to_numpy()
    if len(np.unique(places)) != len(dataset) or places.min() < 0 or places.max() >= len(dataset):
        raise UserError(
            f"{dataset.storage.path(MANIFEST)} does not give every sample one place; build the dataset again"
        )
    return places


def equal_texts(captions: Sequence[str]) -> np.ndarray:
    """The groups (n,) int64 of samples with the same caption, ignoring case and white space."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(" ".join(text.lower().split()), i) for i, text in enumerate(captions)], np.int64)


def _normalised(captions: Any) -> Any:
    import pyarrow.compute as pc

    return pc.replace_substring_regex(pc.utf8_trim_whitespace(pc.utf8_lower(captions)), pattern=r"\s+", replacement=" ")


def _common_texts(table: Any, kinds: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row, first row with a text in common). Texts are compared by 64 bits of their hash.

    Among 100 million texts, two different ones have the same 64 bits with a probability of 0.03 %.
    """
    owners, hashes = [], []
    for row, text in _texts(table, kinds):
        owners.append(row)
        digest = hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "little"))
    _, first, inverse = np.unique(np.array(hashes, np.uint64), return_index=True, return_inverse=True)
    rows = np.array(owners, np.int64)
    return rows, rows[first[inverse]]


def _texts(table: Any, kinds: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield (row, text) for all texts of these kinds."""
    row = 0
    for batch in table.select([name for name in ("caption", "texts") if name in table.column_names]).to_batches(4096):
        for values in batch.to_pylist():
            yield from ((row, text) for text in texts_of_row(values, kinds))
            row += 1


def texts_of_row(row: Mapping[str, Any], kinds: Iterable[str]) -> list[str]:
    """The texts of these kinds in a row of the manifest, given its columns `caption` and, if it has it, `texts`."""
    by_kind = {**json.loads(row.get("texts") or "{}"), CAPTION: [row["caption"]]}
    return [text for kind in kinds for text in by_kind.get(kind, ())]


def _equal(*columns: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row, first row with equal values in all columns). A row without a value equals no other."""
    codes = np.zeros(len(columns[0]), dtype=np.int64)
    known = np.ones(len(codes), dtype=bool)
    for column in columns:
        encoded = column.combine_chunks().dictionary_encode()
        known &= ~column.is_null().to_numpy()
        codes = codes * (len(encoded.dictionary) + 1) + encoded.indices.fill_null(len(encoded.dictionary)).to_numpy()
        _, codes = np.unique(codes, return_inverse=True)
    rows = np.flatnonzero(known)
    _, first, inverse = np.unique(codes[rows], return_index=True, return_inverse=True)
    return rows, rows[first[inverse]]


def _duplicates(table: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row, row of the image that it duplicates)."""
    import pyarrow.compute as pc

    if "duplicate_of" not in table.column_names:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # The original may be in another split. Then the rows that name it are duplicates of one another all the same.
    names = table["duplicate_of"].combine_chunks()
    originals = pc.index_in(names, value_set=table["key"].combine_chunks())
    rows = np.flatnonzero(originals.is_valid().to_numpy(zero_copy_only=False))
    among = _equal(table["duplicate_of"])
    inside = rows, originals.drop_null().to_numpy()
    return np.concatenate([among[0], inside[0]]), np.concatenate([among[1], inside[1]])

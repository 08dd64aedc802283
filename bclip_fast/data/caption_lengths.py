"""The number of tokens of each caption of a dataset, which micro-batches of bounded size need before any is read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bclip_fast.errors import UserError

from .shards.filtered import FilteredDataset
from .shards.format import CAPTION
from .shards.manifest import MANIFEST
from .shards.mixed import Dataset, MixedDataset
from .shards.positives import texts_of_row
from .shards.reader import ShardDataset
from .shards.tar_dataset import TarDataset
from .storage import LocalStorage

# Rows of the manifest in memory at a time.
_CHUNK = 8192
_USUAL_CAPTION = "a caption of usual length " * 8


def caption_lengths(
    dataset: Dataset,
    tokenize: Callable[[list[str]], list[list[int]]],
    share: tuple[int, int] = (0, 1),
    kinds: Sequence[str] = (CAPTION,),
) -> np.ndarray:
    """The number of tokens of each sample's longest text, (samples,) int32, from the manifest of the dataset.

    The captions of tar files of others are read one by one. The number is a limit that every pass keeps, whichever
    text it draws.

    Args:
        tokenize: function from n captions to the token ids of each.
        share: (i, n). Only the i-th of n shares of the samples is counted, and the others are 0. The sum of all shares
            has all samples.
        kinds: the kinds of texts that the loader draws. The caption always counts.

    Raises:
        UserError: a manifest is missing, is damaged, or does not list every sample of the split once.
    """
    if not isinstance(dataset, MixedDataset):
        return _lengths_of(dataset, tokenize, share, kinds)
    parts = []
    for name, member in zip(dataset.names, dataset.members, strict=True):
        try:
            parts.append(_lengths_of(member, tokenize, share, kinds))
        except UserError as error:
            raise type(error)(f"dataset {name}: {error}") from None
    return np.concatenate(parts)


def within_limit(tokens: list[int], limit: int, key: str | None) -> list[int]:
    """Cut a fallback's caption to the number of tokens that the damaged sample would have. Keep the last token.

    Args:
        key: key of a sample that is not a fallback. None: cut the caption.

    Raises:
        UserError: the caption of `key` is too long. So it isn't the caption in the manifest.
    """
    if len(tokens) <= limit:
        return tokens
    if key is not None:
        raise UserError(
            f"sample {key} has a caption of {len(tokens)} tokens, but its caption in {MANIFEST} has {limit}; build the "
            "dataset again"
        )
    return [*tokens[: limit - 1], tokens[-1]]


def _lengths_of(
    dataset: ShardDataset,
    tokenize: Callable[[list[str]], list[list[int]]],
    share: tuple[int, int],
    kinds: Sequence[str],
) -> np.ndarray:
    """The number of tokens of the longest text of each sample of one dataset."""
    if isinstance(dataset, FilteredDataset):
        return _lengths_of(dataset.unfiltered, tokenize, share, kinds)[dataset.rows]
    if isinstance(dataset, TarDataset):
        return _lengths_in_tars(dataset, tokenize, share)
    path = dataset.storage.path(MANIFEST)
    lengths = np.full(len(dataset), -1, np.int32)
    wanted = tuple(dict.fromkeys((CAPTION, *kinds)))
    for number, (places, rows) in enumerate(_chunks(dataset, has_texts=len(wanted) > 1)):
        if places.min(initial=0) < 0 or places.max(initial=0) >= len(dataset) or (lengths[places] >= 0).any():
            raise UserError(f"{path} does not give every sample one place; build the dataset again")
        lengths[places] = 0
        if number % share[1] == share[0]:
            texts = [texts_of_row(row, wanted) for row in rows]
            owners = np.repeat(places, list(map(len, texts)))
            tokens = tokenize([text for each in texts for text in each])
            np.maximum.at(lengths, owners, np.array(list(map(len, tokens)), np.int32))
    if (num_missing := int((lengths < 0).sum())) > 0:
        raise UserError(
            f"{path} lacks {num_missing} of the {len(dataset)} samples of the split {dataset.split}; build the dataset "
            "again"
        )
    return lengths


def _lengths_in_tars(
    dataset: TarDataset, tokenize: Callable[[list[str]], list[list[int]]], share: tuple[int, int]
) -> np.ndarray:
    """The number of tokens of each caption in tar files of others. A damaged sample counts as a usual one."""
    lengths = np.zeros(len(dataset), np.int32)
    for start in range(share[0] * _CHUNK, len(dataset), share[1] * _CHUNK):
        indices = range(start, min(start + _CHUNK, len(dataset)))
        captions = [_USUAL_CAPTION if text is None else text for text in dataset.captions_of(indices)]
        lengths[indices.start : indices.stop] = list(map(len, tokenize(captions)))
    return lengths


def _chunks(dataset: ShardDataset, has_texts: bool) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    """Yield (dataset indices, rows) of the rows of the split. has_texts: also read the column with further texts."""
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise UserError(f"micro_batch_tokens reads {MANIFEST}, which needs pip install pyarrow") from error
    path, starts = dataset.storage.path(MANIFEST), dataset.shard_starts()
    try:
        # A URL's manifest is read in one piece, but only the columns of a local file.
        is_local = isinstance(dataset.storage, LocalStorage)
        source: Any = path if is_local else io.BytesIO(dataset.storage.read_all(MANIFEST))
        file = pq.ParquetFile(source)
        names = file.schema_arrow.names
        columns = ["split", "shard", "position", "caption"]
        if missing := [name for name in columns if name not in names]:
            raise UserError(f"{path} has no column {missing[0]}, which micro_batch_tokens needs")
        columns += ["texts"] if has_texts and "texts" in names else []
        for batch in file.iter_batches(_CHUNK, columns=columns):
            rows = batch.filter(pc.equal(batch["split"], dataset.split)).to_pylist()
            if unknown := [row["shard"] for row in rows if row["shard"] not in starts]:
                raise UserError(f"{path} names the shard {unknown[0]}, which the dataset does not have")
            places = [starts[row["shard"]] + row["position"] for row in rows]
            yield np.array(places, np.int64), rows
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, and micro_batch_tokens needs it; copy it, or set micro_batch_size instead"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}; copy it again, or set micro_batch_size instead") from error

"""The number of tokens of each caption of a dataset, which micro-batches of bounded size need before any is read."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from bclip_fast.errors import UserError

from .shards.mixed import Dataset, MixedDataset
from .shards.positives import MANIFEST
from .shards.reader import ShardDataset
from .storage import LocalStorage

# Rows of the manifest in memory at a time.
_CHUNK = 8192


def caption_lengths(
    dataset: Dataset,
    tokenize: Callable[[list[str]], list[list[int]]],
    share: tuple[int, int] = (0, 1),
    column: str = "caption",
) -> np.ndarray:
    """The number of tokens of each sample's caption, (samples,) int32, from the manifest of the dataset.

    Args:
        tokenize: function from n captions to the token ids of each.
        share: (i, n). Only the i-th of n shares of the samples is counted, and the others are 0. The sum of all shares
            has all samples.
        column: column of the manifest with the captions. A sample without one has 0 tokens.

    Raises:
        UserError: a manifest is missing, is damaged, or does not list every sample of the split once.
    """
    if not isinstance(dataset, MixedDataset):
        return _lengths_of(dataset, tokenize, share, column)
    parts = []
    for name, member in zip(dataset.names, dataset.members, strict=True):
        try:
            parts.append(_lengths_of(member, tokenize, share, column))
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
    dataset: ShardDataset, tokenize: Callable[[list[str]], list[list[int]]], share: tuple[int, int], column: str
) -> np.ndarray:
    """The number of tokens of each caption of one dataset."""
    path = dataset.storage.path(MANIFEST)
    lengths = np.full(len(dataset), -1, np.int32)
    for number, (places, captions) in enumerate(_chunks(dataset, column)):
        if places.min(initial=0) < 0 or places.max(initial=0) >= len(dataset) or (lengths[places] >= 0).any():
            raise UserError(f"{path} does not give every sample one place; build the dataset again")
        lengths[places] = 0
        if number % share[1] == share[0]:
            tokens = tokenize(["" if caption is None else caption for caption in captions])
            pairs = zip(captions, tokens, strict=True)
            lengths[places] = [0 if caption is None else len(ids) for caption, ids in pairs]
    if (num_missing := int((lengths < 0).sum())) > 0:
        raise UserError(
            f"{path} lacks {num_missing} of the {len(dataset)} samples of the split {dataset.split}; build the dataset "
            "again"
        )
    return lengths


def _chunks(dataset: ShardDataset, column: str) -> Any:
    """Yield (dataset indices, captions) of the rows of the split."""
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
        columns = ["split", "shard", "position", column]
        if missing := [name for name in columns if name not in file.schema_arrow.names]:
            raise UserError(f"{path} has no column {missing[0]}, which micro_batch_tokens needs")
        for batch in file.iter_batches(_CHUNK, columns=columns):
            rows = batch.filter(pc.equal(batch["split"], dataset.split)).to_pydict()
            if unknown := [name for name in rows["shard"] if name not in starts]:
                raise UserError(f"{path} names the shard {unknown[0]}, which the dataset does not have")
            places = [starts[name] + place for name, place in zip(rows["shard"], rows["position"], strict=True)]
            yield np.array(places, np.int64), rows[column]
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, and micro_batch_tokens needs it; copy it, or set micro_batch_size instead"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}; copy it again, or set micro_batch_size instead") from error

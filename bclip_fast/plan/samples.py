"""The statistics of a dataset that a plan needs."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bclip_fast.data.order import Interleaving
from bclip_fast.data.shards.mixed import MixedDataset
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.texts import TextChoice
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.inputs import open_dataset

# PMC-15M's training split (arXiv 2303.00915, table 1).
_PMC_SAMPLES = 13_900_000
# Numbers of PubMedBERT tokens at 20 equally spaced quantiles of 558 captions of PMC articles, with [CLS] and [SEP].
_PMC_TOKENS = (8, 12, 15, 18, 21, 25, 29, 33, 39, 45, 54, 64, 77, 87, 106, 121, 145, 167, 254, 399)
# Measured on the same captions.
_BYTES_PER_TOKEN = 4.4
_PMC_IMAGE_BYTES = 80_000


@dataclass(frozen=True)
class Samples:
    """Statistics of a dataset.

    count: number of samples in an epoch.
    tokens: lengths of untruncated captions at equally spaced quantiles.
    image_bytes: mean size of a stored image.
    source: name of the dataset, for the output.
    """

    count: int
    tokens: Sequence[int]
    image_bytes: float
    source: str

    def lengths(self, context_length: int) -> list[int]:
        """Lengths of the captions, truncated to the context length."""
        return [min(tokens, context_length) for tokens in self.tokens]

    def pairs_within(self, budget: int, image_tokens: int, context_length: int, size: int) -> int:
        """Number of the `size` pairs of a rank that a micro-batch of at most `budget` tokens gets, rounded up."""
        mean = image_tokens + statistics.fmean(self.lengths(context_length))
        return math.ceil(size / math.ceil(size * mean / budget))

    def longest(self, context_length: int, size: int, batch_size: int, num_batches: int) -> list[int]:
        """Lengths of the `size` captions of a micro-batch, in the batch with most tokens among `num_batches` batches.

        The sampler spreads the tokens of a batch evenly over its micro-batches. So a micro-batch deviates from the mean
        as its batch does. The largest of n normal numbers lies sqrt(2 ln n) standard deviations above the mean.
        """
        lengths = self.lengths(context_length)
        excess = statistics.pstdev(lengths) * math.sqrt(2 * math.log(max(num_batches, 1)) / batch_size)
        total = min(size * context_length, round(size * (statistics.fmean(lengths) + excess)))
        return [total // size + (i < total % size) for i in range(size)]


PMC_15M = Samples(
    _PMC_SAMPLES, _PMC_TOKENS, _PMC_IMAGE_BYTES, "PMC-15M's training split, captions as of 558 in PMC articles"
)


def samples_of(config: TrainConfig) -> Samples:
    """The statistics of the run's shards, from their index files. Without shards, those of PMC-15M.

    Datasets of a mixture count by their parts of an epoch.

    Raises:
        UserError: a dataset cannot be opened.
    """
    if not config.data.shards:
        return PMC_15M
    data, texts = open_dataset(config.data), TextChoice(config.data.captions, config.seed)
    if not isinstance(data, MixedDataset):
        return Samples(len(data), _quantiles(_tokens(data, texts), 20), data.num_bytes / len(data), data.root)
    shares = [member.share for member in data.mixture.members]
    means = [member.num_bytes / len(member) for member in data.members]
    image_bytes = sum(map(operator.mul, shares, means)) / sum(shares)
    # 1000 captions in all, as many of each dataset as its share.
    counts = Interleaving(shares).counts(1000)
    tokens = sorted(
        length
        for member, count in zip(data.members, counts, strict=True)
        if count
        for length in _quantiles(_tokens(member, texts), count)
    )
    return Samples(data.mixture.epoch_samples, _quantiles(tokens, 20), image_bytes, ", ".join(data.names))


def _tokens(data: ShardDataset, texts: TextChoice) -> list[int]:
    """The sorted lengths of about 1000 captions, or of the texts that epoch 0 draws, in tokens."""
    # Take neighbouring samples at 20 positions, because each position reads an index file.
    positions = [round(i * (len(data) - 1) / 19) for i in range(20)]
    indices = sorted({min(position + i, len(data) - 1) for position in positions for i in range(50)})
    return sorted(2 + round(texts.num_bytes(0, i, data) / _BYTES_PER_TOKEN) for i in indices)


def _quantiles(tokens: Sequence[int], count: int) -> list[int]:
    """Values at `count` equally spaced quantiles of sorted numbers."""
    return [tokens[int((i + 0.5) / count * len(tokens))] for i in range(count)]

"""The ranking loss of sentence-transformers in chunks of queries, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bclip_fast.loss.collectives import Ranks
from bclip_fast.loss.sums import gather_rows
from bclip_fast.ops.contrastive.checks import check_features, default_chunk_size
from bclip_fast.ops.derivatives import transformed
from bclip_fast.ops.dtypes import widened

DIRECTIONS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")

# The scores that hardness increases: (other queries' documents, the query's own hard negatives).
HARDNESS = {"in_batch_negatives": (True, False), "hard_negatives": (False, True), "all_negatives": (True, True)}

Hardness = tuple[bool, bool, float]


def cosine(features: Tensor) -> Tensor:
    """The rows (B, D) with unit norm: their dot products are cosines."""
    return F.normalize(features, dim=-1)


@dataclass(frozen=True)
class Columns:
    """The embeddings of all queries and documents, and the queries that belong to this rank."""

    queries: Tensor  # (B, D)
    documents: list[Tensor]  # each (B, D). The first are the queries' own, the others their hard negatives
    local: range  # rows of this rank's queries

    @classmethod
    def checked(cls, queries: Tensor, *documents: Tensor) -> Columns:
        """The columns of this rank. Raises ValueError if their shapes or dtypes differ."""
        for part in documents:
            check_features(queries, part)
            if len(part) != len(queries):
                raise ValueError(f"queries and documents must have as many rows, got {len(queries)} and {len(part)}")
        return cls(queries, list(documents), range(len(queries)))

    def gathered(self) -> Columns:
        """The columns of all ranks. Gradients reach every rank's embeddings."""
        ranks = Ranks("MultipleNegativesRankingLoss", None, dist.get_rank(), dist.get_world_size())
        sizes = ranks.batch_sizes(self.queries, self.queries)[0]
        start = sum(sizes[: ranks.rank])
        queries, *documents = (
            gather_rows(part, ranks, sizes, "embeddings") for part in (self.queries, *self.documents)
        )
        return Columns(queries, documents, range(start, start + len(self.queries)))

    def map(self, function: Callable[[Tensor], Tensor]) -> Columns:
        """The columns with a function applied to each tensor."""
        return replace(self, queries=function(self.queries), documents=[function(part) for part in self.documents])


def ranking_loss(
    columns: Columns,
    similarity: Callable[[Tensor, Tensor], Tensor],
    scale: Tensor | float,
    directions: Sequence[str],
    joint: bool,
    hardness: Hardness | None,
    chunk_size: int | None,
) -> Tensor:
    """Mean over this rank's queries of log(sum of exponentials) - the positive score, in the accumulation dtype.

    With `joint`, one sum covers all directions. Otherwise each has its own, and the loss is their mean.
    """
    columns = columns.map(widened)
    candidates = torch.cat(columns.documents)
    local = columns.local
    chunk_size = chunk_size or default_chunk_size(len(local), len(candidates), candidates.device)
    arguments = columns.queries, candidates, similarity, scale, tuple(directions), joint, hardness
    # Checkpointing makes autograd keep the embeddings instead of their scores. torch.func doesn't support it.
    in_reverse = not transformed((columns.queries, candidates, scale))
    total = candidates.new_zeros(())
    for start in range(local.start, local.stop, chunk_size):
        chunk = slice(start, min(start + chunk_size, local.stop))
        if in_reverse:
            total = total + checkpoint(_chunk_loss, chunk, *arguments, use_reentrant=False)
        else:
            total = total + _chunk_loss(chunk, *arguments)
    return total / len(local)


def _chunk_loss(
    chunk: slice,
    queries: Tensor,
    candidates: Tensor,
    similarity: Callable[[Tensor, Tensor], Tensor],
    scale: Tensor | float,
    directions: tuple[str, ...],
    joint: bool,
    hardness: Hardness | None,
) -> Tensor:
    """The sum of the losses of a chunk of queries."""
    scores = dict(_scores(chunk, queries, candidates, similarity, scale, directions, hardness))
    rows = torch.arange(chunk.start, chunk.stop, device=queries.device)
    if joint:
        positive = scores["query_to_doc"].gather(1, rows[:, None])[:, 0]
        return (torch.cat(list(scores.values()), dim=1).logsumexp(1) - positive).sum()
    losses = [F.cross_entropy(direction, rows, reduction="sum") for direction in scores.values()]
    return torch.stack(losses).mean()


def _scores(
    chunk: slice,
    queries: Tensor,
    candidates: Tensor,
    similarity: Callable[[Tensor, Tensor], Tensor],
    scale: Tensor | float,
    directions: tuple[str, ...],
    hardness: Hardness | None,
) -> Iterator[tuple[str, Tensor]]:
    """The scores (b, n) of the chunk's queries or documents, by direction. The positives are on the diagonal."""
    rows = torch.arange(chunk.start, chunk.stop, device=queries.device)
    owner = torch.arange(len(candidates), device=queries.device) % len(queries)
    same = owner == rows[:, None]
    for direction in directions:
        if direction == "query_to_doc":
            similarities = similarity(queries[chunk], candidates)
            scores = scale * similarities
            if hardness is not None:
                in_batch, hard, strength = hardness
                is_negative = torch.arange(len(candidates), device=queries.device) >= len(queries)
                weighted = (~same & in_batch) | (same & hard & is_negative)
                scores = scores + strength * weighted * similarities.detach()
        elif direction == "doc_to_query":
            scores = scale * similarity(queries, candidates[chunk]).T
        elif direction == "query_to_query":
            scores = (scale * similarity(queries[chunk], queries)).masked_fill(same[:, : len(queries)], -torch.inf)
        else:
            scores = (scale * similarity(candidates, candidates[chunk]).T).masked_fill(same, -torch.inf)
        yield direction, scores

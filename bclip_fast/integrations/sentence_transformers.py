"""MultipleNegativesRankingLoss of sentence-transformers without its matrix of scores.

    directions = ("query_to_doc", "doc_to_query")
    loss = MultipleNegativesRankingLoss(model, directions=directions, partition_mode="per_direction")

stands where sentence-transformers' class stood; `multiple_negatives_ranking_loss` takes embeddings. The scores are
cosines, and each direction's softmax stands alone (partition_mode "per_direction"). Needs no sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.contrastive import accumulation_dtype, check_features, clip_loss, default_chunk_size

DIRECTIONS = ("query_to_doc", "doc_to_query")


def multiple_negatives_ranking_loss(
    queries: Tensor,
    documents: Tensor | Sequence[Tensor],
    scale: Tensor | float = 20.0,
    *,
    directions: Sequence[str] = ("query_to_doc",),
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The mean over `directions` of the cross-entropy of scale * cosine(query, document); one number, float32.

    query_to_doc: each query finds its document among the documents, hard negatives included. doc_to_query: each
    document finds its query among the queries; hard negatives have none.

    Args:
        queries: (B, D) of any norm.
        documents: (B, D), or several such: row i of the first belongs to query i, the others are hard negatives.
        scale: factor of the cosines.
        directions: query_to_doc, doc_to_query or both.
        chunk_size: rows of the score matrix held at a time; as in `ops.clip_loss` unless given.
        backend: of `ops.clip_loss`, which computes both directions without hard negatives from one score matrix. All
            else is chunks of plain PyTorch, recomputed in the backward, and takes "auto" or "reference" alone.

    Raises:
        ValueError: shapes, dtypes or directions that don't fit; the message names them.
    """
    if not directions or len(set(directions)) != len(directions) or not set(directions) <= set(DIRECTIONS):
        raise ValueError(f"directions must be some of {', '.join(DIRECTIONS)}, each once, got {tuple(directions)}")
    positives, *negatives = [documents] if isinstance(documents, Tensor) else documents
    for part in (positives, *negatives):
        check_features(queries, part)
        if len(part) != len(queries):
            raise ValueError(f"queries and documents must have as many rows, got {len(queries)} and {len(part)}")
    queries, positives, *negatives = (F.normalize(part, dim=-1) for part in (queries, positives, *negatives))
    if len(directions) == 2 and not negatives:
        return clip_loss(queries, positives, scale, chunk_size=chunk_size, backend=backend)
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend={backend!r}: one direction alone, or hard negatives, run in plain PyTorch")
    losses = []
    if "query_to_doc" in directions:
        losses.append(_one_direction(queries, torch.cat([positives, *negatives]), scale, chunk_size))
    if "doc_to_query" in directions:
        losses.append(_one_direction(positives, queries, scale, chunk_size))
    return torch.stack(losses).mean()


class MultipleNegativesRankingLoss(nn.Module):
    """sentence-transformers' loss module: a model, and columns of features as its collator gives them.

    Args:
        model: called with each column's features; returns a dict that holds "sentence_embedding" (B, D).
        scale, directions: as in `multiple_negatives_ranking_loss`.
        partition_mode: "per_direction", or sentence-transformers' "joint" where the one direction query_to_doc makes
            the two the same; the softmax over several directions at once is not implemented.
        chunk_size, backend: as in `multiple_negatives_ranking_loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        *,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        chunk_size: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if partition_mode not in ("joint", "per_direction"):
            raise ValueError(f"partition_mode must be joint or per_direction, got {partition_mode!r}")
        if partition_mode == "joint" and len(directions) > 1:
            raise ValueError(
                'several directions need partition_mode="per_direction": one softmax over all isn\'t built'
            )
        self.model = model
        self.scale = scale
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.chunk_size = chunk_size
        self.backend = backend

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of columns (queries, documents, hard negatives...); `labels` is taken and ignored, as there."""
        queries, *documents = [self.model(features)["sentence_embedding"] for features in sentence_features]
        if not documents:
            raise ValueError("the dataset needs at least two columns: queries and their documents")
        return multiple_negatives_ranking_loss(
            queries,
            documents,
            self.scale,
            directions=self.directions,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )


def _one_direction(rows: Tensor, columns: Tensor, scale: Tensor | float, chunk_size: int | None) -> Tensor:
    """Mean cross-entropy of scale * rows @ columns.T at its diagonal, (b, D) and (B, D), a chunk of rows at a time."""
    dtype = accumulation_dtype(rows)
    rows, columns = rows.to(dtype), columns.to(dtype)
    labels = torch.arange(len(rows), device=rows.device)
    chunk_size = chunk_size or default_chunk_size(len(rows), len(columns), rows.device)
    total = rows.new_zeros(())
    for part, part_labels in zip(rows.split(chunk_size), labels.split(chunk_size), strict=True):
        # Checkpointed, so that autograd keeps the rows and not their scores.
        total = total + checkpoint(_chunk_loss, part, columns, scale, part_labels, use_reentrant=False)
    return total / len(rows)


def _chunk_loss(rows: Tensor, columns: Tensor, scale: Tensor | float, labels: Tensor) -> Tensor:
    return F.cross_entropy(scale * rows @ columns.T, labels, reduction="sum")

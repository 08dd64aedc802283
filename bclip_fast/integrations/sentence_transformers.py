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

from ..ops import linear
from ..ops.contrastive import check_features, clip_loss, default_chunk_size
from ..ops.dtypes import accumulation_dtype

DIRECTIONS = ("query_to_doc", "doc_to_query")

# Whether hardness weighs (other queries' documents, the query's own hard negatives).
_HARDNESS = {"in_batch_negatives": (True, False), "hard_negatives": (False, True), "all_negatives": (True, True)}


def multiple_negatives_ranking_loss(
    queries: Tensor,
    documents: Tensor | Sequence[Tensor],
    scale: Tensor | float = 20.0,
    *,
    directions: Sequence[str] = ("query_to_doc",),
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
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
        hardness_mode: which documents' scores gain hardness_strength times their cosine, as a constant, where a query
            looks for its own: "in_batch_negatives" (other queries' documents), "hard_negatives" (its own hard
            negatives), "all_negatives" or None.
        hardness_strength: not negative.
        chunk_size: rows of the score matrix held at a time; as in `ops.clip_loss` unless given.
        backend: of `ops.clip_loss`, which computes both directions without hard negatives from one score matrix. All
            else is chunks of plain PyTorch, recomputed in the backward, and takes "auto" or "reference" alone.

    Raises:
        ValueError: shapes, dtypes or directions that don't fit; the message names them.
    """
    if not directions or len(set(directions)) != len(directions) or not set(directions) <= set(DIRECTIONS):
        raise ValueError(f"directions must be some of {', '.join(DIRECTIONS)}, each once, got {tuple(directions)}")
    if hardness_mode not in (None, *_HARDNESS) or hardness_strength < 0:
        raise ValueError(
            f"hardness_mode must be one of {', '.join(_HARDNESS)} or None and hardness_strength not negative, "
            f"got {hardness_mode!r} and {hardness_strength}"
        )
    hardness = (*_HARDNESS[hardness_mode], hardness_strength) if hardness_mode and hardness_strength else None
    positives, *negatives = [documents] if isinstance(documents, Tensor) else documents
    for part in (positives, *negatives):
        check_features(queries, part)
        if len(part) != len(queries):
            raise ValueError(f"queries and documents must have as many rows, got {len(queries)} and {len(part)}")
    queries, positives, *negatives = (F.normalize(part, dim=-1) for part in (queries, positives, *negatives))
    if len(directions) == 2 and not negatives and hardness is None:
        return clip_loss(queries, positives, scale, chunk_size=chunk_size, backend=backend)
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend={backend!r}: one direction alone, hard negatives and hardness run in plain PyTorch")
    losses = []
    if "query_to_doc" in directions:
        losses.append(_one_direction(queries, torch.cat([positives, *negatives]), scale, chunk_size, hardness))
    if "doc_to_query" in directions:
        losses.append(_one_direction(positives, queries, scale, chunk_size))
    return torch.stack(losses).mean()


class MultipleNegativesRankingLoss(nn.Module):
    """sentence-transformers' loss module: a model, and columns of features as its collator gives them.

    Args:
        model: called with each column's features; returns a dict that holds "sentence_embedding" (B, D).
        scale, directions, hardness_mode, hardness_strength: as in `multiple_negatives_ranking_loss`.
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
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
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
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength
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
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )


def _one_direction(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor | float,
    chunk_size: int | None,
    hardness: tuple[bool, bool, float] | None = None,
) -> Tensor:
    """Mean cross-entropy of scale * rows @ columns.T at its diagonal, (b, D) and (B, D), a chunk of rows at a time."""
    dtype = accumulation_dtype(rows)
    rows, columns = rows.to(dtype), columns.to(dtype)
    labels = torch.arange(len(rows), device=rows.device)
    chunk_size = chunk_size or default_chunk_size(len(rows), len(columns), rows.device)
    total = rows.new_zeros(())
    for part, part_labels in zip(rows.split(chunk_size), labels.split(chunk_size), strict=True):
        # Checkpointed, so that autograd keeps the rows and not their scores.
        arguments = part, columns, scale, part_labels, len(rows), hardness
        total = total + checkpoint(_chunk_loss, *arguments, use_reentrant=False)
    return total / len(rows)


def _chunk_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor | float,
    labels: Tensor,
    num_queries: int,
    hardness: tuple[bool, bool, float] | None,
) -> Tensor:
    scores = linear(scale * rows, columns)
    if hardness is not None:
        of_others, of_own, strength = hardness
        documents = torch.arange(len(columns), device=rows.device)
        own = documents % num_queries == labels[:, None]
        weighed = (~own & of_others) | (own & of_own & (documents >= num_queries))
        scores = scores + strength * weighed * linear(rows, columns).detach()
    return F.cross_entropy(scores, labels, reduction="sum")

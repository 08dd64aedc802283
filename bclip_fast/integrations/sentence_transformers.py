"""sentence-transformers' MultipleNegativesRankingLoss without its matrix of scores.

    directions = ("query_to_doc", "doc_to_query")
    loss = MultipleNegativesRankingLoss(model, directions=directions, partition_mode="per_direction")

replaces sentence-transformers' class; `multiple_negatives_ranking_loss` is the same loss on embeddings. The scores are
cosines, and each direction has its own softmax (partition_mode "per_direction"). This module works without
sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bclip_fast.ops import linear
from bclip_fast.ops.contrastive import clip_loss
from bclip_fast.ops.contrastive.checks import check_features, default_chunk_size
from bclip_fast.ops.dtypes import accumulation_dtype

DIRECTIONS = ("query_to_doc", "doc_to_query")

# The scores that hardness increases: (other queries' documents, the query's own hard negatives).
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
    """Mean over `directions` of the cross-entropy of scale * cosine(query, document), a float32 scalar.

    query_to_doc: each query finds its document among all documents, hard negatives included. doc_to_query: each
    document finds its query among the queries. Hard negatives don't have a query.

    Args:
        queries: (B, D) of any norm.
        documents: (B, D), or several such tensors. Row i of the first belongs to query i. The others are hard
            negatives.
        scale: factor of the cosines.
        directions: query_to_doc, doc_to_query or both.
        hardness_mode: the documents whose scores gain hardness_strength times their cosine, as a constant, in the
            direction query_to_doc: "in_batch_negatives" (other queries' documents), "hard_negatives" (the query's own
            hard negatives), "all_negatives" or None.
        hardness_strength: a number of at least 0.
        chunk_size: number of rows of the score matrix held at a time. Default: that of `ops.clip_loss`.
        backend: a backend of `ops.clip_loss`, which computes both directions from one score matrix if there are
            neither hard negatives nor hardness. Everything else runs in chunks of plain PyTorch, recomputed in the
            backward pass, and takes only "auto" or "reference".

    Raises:
        ValueError: shapes, dtypes or directions that don't fit. The message names them.
    """
    if not directions or len(set(directions)) != len(directions) or not set(directions) <= set(DIRECTIONS):
        raise ValueError(f"directions={tuple(directions)} must be some of {', '.join(DIRECTIONS)}, each once")
    if hardness_mode not in (None, *_HARDNESS) or hardness_strength < 0:
        raise ValueError(
            f"hardness_mode={hardness_mode!r} must be one of {', '.join(_HARDNESS)} or None, and "
            f"hardness_strength={hardness_strength} must be at least 0"
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
        raise ValueError(f"backend={backend!r} must be auto or reference for one direction, hard negatives or hardness")
    losses = []
    if "query_to_doc" in directions:
        losses.append(_one_direction(queries, torch.cat([positives, *negatives]), scale, chunk_size, hardness))
    if "doc_to_query" in directions:
        losses.append(_one_direction(positives, queries, scale, chunk_size))
    return torch.stack(losses).mean()


class MultipleNegativesRankingLoss(nn.Module):
    """sentence-transformers' loss module: a model applied to the columns of features from its collator.

    Args:
        model: called with each column's features. It returns a dict that holds "sentence_embedding" (B, D).
        scale, directions, hardness_mode, hardness_strength: as in `multiple_negatives_ranking_loss`.
        partition_mode: "per_direction", or sentence-transformers' "joint", which is the same for one direction. One
            softmax over several directions isn't implemented.
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
            raise ValueError(f"partition_mode={partition_mode!r} must be joint or per_direction")
        if partition_mode == "joint" and len(directions) > 1:
            raise ValueError(
                'several directions need partition_mode="per_direction": one softmax over all isn\'t implemented'
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
        """Return the loss of columns (queries, documents, hard negatives...).

        Ignore `labels`, as sentence-transformers does.
        """
        queries, *documents = [self.model(features)["sentence_embedding"] for features in sentence_features]
        if not documents:
            raise ValueError("the dataset must have at least two columns: queries and their documents")
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
    """Mean cross-entropy of scale * rows @ columns.T, (b, D) and (B, D), in chunks of rows. Targets: the diagonal."""
    dtype = accumulation_dtype(rows)
    rows, columns = rows.to(dtype), columns.to(dtype)
    labels = torch.arange(len(rows), device=rows.device)
    chunk_size = chunk_size or default_chunk_size(len(rows), len(columns), rows.device)
    total = rows.new_zeros(())
    for part, part_labels in zip(rows.split(chunk_size), labels.split(chunk_size), strict=True):
        # Checkpointing makes autograd keep the rows instead of their scores.
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
        in_batch, hard, strength = hardness
        documents = torch.arange(len(columns), device=rows.device)
        same_query = documents % num_queries == labels[:, None]
        weighted = (~same_query & in_batch) | (same_query & hard & (documents >= num_queries))
        scores = scores + strength * weighted * linear(rows, columns).detach()
    return F.cross_entropy(scores, labels, reduction="sum")

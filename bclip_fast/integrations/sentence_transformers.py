"""sentence-transformers' MultipleNegativesRankingLoss without its matrix of scores.

    directions = ("query_to_doc", "doc_to_query")
    loss = MultipleNegativesRankingLoss(model, directions=directions, partition_mode="per_direction")

replaces sentence-transformers' class (release 6), with its arguments, attributes and checks;
`multiple_negatives_ranking_loss` is the same loss on embeddings. This module works without sentence-transformers.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from bclip_fast.ops import linear
from bclip_fast.ops.contrastive import clip_loss

from .ranking import DIRECTIONS, HARDNESS, Columns, cosine, ranking_loss

__all__ = ["DIRECTIONS", "MultipleNegativesRankingLoss", "cos_sim", "dot_score", "multiple_negatives_ranking_loss"]

log = logging.getLogger(__name__)

Similarity = Callable[[Tensor, Tensor], Tensor]


def cos_sim(a: Tensor, b: Tensor) -> Tensor:
    """The cosines (n, m) of rows of a (n, D) and b (m, D)."""
    return linear(cosine(a), cosine(b))


def dot_score(a: Tensor, b: Tensor) -> Tensor:
    """The dot products (n, m) of rows of a (n, D) and b (m, D)."""
    return linear(a, b)


def multiple_negatives_ranking_loss(
    queries: Tensor,
    documents: Tensor | Sequence[Tensor],
    scale: Tensor | float = 20.0,
    *,
    similarity_fct: Similarity = cos_sim,
    gather_across_devices: bool = False,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "per_direction",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over queries of the cross-entropy of scale * similarity, a scalar in the accumulation dtype.

    query_to_doc: each query finds its document among all documents, hard negatives included. doc_to_query: each
    document finds its query among the queries. Hard negatives don't have a query. query_to_query and doc_to_doc add
    the scores of other queries, and of other queries' documents, to the softmax.

    Args:
        queries: (B, D) of any norm.
        documents: (B, D), or several such tensors. Row i of the first belongs to query i. The others are hard
            negatives.
        scale: factor of the similarities.
        similarity_fct: `cos_sim`, `dot_score`, those of sentence-transformers, or any function of (n, D) and (m, D)
            that returns (n, m).
        gather_across_devices: whether the rows of all ranks are candidates. Each rank returns the mean over its own
            queries.
        directions: query_to_doc, doc_to_query, query_to_query and doc_to_doc, each at most once.
        partition_mode: "joint" for one softmax over all directions, or "per_direction" for their mean.
        hardness_mode: the documents whose scores gain hardness_strength times their similarity, as a constant, in the
            direction query_to_doc: "in_batch_negatives" (other queries' documents), "hard_negatives" (the query's own
            hard negatives), "all_negatives" or None.
        hardness_strength: a number of at least 0.
        chunk_size: number of queries whose scores are held at a time. Default: that of `ops.clip_loss`.
        backend: a backend of `ops.clip_loss`, which computes query_to_doc and doc_to_query by cosines or dot products
            from one score matrix if there are neither hard negatives nor hardness. Everything else runs in chunks of
            plain PyTorch, recomputed in the backward pass, and takes only "auto" or "reference".

    Raises:
        ValueError: shapes, dtypes or options that don't fit. The message names them.
    """
    _check_directions(directions, partition_mode)
    if hardness_mode not in (None, *HARDNESS) or hardness_strength < 0:
        raise ValueError(
            f"hardness_mode={hardness_mode!r} must be one of {', '.join(HARDNESS)} or None, and "
            f"hardness_strength={hardness_strength} must be at least 0"
        )
    hardness = (*HARDNESS[hardness_mode], hardness_strength) if hardness_mode and hardness_strength else None
    positives, *negatives = [documents] if isinstance(documents, Tensor) else documents
    columns = Columns.checked(queries, positives, *negatives)
    kind = _kind_of(similarity_fct)
    gather = gather_across_devices and dist.is_initialized() and dist.get_world_size() > 1
    both_ways = set(directions) == {"query_to_doc", "doc_to_query"} and partition_mode == "per_direction"
    if both_ways and kind and not (negatives or hardness or gather):
        if kind == "cos_sim":
            queries, positives = cosine(queries), cosine(positives)
        return clip_loss(queries, positives, scale, chunk_size=chunk_size, backend=backend)
    if backend not in ("auto", "reference"):
        raise ValueError(
            f"backend={backend!r} must be auto or reference: only query_to_doc and doc_to_query per direction, by "
            "cos_sim or dot_score, without hard negatives, hardness and gather_across_devices run on other backends"
        )
    if gather:
        columns = columns.gathered()
    if kind == "cos_sim":
        columns = columns.map(cosine)
    products = functools.partial(linear, backend=backend)
    similarity = products if kind else similarity_fct
    return ranking_loss(columns, similarity, scale, directions, partition_mode == "joint", hardness, chunk_size)


def _check_directions(directions: Sequence[str], partition_mode: str) -> None:
    if not directions or len(set(directions)) != len(directions) or not set(directions) <= set(DIRECTIONS):
        raise ValueError(f"directions={tuple(directions)} must be some of {', '.join(DIRECTIONS)}, each once")
    if partition_mode not in ("joint", "per_direction"):
        raise ValueError(f"partition_mode={partition_mode!r} must be joint or per_direction")
    if partition_mode == "per_direction" and set(directions) & {"query_to_query", "doc_to_doc"}:
        raise ValueError(
            'partition_mode="per_direction" needs the positive pair in each direction, and query_to_query and '
            'doc_to_doc lack it: pass partition_mode="joint"'
        )
    if partition_mode == "joint" and "query_to_doc" not in directions:
        raise ValueError('partition_mode="joint" needs the direction query_to_doc, which has the positive pairs')


def _kind_of(similarity: Similarity) -> str:
    """The name of a similarity that our kernels have, or ""."""
    name, module = getattr(similarity, "__name__", ""), getattr(similarity, "__module__", None) or ""
    ours = module == __name__ or module.partition(".")[0] == "sentence_transformers"
    return name if ours and name in ("cos_sim", "dot_score") else ""


def _name_of(similarity: Similarity) -> str:
    """The similarity's name in a configuration, as in sentence-transformers."""
    misc = sys.modules.get("sentence_transformers.util.misc")
    if misc is not None and hasattr(misc, "similarity_fct_name"):
        return str(misc.similarity_fct_name(similarity))
    return str(getattr(similarity, "__name__", type(similarity).__name__))


class MultipleNegativesRankingLoss(nn.Module):
    """sentence-transformers' loss module: a model applied to the columns of features from its collator.

    Args:
        model: called with each column's features. It returns a dict that holds "sentence_embedding" (B, D).
        scale: as in `multiple_negatives_ranking_loss`, above 0. The other arguments have sentence-transformers' order
            and defaults. directions must include query_to_doc.
        chunk_size, backend: as in `multiple_negatives_ranking_loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Similarity = cos_sim,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        chunk_size: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"Scale must be a positive value. Got scale={scale}")
        if not callable(similarity_fct):
            raise ValueError(f"similarity_fct={similarity_fct!r} must be a function of two tensors, such as cos_sim")
        _check_directions(directions, partition_mode)
        if "query_to_doc" not in directions:
            raise ValueError(f"directions={tuple(directions)} must include query_to_doc, which has the positive pairs")
        if hardness_mode not in (None, *HARDNESS):
            raise ValueError(f"hardness_mode={hardness_mode!r} must be one of {', '.join(HARDNESS)} or None")
        if hardness_strength < 0:
            raise ValueError(f"hardness_strength={hardness_strength} must be at least 0")
        if hardness_mode and not hardness_strength:
            log.warning("hardness_mode=%r has no effect, because hardness_strength is 0", hardness_mode)
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
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
        # sentence-transformers embeds columns of one kind in one pass.
        merged = sys.modules.get("sentence_transformers.base.losses.merged_forward")
        if merged is not None:
            embeddings = merged.embed_columns(self.model, sentence_features)
        else:
            embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """Return the loss of the columns' embeddings, each (B, D)."""
        if len(embeddings) < 2:
            raise ValueError(
                f"Expected at least 2 embeddings, got {len(embeddings)}: the dataset must have at least two columns, "
                "queries and their documents"
            )
        queries, *documents = embeddings
        return multiple_negatives_ranking_loss(
            queries, documents, self.scale, **self._options(), chunk_size=self.chunk_size, backend=self.backend
        )

    def _options(self) -> dict[str, Any]:
        names = "similarity_fct", "gather_across_devices", "directions", "partition_mode", "hardness_mode"
        return {name: getattr(self, name) for name in (*names, "hardness_strength")}

    def get_config_dict(self) -> dict[str, Any]:
        """The options as sentence-transformers writes them into a model card."""
        return {"scale": self.scale, **self._options(), "similarity_fct": _name_of(self.similarity_fct)}

    @property
    def temperature(self) -> float:
        """1 / scale"""
        return 1.0 / self.scale

    @property
    def citation(self) -> str:
        """The paper of these options, in BibTeX, for a model card."""
        if self.partition_mode == "joint" and set(self.directions) == set(DIRECTIONS):
            return _bibtex(
                "li2023generaltextembeddingsmultistage",
                "Towards General Text Embeddings with Multi-stage Contrastive Learning",
                "Zehan Li and Xin Zhang and Yanzhao Zhang and Dingkun Long and Pengjun Xie and Meishan Zhang",
                2023, "2308.03281", "cs.CL",
            )  # fmt: skip
        if self.partition_mode == "per_direction" and len(self.directions) == 2:
            return _bibtex(
                "günther2024jinaembeddings28192token",
                "Jina Embeddings 2: 8192-Token General-Purpose Text Embeddings for Long Documents",
                "Michael Günther and others", 2024, "2310.19923", "cs.CL",
            )  # fmt: skip
        return _bibtex(
            "oord2019representationlearningcontrastivepredictive",
            "Representation Learning with Contrastive Predictive Coding",
            "Aaron van den Oord and Yazhe Li and Oriol Vinyals", 2019, "1807.03748", "cs.LG",
        )  # fmt: skip


def _bibtex(key: str, title: str, author: str, year: int, arxiv: str, subject: str) -> str:
    fields = {
        "title": title, "author": author, "year": year, "eprint": arxiv, "archivePrefix": "arXiv",
        "primaryClass": subject, "url": f"https://arxiv.org/abs/{arxiv}",
    }  # fmt: skip
    lines = "".join(f"    {name}={{{value}}},\n" for name, value in fields.items())
    return f"\n@misc{{{key},\n{lines}}}\n"

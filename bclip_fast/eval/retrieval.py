"""Cross-modal retrieval: exact ranks of the right candidate, recall at k, median rank, each with its chance level.

Image i and caption i are a pair. A query's rank is decided by its best-scoring correct candidate. Ties are counted as
what a random order among equal scores gives on average, so a model that maps everything to one point scores exactly
chance, neither 0 nor 100 %. Similarities that differ by less than `TIE_TOLERANCE` are equal: float32 cannot tell
them apart, and the same two vectors may give either of them at different places in a matrix product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

TIE_TOLERANCE = 1e-6
RECALL_AT = (1, 5, 10)

Duplicates = Literal["strict", "correct"]


@dataclass(frozen=True)
class Ranks:
    """For each of N queries, int64 (N,) on the CPU: what stands before, and level with, its best correct candidate."""

    num_better: Tensor
    """Wrong candidates that score higher than the best correct one."""
    num_tied: Tensor
    """Candidates level with the best correct one, itself included."""
    num_tied_correct: Tensor
    """The correct ones among those."""
    num_correct: Tensor
    """All correct candidates."""
    num_candidates: int

    def recall(self, k: int) -> float:
        """Expected share of queries with a correct candidate among the first k, ties in random order."""
        return float(_hit_probability(k - self.num_better, self.num_tied, self.num_tied_correct).mean())

    def expected(self) -> Tensor:
        """(N,) float64: expected 1-based rank of the first correct candidate."""
        return self.num_better + (self.num_tied + 1).double() / (self.num_tied_correct + 1)

    def chance_recall(self, k: int) -> float:
        """`recall(k)` of a random order of all candidates."""
        total = torch.full_like(self.num_correct, self.num_candidates)
        return float(_hit_probability(torch.full_like(total, k), total, self.num_correct).mean())

    def chance_median_rank(self) -> float:
        """Median over queries of the rank a random order gives on average."""
        return _median((self.num_candidates + 1) / (self.num_correct + 1).double())


def _hit_probability(num_drawn: Tensor, total: Tensor, num_correct: Tensor) -> Tensor:
    """P(at least one correct item among `num_drawn` of `total`, drawn without replacement): hypergeometric, float64."""
    drawn = torch.minimum(num_drawn.clamp(min=0), total)
    wrong, total = (total - num_correct).double(), total.double()
    miss = torch.ones_like(total)
    for i in range(int(drawn.max())):
        miss *= torch.where(i < drawn, (wrong - i).clamp(min=0) / (total - i).clamp(min=1), 1.0)
    return 1 - miss


def _median(values: Tensor) -> float:
    """The mean of the two middle values where there are two; torch.median takes the lower."""
    ordered = values.double().sort().values
    return float((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)


def caption_groups(captions: Sequence[str]) -> Tensor:
    """(N,) int64: equal numbers for captions that are the same text, white space aside."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(" ".join(caption.split()), len(numbers)) for caption in captions])


def check_embeddings(embeddings: Tensor, name: str) -> None:
    """Raises UserError unless `embeddings` is a finite, L2-normalised, non-empty (N, D) matrix."""
    if embeddings.ndim != 2 or not embeddings.shape[0]:
        raise UserError(f"{name} must be a non-empty matrix (N, D), not of shape {tuple(embeddings.shape)}")
    norms = embeddings.float().norm(dim=1)
    bad = (~torch.isfinite(norms)).nonzero()
    if len(bad):
        raise UserError(f"{name} hold NaN or infinity in {len(bad)} of {len(norms)} rows, first in row {int(bad[0])}")
    worst = int((norms - 1).abs().argmax())
    if abs(float(norms[worst]) - 1) > 1e-3:
        raise UserError(f"{name} must be L2-normalised, but row {worst} has norm {float(norms[worst]):.4g}")


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    # TF32 would err by 1e-3 and reorder candidates.
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


def _tiles(
    queries: Tensor, candidates: Tensor, groups: Tensor | None, rows: slice, width: int
) -> Iterator[tuple[Tensor, Any]]:
    """Similarities of the queries in `rows` with `width` candidates at a time, and which of those are correct."""
    block = queries[rows].float()
    for left in range(0, len(candidates), width):
        columns = slice(left, left + width)
        same = None if groups is None else groups[rows, None] == groups[columns]
        yield block @ candidates[columns].float().T, same


def _count(mask: Tensor) -> Tensor:
    """True values of each row, int64 on the CPU."""
    if mask.device.type == "cpu":
        # Eight times as fast as torch's sum over bool, and half the time of a search would go there.
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return mask.sum(1).cpu()


@torch.inference_mode()
def rank(
    queries: Tensor,
    candidates: Tensor,
    groups: Tensor | None = None,
    *,
    query_chunk: int = 1024,
    candidate_chunk: int = 8192,
    tie_tolerance: float = TIE_TOLERANCE,
) -> Ranks:
    """Exact ranks by cosine similarity; memory is one `query_chunk` x `candidate_chunk` tile, never N x N.

    Args:
        queries, candidates: (N, D) float32, unit norm; candidate i belongs to query i.
        groups: (N,) int64; candidates of the query's group are correct too. None: candidate i alone.

    Raises:
        UserError: shapes that differ, NaN or infinity, rows without unit norm.
    """
    check_embeddings(queries, "query embeddings")
    check_embeddings(candidates, "candidate embeddings")
    if queries.shape != candidates.shape:
        raise UserError(
            f"embeddings must pair up: queries {tuple(queries.shape)}, candidates {tuple(candidates.shape)}"
        )
    num = len(queries)
    if groups is not None and groups.unique().numel() == num:
        groups = None
    groups = groups if groups is None else groups.to(queries.device)
    counts: list[Tensor] = []
    with _full_float32():
        for start in range(0, num, query_chunk):
            rows = slice(start, min(start + query_chunk, num))
            tiles = _tiles(queries, candidates, groups, rows, candidate_chunk)
            if groups is None:
                best = (queries[rows].float() * candidates[rows].float()).sum(1)
            else:
                best = torch.full((rows.stop - start,), -torch.inf, device=queries.device)
                for scores, same in tiles:
                    best = torch.maximum(best, scores.masked_fill_(~same, -torch.inf).amax(1))
                tiles = _tiles(queries, candidates, groups, rows, candidate_chunk)
            count = torch.zeros(4, len(best), dtype=torch.int64)
            for scores, same in tiles:
                higher = scores > (best + tie_tolerance)[:, None]
                level = scores >= (best - tie_tolerance)[:, None]
                count[0] += _count(higher if same is None else higher & ~same)
                count[1] += _count(level) - _count(higher)
                if same is not None:
                    count[2] += _count(level & same)
                    count[3] += _count(same)
            if groups is None:
                count[2:] = 1
            counts.append(count)
    better, tied, tied_correct, correct = torch.cat(counts, dim=1)
    return Ranks(better, tied, tied_correct, correct, num)


def measure(
    images: Tensor, texts: Tensor, captions: Sequence[str], *, duplicates: Duplicates = "strict"
) -> dict[str, Any]:
    """R@1, R@5, R@10 and median rank in both directions, with the chance level of each.

    Args:
        images, texts: (N, D) float32, unit norm, row i of both from pair i.
        captions: N texts; with `duplicates="correct"` a caption equal to the query's own counts as right, with
            "strict" (as in the paper, which does not treat duplicates) only the pair's own does.

    Returns:
        A JSON-ready dict: num_samples, duplicates, num_distinct_captions, figures.
    """
    groups = caption_groups(captions)
    if len(groups) != len(images):
        raise UserError(f"{len(images)} image embeddings but {len(groups)} captions: retrieval needs pairs")
    used = groups if duplicates == "correct" else None
    figures = []
    for direction, queries, candidates in (("image to text", images, texts), ("text to image", texts, images)):
        ranks = rank(queries, candidates, used)
        for k in RECALL_AT:
            figures.append(_figure(f"{direction} R@{k}", ranks.recall(k), ranks.chance_recall(k), len(images)))
        median = _median(ranks.expected())
        figures.append(_figure(f"{direction} median rank", median, ranks.chance_median_rank(), len(images), "rank"))
    return {
        "num_samples": len(images),
        "duplicates": duplicates,
        "num_distinct_captions": int(groups.max()) + 1,
        "tie_tolerance": TIE_TOLERANCE,
        "figures": figures,
    }


def _figure(name: str, value: float, chance: float, num_samples: int, unit: str = "share") -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "chance": chance,
        "chance_is": "random order",
        "unit": unit,
        "higher_is_better": unit == "share",
        "num_samples": num_samples,
    }


@torch.inference_mode()
def gallery(
    images: Tensor, texts: Tensor, captions: Sequence[str], *, num_queries: int = 6, num_hits: int = 5
) -> dict[str, list[dict[str, Any]]]:
    """Example queries with their best hits, taken at even steps through the data, never chosen by their result.

    Returns:
        `text_to_image` and `image_to_text`: for each query its sample index and hits, each hit with its sample
        index, cosine similarity, and whether it is the query's own pair or has the same caption text.
    """
    groups = caption_groups(captions).tolist()
    num = len(images)
    step = max(1, num // num_queries)
    chosen = [step // 2 + step * i for i in range(min(num_queries, num))]
    directions = {}
    for name, queries, candidates in (("text_to_image", texts, images), ("image_to_text", images, texts)):
        rows = []
        for query in chosen:
            with _full_float32():
                scores = candidates.float() @ queries[query].float()
            top = torch.topk(scores, min(num_hits, num))
            hits = [
                {"sample": j, "score": score, "right": j == query, "same_caption": groups[j] == groups[query]}
                for j, score in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
            rank_of_right = 1 + int((scores > scores[query] + TIE_TOLERANCE).sum())
            rows.append(
                {"sample": query, "rank_of_right": rank_of_right, "score_of_right": float(scores[query]), "hits": hits}
            )
        directions[name] = rows
    return directions

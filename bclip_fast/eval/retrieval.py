"""Cross-modal retrieval: exact ranks of the correct candidate, recall at k and median rank, with chance baselines.

Image i and caption i are a pair. The best-scoring correct candidate decides a query's rank. Ties count as the average
over random orders of the tied candidates. A model that maps everything to one point therefore scores exactly chance.
Similarities that differ by at most `TIE_TOLERANCE` are tied, because float32 embeddings cannot tell them apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bclip_fast.errors import UserError

from . import exact_ranks, statistics
from .faiss_index import Index, nearest

TIE_TOLERANCE = 1e-6
RECALL_AT = (1, 5, 10)
_PAIRS_AT_ONCE = 1 << 16

Duplicates = Literal["strict", "captions", "images", "any"]


@dataclass(frozen=True)
class Ranks:
    """Candidate counts for each of N queries, int64 (N,) on the CPU."""

    num_better: Tensor
    """Wrong candidates that score above the query's best correct candidate."""
    num_tied: Tensor
    """Candidates tied with the best correct one, which counts too."""
    num_tied_correct: Tensor
    """Correct candidates among the tied ones."""
    num_correct: Tensor
    """All correct candidates."""
    num_candidates: int
    """Number of candidates, the same for all queries."""

    def recall(self, k: int) -> float:
        """Return the expected share of queries with a correct candidate among the first k, ties in random order."""
        return float(self.hits(k).mean())

    def hits(self, k: int) -> Tensor:
        """Return each query's probability of a hit among the first k, float64 (N,). Without ties, it is 0 or 1."""
        return _hit_probability(k - self.num_better, self.num_tied, self.num_tied_correct)

    def expected(self) -> Tensor:
        """Return the expected rank of the first correct candidate, float64 (N,). The best rank is 1."""
        return self.num_better + (self.num_tied + 1).double() / (self.num_tied_correct + 1)

    def chance_recall(self, k: int) -> float:
        """Return `recall(k)` of a random order of all candidates."""
        total = torch.full_like(self.num_correct, self.num_candidates)
        return float(_hit_probability(torch.full_like(total, k), total, self.num_correct).mean())

    def chance_median_rank(self) -> float:
        """Return the median over queries of the expected rank in a random order."""
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
    """Return the median. For an even number of values, it is the mean of the middle two, unlike in torch.median."""
    ordered = values.double().sort().values
    return float((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)


def group_equal(texts: Sequence[str]) -> Tensor:
    """Number the texts so that equal texts share a number, int64 (N,). Differences in white space do not count."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(" ".join(text.split()), len(numbers)) for text in texts])


def check_embeddings(embeddings: Tensor, name: str) -> None:
    """Raise UserError unless `embeddings` is a finite, L2-normalised, non-empty matrix (N, D)."""
    if embeddings.ndim != 2 or not embeddings.shape[0]:
        raise UserError(f"{name} must be a non-empty matrix (N, D), not of shape {tuple(embeddings.shape)}")
    norms = embeddings.float().norm(dim=1)
    not_finite = (~torch.isfinite(norms)).nonzero()
    if len(not_finite):
        raise UserError(
            f"{name} hold NaN or infinity in {len(not_finite)} of {len(norms)} rows, first in row {int(not_finite[0])}"
        )
    worst = int((norms - 1).abs().argmax())
    if abs(float(norms[worst]) - 1) > 1e-3:
        raise UserError(f"{name} must be L2-normalised, but row {worst} has norm {float(norms[worst]):.4g}")


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices without TF32."""
    # TF32 has errors of 1e-3, which would reorder candidates.
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


@torch.inference_mode()
def rank(
    queries: Tensor,
    candidates: Tensor,
    groups: Sequence[Tensor] = (),
    *,
    num_queries: int | None = None,
    **chunks: Any,
) -> tuple[Ranks, Ranks]:
    """Rank the candidates for each query, and the queries for each candidate, exactly by cosine similarity.

    One pass over tiles of the similarities serves both directions (`exact_ranks.count`, which takes `chunks`). The
    memory is one tile plus O(N). Correct pairs are scored separately, in time proportional to their number.

    Args:
        queries, candidates: (N, D), unit norm. Candidate i belongs to query i.
        groups: group numbers, int64 (N,) each. A candidate that shares a group with the query is correct too.
        num_queries: number of rows that serve as queries, among all candidates. The second result then ranks only
            these queries for the first `num_queries` candidates.

    Raises:
        UserError: different shapes, NaN or infinity, rows without unit norm.
    """
    check_embeddings(queries, "query embeddings")
    check_embeddings(candidates, "candidate embeddings")
    if queries.shape != candidates.shape:
        raise UserError(
            f"embeddings must pair up: queries {tuple(queries.shape)}, candidates {tuple(candidates.shape)}"
        )
    total, device = len(queries), queries.device
    num = total if num_queries is None else min(num_queries, total)
    queries, groups = queries[:num], [group.cpu() for group in groups if group.unique().numel() < total]
    pair_scores = _scores(queries, candidates, torch.arange(num, device=device), torch.arange(num, device=device))
    best = pair_scores.clone(), torch.cat([pair_scores, pair_scores.new_full((total - num,), torch.inf)])
    for i, j in _other_correct(groups, num, device):
        scores = _scores(queries, candidates, i, j)
        for bound, index in zip(best, (i, j), strict=True):
            bound.scatter_reduce_(0, index, scores, "amax")
    num_tied = [(pair_scores >= bound[:num] - TIE_TOLERANCE).long() for bound in best]
    num_correct = [torch.ones_like(counts) for counts in num_tied]
    for i, j in _other_correct(groups, num, device):
        scores = _scores(queries, candidates, i, j)
        for index, bound, tied, correct in zip((i, j), best, num_tied, num_correct, strict=True):
            inside = index < num
            correct += index[inside].bincount(minlength=num)
            tied += index[inside & (scores >= bound[index] - TIE_TOLERANCE)].bincount(minlength=num)
    with full_float32():
        counts = exact_ranks.count(queries, candidates, best[0], best[1], TIE_TOLERANCE, **chunks)
    # A candidate above the best correct one is wrong by definition.
    return tuple(  # type: ignore[return-value]
        Ranks(above[:num], (reaching - above)[:num], tied.cpu(), correct.cpu(), size)
        for (above, reaching), tied, correct, size in zip(counts, num_tied, num_correct, (total, num), strict=True)
    )


def _scores(queries: Tensor, candidates: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return the similarities of query rows i and candidate rows j, float64 (P,)."""
    chunks = zip(i.split(_PAIRS_AT_ONCE), j.split(_PAIRS_AT_ONCE), strict=True)
    return torch.cat(
        [(queries[rows].float().double() * candidates[columns].float().double()).sum(1) for rows, columns in chunks]
    )


def _other_correct(groups: Sequence[Tensor], num: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each pair (i, j) with i < num and j != i that shares a group, exactly once, as int64 chunks."""
    for number, group in enumerate(groups):
        order = group.argsort(stable=True)
        sizes = group.unique(return_counts=True)[1]
        # The start and the size of each sample's group, for the samples in order.
        starts, sizes = (sizes.cumsum(0) - sizes).repeat_interleave(sizes), sizes.repeat_interleave(sizes)
        members = ((order < num) & (sizes > 1)).nonzero()[:, 0]
        ends = sizes[members].cumsum(0)
        begin = 0
        while begin < len(members):
            num_done = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(torch.searchsorted(ends, num_done + _PAIRS_AT_ONCE, right=True)))
            chunk = members[begin:end]
            i = order[chunk].repeat_interleave(sizes[chunk])
            steps = torch.arange(len(i)) - (ends[begin:end] - sizes[chunk] - num_done).repeat_interleave(sizes[chunk])
            j = order[starts[chunk].repeat_interleave(sizes[chunk]) + steps]
            is_new = i != j
            for earlier in groups[:number]:
                is_new &= earlier[i] != earlier[j]
            if bool(is_new.any()):
                yield i[is_new].to(device), j[is_new].to(device)
            begin = end


def approximate(queries: Tensor, candidates: Tensor, groups: Sequence[Tensor], kind: Index) -> Ranks:
    """Return ranks as a faiss index shows them. A correct candidate beyond the first `max(RECALL_AT)` ranks last."""
    check_embeddings(queries, "query embeddings")
    check_embeddings(candidates, "candidate embeddings")
    num = len(queries)
    neighbours = nearest(queries, candidates, kind, max(RECALL_AT))
    is_correct = neighbours == torch.arange(num)[:, None]
    for group in groups:
        group = group.cpu()
        # HNSW and IVF return -1 for each missing neighbour.
        is_correct |= (group[neighbours.clamp(min=0)] == group[:, None]) & (neighbours >= 0)
    num_better = torch.where(is_correct.any(1), is_correct.int().argmax(1), num - 1)
    one = torch.ones(num, dtype=torch.int64)
    return Ranks(num_better, one, one, _num_correct(groups, num), num)


def _num_correct(groups: Sequence[Tensor], num: int) -> Tensor:
    """Return how many samples share a group with each sample, including itself, int64 (N,)."""
    if not groups:
        return torch.ones(num, dtype=torch.int64)
    sizes = [group.cpu().bincount()[group.cpu()] for group in groups]
    if len(groups) == 1:
        return sizes[0]
    # Two groups: |A or B| = |A| + |B| - |A and B|.
    both = torch.stack([group.cpu() for group in groups], dim=1).unique(dim=0, return_inverse=True)[1]
    return sizes[0] + sizes[1] - both.bincount()[both]


def measure(
    images: Tensor,
    texts: Tensor,
    captions: Sequence[str],
    *,
    duplicates: Duplicates = "strict",
    image_hashes: Sequence[str] | None = None,
    index: Index = "exact",
) -> dict[str, Any]:
    """Compute R@1, R@5, R@10 and median rank in both directions, each with chance baseline and 95 % interval.

    Args:
        images, texts: (N, D) float32, unit norm. Row i of both belongs to pair i.
        captions: N texts.
        duplicates: pairs that are correct too. `strict`: none, as in the paper. `captions`: pairs with the same text.
            `images`: pairs with the same image. `any`: both.
        image_hashes: N hashes of the encoded images. Required for `images` and `any`.
        index: `exact`, or a faiss index. An approximate index gives no median rank beyond its list of neighbours.

    Returns:
        JSON-ready dict: num_samples, duplicates, index, num_distinct_captions, figures (the metrics) and samples
        (hits and rank of each query).
    """
    if len(captions) != len(images):
        raise UserError(f"{len(images)} image embeddings but {len(captions)} captions: retrieval needs pairs")
    same_caption = group_equal(captions)
    groups = [same_caption] if duplicates in ("captions", "any") else []
    if duplicates in ("images", "any"):
        if image_hashes is None:
            raise UserError(f"duplicates={duplicates} needs image_hashes")
        groups.append(group_equal(image_hashes))
    if index == "exact":
        both_ranks = rank(images, texts, groups)
    else:
        both_ranks = approximate(images, texts, groups, index), approximate(texts, images, groups, index)
    metrics = []
    samples: dict[str, list[Any]] = {}
    for direction, ranks in zip(("image to text", "text to image"), both_ranks, strict=True):
        for k in RECALL_AT:
            hits = ranks.hits(k).numpy()
            metrics.append(
                statistics.metric(
                    f"{direction} R@{k}",
                    float(hits.mean()),
                    ranks.chance_recall(k),
                    "random order",
                    len(images),
                    interval=statistics.mean_interval(hits),
                )
            )
            samples[f"{direction} R@{k}"] = [round(value, 6) for value in hits.tolist()]
        expected = ranks.expected()
        median = _median(expected)
        if index == "exact" or median <= max(RECALL_AT):
            metrics.append(
                statistics.metric(
                    f"{direction} median rank",
                    median,
                    ranks.chance_median_rank(),
                    "random order",
                    len(images),
                    unit="rank",
                    interval=statistics.median_interval(expected.numpy()),
                )
            )
            samples[f"{direction} rank"] = [round(value, 3) for value in expected.tolist()]
    return {
        "num_samples": len(images),
        "duplicates": duplicates,
        "index": index,
        "num_distinct_captions": int(same_caption.max()) + 1,
        "tie_tolerance": TIE_TOLERANCE,
        "figures": metrics,
        "samples": samples,
    }


@torch.inference_mode()
def gallery(
    images: Tensor, texts: Tensor, captions: Sequence[str], *, num_queries: int = 6, num_hits: int = 5
) -> dict[str, list[dict[str, Any]]]:
    """Return example queries with their best hits. The queries are evenly spaced, so results do not influence them.

    Returns:
        `text_to_image` and `image_to_text`: each query with its sample index and hits. A hit has its sample index and
        cosine similarity, and tells whether it is the query's own pair and whether it has the same caption.
    """
    caption_numbers = group_equal(captions).tolist()
    num = len(images)
    step = max(1, num // num_queries)
    examples = [step // 2 + step * i for i in range(min(num_queries, num))]
    directions = {}
    for name, queries, candidates in (("text_to_image", texts, images), ("image_to_text", images, texts)):
        rows = []
        for query in examples:
            with full_float32():
                scores = candidates.float() @ queries[query].float()
            top = torch.topk(scores, min(num_hits, num))
            hits = [
                {
                    "sample": j,
                    "score": score,
                    "right": j == query,
                    "same_caption": caption_numbers[j] == caption_numbers[query],
                }
                for j, score in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
            rank_of_right = 1 + int((scores > scores[query] + TIE_TOLERANCE).sum())
            rows.append(
                {"sample": query, "rank_of_right": rank_of_right, "score_of_right": float(scores[query]), "hits": hits}
            )
        directions[name] = rows
    return directions

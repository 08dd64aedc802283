"""Cross-modal retrieval: exact ranks of the right candidate, recall at k, median rank, each with its chance level.

Image i and caption i are a pair. A query's rank is decided by its best-scoring correct candidate. Ties are counted as
what a random order among equal scores gives on average, so a model that maps everything to one point scores exactly
chance, neither 0 nor 100 %. Similarities that differ by at most `TIE_TOLERANCE` are equal: float32 embeddings do
not tell them apart.
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
from .faiss_index import Index, search

TIE_TOLERANCE = 1e-6
RECALL_AT = (1, 5, 10)
_PAIRS_AT_ONCE = 1 << 16

Duplicates = Literal["strict", "captions", "images", "any"]


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
        return float(self.hits(k).mean())

    def hits(self, k: int) -> Tensor:
        """(N,) float64: the probability that a query has one there; 0 or 1 where nothing is tied."""
        return _hit_probability(k - self.num_better, self.num_tied, self.num_tied_correct)

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


@torch.inference_mode()
def rank(
    queries: Tensor,
    candidates: Tensor,
    groups: Sequence[Tensor] = (),
    *,
    num_queries: int | None = None,
    **chunks: Any,
) -> tuple[Ranks, Ranks]:
    """Exact ranks by cosine similarity, of the candidates for each query and of the queries for each candidate.

    One pass over the similarities serves both, in tiles (see `exact.count`, which takes `chunks`): memory is a tile and
    O(N), never N x N. Correct pairs are looked at by themselves, in time and O(N) memory by their number.

    Args:
        queries, candidates: (N, D), unit norm; candidate i belongs to query i.
        groups: (N,) int64 each; what shares a number with the query in any of them is correct too.
        num_queries: only the first so many rows are taken as queries, among all candidates; the second result is then
            that of the first so many candidates, among those queries.

    Raises:
        UserError: shapes that differ, NaN or infinity, rows without unit norm.
    """
    check_embeddings(queries, "query embeddings")
    check_embeddings(candidates, "candidate embeddings")
    if queries.shape != candidates.shape:
        raise UserError(
            f"embeddings must pair up: queries {tuple(queries.shape)}, candidates {tuple(candidates.shape)}"
        )
    total, device = len(queries), queries.device
    num = total if num_queries is None else min(num_queries, total)
    queries, numbers = queries[:num], [group.cpu() for group in groups if group.unique().numel() < total]
    own = _scores(queries, candidates, torch.arange(num, device=device), torch.arange(num, device=device))
    best = own.clone(), torch.cat([own, own.new_full((total - num,), torch.inf)])
    for i, j in _other_correct(numbers, num, device):
        scores = _scores(queries, candidates, i, j)
        for bound, index in zip(best, (i, j), strict=True):
            bound.scatter_reduce_(0, index, scores, "amax")
    level = [(own >= bound[:num] - TIE_TOLERANCE).long() for bound in best]
    correct = [torch.ones_like(part) for part in level]
    for i, j in _other_correct(numbers, num, device):
        scores = _scores(queries, candidates, i, j)
        for index, bound, tied, all_correct in zip((i, j), best, level, correct, strict=True):
            inside = index < num
            all_correct += index[inside].bincount(minlength=num)
            tied += index[inside & (scores >= bound[index] - TIE_TOLERANCE)].bincount(minlength=num)
    with _full_float32():
        counts = exact_ranks.count(queries, candidates, best[0], best[1], TIE_TOLERANCE, **chunks)
    # No correct candidate exceeds the best correct one: what does so is wrong.
    return tuple(  # type: ignore[return-value]
        Ranks(above[:num], (reaching - above)[:num], tied.cpu(), all_correct.cpu(), size)
        for (above, reaching), tied, all_correct, size in zip(counts, level, correct, (total, num), strict=True)
    )


def _scores(queries: Tensor, candidates: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """(P,) float64: the similarities of rows i and j."""
    parts = zip(i.split(_PAIRS_AT_ONCE), j.split(_PAIRS_AT_ONCE), strict=True)
    return torch.cat([(queries[one].float().double() * candidates[two].float().double()).sum(1) for one, two in parts])


def _other_correct(groups: Sequence[Tensor], num: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """All (i, j), i < num and j != i, that share a number in any of the groups, each once; int64, in parts."""
    for place, group in enumerate(groups):
        order = group.argsort(stable=True)
        sizes = group.unique(return_counts=True)[1]
        # For each of the members in order: where its group starts, and how large it is.
        starts, sizes = (sizes.cumsum(0) - sizes).repeat_interleave(sizes), sizes.repeat_interleave(sizes)
        members = ((order < num) & (sizes > 1)).nonzero()[:, 0]
        ends = sizes[members].cumsum(0)
        begin = 0
        while begin < len(members):
            done = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(torch.searchsorted(ends, done + _PAIRS_AT_ONCE, right=True)))
            part = members[begin:end]
            i = order[part].repeat_interleave(sizes[part])
            steps = torch.arange(len(i)) - (ends[begin:end] - sizes[part] - done).repeat_interleave(sizes[part])
            j = order[starts[part].repeat_interleave(sizes[part]) + steps]
            new = i != j
            for earlier in groups[:place]:
                new &= earlier[i] != earlier[j]
            if bool(new.any()):
                yield i[new].to(device), j[new].to(device)
            begin = end


def approximate(queries: Tensor, candidates: Tensor, groups: Sequence[Tensor], kind: Index) -> Ranks:
    """Ranks as an index shows them: right candidates beyond the list of `max(RECALL_AT)` stand behind all others."""
    check_embeddings(queries, "query embeddings")
    check_embeddings(candidates, "candidate embeddings")
    num = len(queries)
    found = search(queries, candidates, kind, max(RECALL_AT))
    right = found == torch.arange(num)[:, None]
    for group in groups:
        group = group.cpu()
        # HNSW and IVF may find fewer than asked for and fill up with -1.
        right |= (group[found.clamp(min=0)] == group[:, None]) & (found >= 0)
    place = torch.where(right.any(1), right.int().argmax(1), num - 1)
    one = torch.ones(num, dtype=torch.int64)
    return Ranks(place, one, one, _num_correct(groups, num), num)


def _num_correct(groups: Sequence[Tensor], num: int) -> Tensor:
    """(N,) int64: how many samples share a number with each in any of the groups, itself included."""
    if not groups:
        return torch.ones(num, dtype=torch.int64)
    sizes = [group.cpu().bincount()[group.cpu()] for group in groups]
    if len(groups) == 1:
        return sizes[0]
    # Of two groups: |A or B| = |A| + |B| - |A and B|.
    both = torch.stack([group.cpu() for group in groups], dim=1).unique(dim=0, return_inverse=True)[1]
    return sizes[0] + sizes[1] - both.bincount()[both]


def measure(
    images: Tensor,
    texts: Tensor,
    captions: Sequence[str],
    *,
    duplicates: Duplicates = "strict",
    pictures: Sequence[str] | None = None,
    index: Index = "exact",
) -> dict[str, Any]:
    """R@1, R@5, R@10 and median rank in both directions, each with its chance level and 95 % interval.

    Args:
        images, texts: (N, D) float32, unit norm, row i of both from pair i.
        captions: N texts.
        duplicates: what counts as right beside the query's own pair: nothing (`strict`, as in the paper, which does
            not treat duplicates), pairs with the same text (`captions`), with the same picture (`images`), or `any`.
        pictures: N hashes of the encoded images; needed for `images` and `any`.
        index: `exact`, or an index of faiss; an approximate one gives no median rank beyond its list.

    Returns:
        A JSON-ready dict: num_samples, duplicates, index, num_distinct_captions, figures, samples (the rank of each).
    """
    if len(captions) != len(images):
        raise UserError(f"{len(images)} image embeddings but {len(captions)} captions: retrieval needs pairs")
    same_caption = caption_groups(captions)
    groups = [same_caption] if duplicates in ("captions", "any") else []
    if duplicates in ("images", "any"):
        if pictures is None:
            raise UserError(f"duplicates={duplicates} needs the pictures' hashes")
        groups.append(caption_groups(pictures))
    if index == "exact":
        found = rank(images, texts, groups)
    else:
        found = approximate(images, texts, groups, index), approximate(texts, images, groups, index)
    figures = []
    samples: dict[str, list[Any]] = {}
    for direction, ranks in zip(("image to text", "text to image"), found, strict=True):
        for k in RECALL_AT:
            hits = ranks.hits(k).numpy()
            figures.append(
                statistics.figure(
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
            figures.append(
                statistics.figure(
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
        "figures": figures,
        "samples": samples,
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

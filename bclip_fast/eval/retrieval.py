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
from . import metrics

TIE_TOLERANCE = 1e-6
RECALL_AT = (1, 5, 10)

Duplicates = Literal["strict", "captions", "images", "any"]
Index = Literal["exact", "faiss_flat", "hnsw", "ivf"]


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


def _count(mask: Tensor, dim: int) -> Tensor:
    """True values of (q, c) bool along `dim`, int64 on the CPU."""
    if mask.device.type != "cpu":
        return mask.sum(dim).cpu()
    # Bytes are summed as bytes, up to 128 at a time, where numpy vectorises: 50 times as fast as torch's sum of bool.
    values = mask.numpy().view(np.uint8)
    num = values.shape[dim]
    whole = num - num % 128
    if dim == 0:
        parts = np.add.reduce(values[:whole].reshape(-1, 128, values.shape[1]), axis=1, dtype=np.uint8)
    else:
        parts = np.add.reduce(values[:, :whole].reshape(len(values), 128, -1), axis=1, dtype=np.uint8)
        if whole > 255 * 128:
            raise ValueError(f"{num} columns are too many for counts in bytes")
    rest = values[whole:] if dim == 0 else values[:, whole:]
    return torch.from_numpy(parts.sum(dim, dtype=np.int64) + rest.sum(dim, dtype=np.int64))


def _compare(scores: Tensor, threshold: Tensor, strictly: bool, out: Tensor | None) -> Tensor:
    if scores.device.type != "cpu":
        return scores > threshold if strictly else scores >= threshold
    # Into memory that is there already: fresh pages would cost more than the comparison.
    assert out is not None
    function = np.greater if strictly else np.greater_equal
    function(scores.numpy(), threshold.numpy(), out=out.numpy())
    return out


@torch.inference_mode()
def rank(
    queries: Tensor,
    candidates: Tensor,
    groups: Sequence[Tensor] = (),
    *,
    num_queries: int | None = None,
    query_chunk: int = 1024,
    candidate_chunk: int = 8192,
    tie_tolerance: float = TIE_TOLERANCE,
) -> tuple[Ranks, Ranks]:
    """Exact ranks by cosine similarity, of the candidates for each query and of the queries for each candidate.

    One pass over the similarities serves both, in tiles of `query_chunk` x `candidate_chunk`: memory is a tile and
    O(N), never N x N. With groups there is a second pass, since the best correct candidate must be found first.

    Args:
        queries, candidates: (N, D) float32, unit norm; candidate i belongs to query i.
        groups: (N,) int64 each; what shares a number with the query in any of them is correct too.
        num_queries: only the first so many rows are taken as queries; the second result then counts those alone.

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
    candidate_chunk = min(candidate_chunk, 255 * 128, total)
    query_chunk = min(query_chunk, num)
    used = [group.to(device) for group in groups if group.unique().numel() < total]
    tiles = [
        (slice(top, min(top + query_chunk, num)), slice(left, min(left + candidate_chunk, total)))
        for top in range(0, num, query_chunk)
        for left in range(0, total, candidate_chunk)
    ]
    scores_out = torch.empty(query_chunk * candidate_chunk, device=device)
    masks_out = torch.empty(query_chunk * candidate_chunk, dtype=torch.bool, device=device)

    def tile(rows: slice, columns: slice) -> tuple[Tensor, Tensor | None, Tensor]:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        scores = scores_out[: shape[0] * shape[1]].view(shape)
        torch.mm(queries[rows].float(), candidates[columns].float().T, out=scores)
        same: Tensor | None = None
        for group in used:
            equal = group[rows, None] == group[columns]
            same = equal if same is None else same.logical_or_(equal)
        return scores, same, masks_out[: shape[0] * shape[1]].view(shape)

    with _full_float32():
        if used:
            best = [torch.full((size,), -torch.inf, device=device) for size in (num, total)]
            for rows, columns in tiles:
                scores, same, _ = tile(rows, columns)
                assert same is not None
                scores.masked_fill_(~same, -torch.inf)
                for row, part, dim in ((best[0], rows, 1), (best[1], columns, 0)):
                    row[part] = torch.maximum(row[part], scores.amax(dim))
        else:
            both = torch.cat([(queries[part].float() * candidates[part].float()).sum(1) for part in _parts(total)])
            best = [both[:num], both]
        counts = [torch.zeros(4, size, dtype=torch.int64) for size in (num, total)]
        for rows, columns in tiles:
            scores, same, mask = tile(rows, columns)
            for result, right, part, dim in ((counts[0], best[0], rows, 1), (counts[1], best[1], columns, 0)):
                bound = right[part].unsqueeze(dim)
                level = _compare(scores, bound - tie_tolerance, False, mask)
                num_level = _count(level, dim)
                if same is not None:
                    result[2, part] += _count(level & same, dim)
                    result[3, part] += _count(same, dim)
                higher = _compare(scores, bound + tie_tolerance, True, mask)
                num_higher = _count(higher, dim)
                result[1, part] += num_level - num_higher
                result[0, part] += num_higher if same is None else _count(higher & ~same, dim)
    for result in counts:
        if not used:
            result[2:] = 1
    return _ranks(counts[0], total), _ranks(counts[1], num)


def _ranks(counts: Tensor, num_candidates: int) -> Ranks:
    better, tied, tied_correct, correct = counts
    return Ranks(better, tied, tied_correct, correct, num_candidates)


def _parts(total: int, size: int = 65536) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, total, size))


def build(candidates: Tensor, kind: Index, *, effort: int = 64) -> Any:
    """faiss's index of (N, D) candidates by inner product, approximate unless `faiss_flat`.

    effort: efSearch of HNSW, the lists probed by IVF; more finds more and takes longer.
    """
    import faiss

    rows, dim = np.ascontiguousarray(candidates.cpu().float().numpy()), candidates.shape[1]
    if kind == "faiss_flat":
        index: Any = faiss.IndexFlatIP(dim)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = effort
    elif kind == "ivf":
        # faiss's guideline of 4 sqrt(N) lists, trained on at least 39 rows each.
        num_lists = max(1, min(int(4 * len(rows) ** 0.5), len(rows) // 39))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, num_lists, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        index.nprobe = min(effort, num_lists)
    else:
        raise UserError(f"index {kind!r} is unknown: use exact, faiss_flat, hnsw or ivf")
    index.add(rows)
    return index


def search(queries: Tensor, candidates: Tensor, kind: Index, k: int, *, effort: int = 64) -> Tensor:
    """(N, k) int64: the k nearest candidates as an index of faiss finds them; `kind` and `effort` as of `build`."""
    index = build(candidates, kind, effort=effort)
    vectors = np.ascontiguousarray(queries.cpu().float().numpy())
    return torch.from_numpy(index.search(vectors, min(k, len(candidates)))[1])


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
                metrics.figure(
                    f"{direction} R@{k}",
                    float(hits.mean()),
                    ranks.chance_recall(k),
                    "random order",
                    len(images),
                    interval=metrics.mean_interval(hits),
                )
            )
            samples[f"{direction} R@{k}"] = [round(value, 6) for value in hits.tolist()]
        expected = ranks.expected()
        median = _median(expected)
        if index == "exact" or median <= max(RECALL_AT):
            figures.append(
                metrics.figure(
                    f"{direction} median rank",
                    median,
                    ranks.chance_median_rank(),
                    "random order",
                    len(images),
                    unit="rank",
                    interval=metrics.median_interval(expected.numpy()),
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

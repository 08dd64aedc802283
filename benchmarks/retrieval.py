"""`bclip bench retrieval`: exact ranks in both directions among synthetic pairs. Brute force checks a sample."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.eval import exact_ranks, faiss_index, retrieval

from .measure import DEVICE, cpu_seconds, matmul_rate, peak_extra_bytes
from .table import print_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetrievalConfig:
    """Ranks of N pairs of unit vectors. The images are the texts with noise."""

    pairs: int = 725_739
    """Number of pairs N. The default is the size of the paper's test set."""
    dim: int = 512
    """Dimension D of the vectors."""
    noise: float = 4.0
    """Length of the noise, for a signal of length 1. At 4, R@1 of the default N is about 70 %, as in the paper. More
    noise brings more similarities near the correct one's, and 1000 leaves no signal."""
    queries: int = 0
    """Number of images to rank, and of texts to rank among these images. 0: all. A part takes more than a proportional
    time, because it checks and rounds all candidates."""
    rival_queries: int = 1024
    """The same number for the peers: our ranks in float32 throughout, and faiss. 0 leaves them out."""
    checked: int = 8
    """Number of queries and candidates whose ranks are compared with brute force in float64."""

    def __post_init__(self) -> None:
        if min(self.pairs, self.dim, self.checked) < 1 or not 0 <= self.queries <= self.pairs:
            raise UserError(
                f"retrieval.pairs={self.pairs}, dim={self.dim}, checked={self.checked}, queries={self.queries}: "
                "need at least 1, and no more queries than pairs"
            )
        if not 0 <= self.rival_queries <= self.pairs or self.noise < 0:
            raise UserError(f"retrieval.rival_queries={self.rival_queries}, noise={self.noise}: out of range")


def embeddings(config: RetrievalConfig) -> tuple[Tensor, Tensor]:
    """Return images and texts, (N, D) float32. Needs no further memory of that size."""
    generator = torch.Generator().manual_seed(0)
    texts, images = (torch.randn(config.pairs, config.dim, generator=generator) for _ in range(2))
    for rows in (texts, images):
        rows /= rows.norm(dim=1, keepdim=True)
    images.mul_(config.noise).add_(texts)
    images /= images.norm(dim=1, keepdim=True)
    return images.to(DEVICE), texts.to(DEVICE)


def brute_force(query: Tensor, candidates: Tensor, correct: int) -> int:
    """Return the number of candidates (n, D) that score higher than candidate `correct`, in float64."""
    scores = torch.cat([part.double() @ query.double() for part in candidates.split(1 << 16)])
    return int((scores > scores[correct] + retrieval.TIE_TOLERANCE).sum())


def measure_retrieval(config: RetrievalConfig) -> list[dict[str, Any]]:
    """Return a row for each contender. Raises AssertionError if a rank differs from brute force's."""
    images, texts = embeddings(config)
    rows = []
    contenders: dict[str, tuple[int, Callable[[int], list[retrieval.Ranks]]]] = {
        "ours": (config.queries or config.pairs, lambda num: [*retrieval.rank(images, texts, num_queries=num)])
    }
    if config.rival_queries:
        single = ("float32", "float64")
        contenders["float32 throughout"] = (
            config.rival_queries,
            lambda num: [*retrieval.rank(images, texts, num_queries=num, allowed=single)],
        )
        contenders["faiss flat, first 10, one way"] = config.rival_queries, lambda num: _faiss(images[:num], texts)
    for name, (num, run) in contenders.items():
        log.info("%s: %d x %d", name, num, config.pairs)
        start, cpu_start = time.perf_counter(), cpu_seconds()
        extra, directions = peak_extra_bytes(lambda run=run, num=num: run(num))  # type: ignore[misc]
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
        _check(config, directions, images[:num], texts)
        # One pass over the similarities serves both directions.
        flops = 2 * num * config.pairs * config.dim
        rows.append(
            dict(
                operator="retrieval",
                case=f"{config.pairs}-{config.dim}-noise-{config.noise:g}",
                contender=name,
                error=0.0,
                steps=exact_ranks.steps(images.device) if name == "ours" else None,
                num_checked=len(directions) * min(config.checked, num),
                queries=num,
                seconds=seconds,
                cpu_seconds=cpu,
                whole_seconds=seconds * config.pairs / num,
                flops=flops,
                extra_bytes=extra,
                held_bytes=2 * images.numel() * images.element_size(),
                recall_at_1=[ranks.recall(1) for ranks in directions],
                median_rank=[float(ranks.expected().median()) for ranks in directions]
                if len(directions) == 2
                else None,
                **matmul_rate(torch.float32),
            )
        )
    return rows


def _check(config: RetrievalConfig, directions: list[retrieval.Ranks], queries: Tensor, candidates: Tensor) -> None:
    step = max(1, len(queries) // config.checked)
    for i in range(step // 2, len(queries), step)[: config.checked]:
        for ranks, row, others in zip(directions, (queries[i], candidates[i]), (candidates, queries), strict=False):
            better = brute_force(row, others, i)
            # faiss returns ten candidates. If the correct one is not among them, its rank counts as the last.
            expected = better if len(directions) == 2 or better < max(retrieval.RECALL_AT) else len(others) - 1
            actual = int(ranks.num_better[i])
            assert actual == expected, f"rank of {i} is {actual}, should be {expected}"


def _faiss(queries: Tensor, candidates: Tensor) -> list[retrieval.Ranks]:
    num, one = len(queries), torch.ones(len(queries), dtype=torch.int64)
    nearest = faiss_index.nearest(queries, candidates, "faiss_flat", max(retrieval.RECALL_AT))
    correct = nearest == torch.arange(num)[:, None]
    rank = torch.where(correct.any(1), correct.int().argmax(1), len(candidates) - 1)
    return [retrieval.Ranks(rank, one, one, one, len(candidates))]


def show_retrieval(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    first = rows[0]
    title = (
        f"{first['case']}: {first['held_bytes'] / 1e9:.1f} GB of embeddings; float32 matmul "
        f"{first['matmul_flops_per_second'] / 1e12:.2f} TFLOP/s"
    )
    headings = ["contender", "queries", "s", "CPU s", "s for all", "TFLOP/s", "extra GB", "R@1", "checked"]
    cells = [
        [
            row["contender"],
            f"{row['queries']:,}",
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['whole_seconds']:,.0f}",
            f"{row['flops'] / row['seconds'] / 1e12:.2f}",
            "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e9:.2f}",
            " ".join(f"{recall:.1%}" for recall in row["recall_at_1"]),
            str(row["num_checked"]),
        ]
        for row in rows
    ]
    print_table(title, headings, cells)

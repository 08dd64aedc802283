"""`bclip bench retrieval`: exact ranks both ways among all pairs of synthetic embeddings, checked on a sample."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.eval import exact_ranks, faiss_index, retrieval

from .measure import DEVICE, matmul_rate, peak_extra_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetrievalConfig:
    """Ranks of N pairs of unit vectors, the images being the texts with noise."""

    pairs: int = 725_739
    """N; the default is the paper's test set."""
    dim: int = 512
    noise: float = 4.0
    """Length of the noise, the signal's being 1: at 4 about 70 % of the default N are found first, as the paper has it;
    the more, the more similarities lie near the right one's, and 1000 leaves no signal."""
    queries: int = 0
    """Images ranked, and texts ranked among these images; 0: all. A part takes more than its share, as all candidates
    are checked and rounded for it."""
    rival_queries: int = 1024
    """The same for float32 throughout and for faiss; 0: they are left out."""
    checked: int = 8
    """Queries and candidates whose ranks are compared with those of all their similarities in float64."""

    def __post_init__(self) -> None:
        if min(self.pairs, self.dim, self.checked) < 1 or not 0 <= self.queries <= self.pairs:
            raise UserError(
                f"retrieval.pairs={self.pairs}, dim={self.dim}, checked={self.checked}, queries={self.queries}: "
                "need at least 1, and no more queries than pairs"
            )
        if not 0 <= self.rival_queries <= self.pairs or self.noise < 0:
            raise UserError(f"retrieval.rival_queries={self.rival_queries}, noise={self.noise}: out of range")


def embeddings(config: RetrievalConfig) -> tuple[Tensor, Tensor]:
    """Images and texts, (N, D) float32, in the memory of the two."""
    generator = torch.Generator().manual_seed(0)
    texts, images = (torch.randn(config.pairs, config.dim, generator=generator) for _ in range(2))
    for rows in (texts, images):
        rows /= rows.norm(dim=1, keepdim=True)
    images.mul_(config.noise).add_(texts)
    images /= images.norm(dim=1, keepdim=True)
    return images.to(DEVICE), texts.to(DEVICE)


def brute_force(query: Tensor, candidates: Tensor, own: int) -> int:
    """How many of (n, D) score higher than candidate `own` does, in float64."""
    scores = torch.cat([part.double() @ query.double() for part in candidates.split(1 << 16)])
    return int((scores > scores[own] + retrieval.TIE_TOLERANCE).sum())


def measure_retrieval(config: RetrievalConfig) -> list[dict[str, Any]]:
    """A row for each contender. Raises AssertionError where a rank isn't brute force's."""
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
        start, busy = time.perf_counter(), _cpu_seconds()
        extra, found = peak_extra_bytes(lambda run=run, num=num: run(num))  # type: ignore[misc]
        seconds, busy = time.perf_counter() - start, _cpu_seconds() - busy
        _check(config, found, images[:num], texts)
        # One pass over the similarities serves both ways.
        flops = 2 * num * config.pairs * config.dim
        rows.append(
            dict(
                operator="retrieval",
                case=f"{config.pairs}-{config.dim}-noise-{config.noise:g}",
                contender=name,
                error=0.0,
                steps=exact_ranks.steps(images.device) if name == "ours" else None,
                num_checked=len(found) * min(config.checked, num),
                queries=num,
                seconds=seconds,
                cpu_seconds=busy,
                whole_seconds=seconds * config.pairs / num,
                flops=flops,
                extra_bytes=extra,
                held_bytes=2 * images.numel() * images.element_size(),
                recall_at_1=[ranks.recall(1) for ranks in found],
                median_rank=[float(ranks.expected().median()) for ranks in found] if len(found) == 2 else None,
                **matmul_rate(torch.float32),
            )
        )
    return rows


def _check(config: RetrievalConfig, found: list[retrieval.Ranks], queries: Tensor, candidates: Tensor) -> None:
    step = max(1, len(queries) // config.checked)
    for i in range(step // 2, len(queries), step)[: config.checked]:
        for ranks, row, others in zip(found, (queries[i], candidates[i]), (candidates, queries), strict=False):
            better = brute_force(row, others, i)
            # faiss shows ten: what stands behind them stands behind all.
            shown = better if len(found) == 2 or better < max(retrieval.RECALL_AT) else len(others) - 1
            assert int(ranks.num_better[i]) == shown, f"rank of {i} is {int(ranks.num_better[i])}, should be {shown}"


def _faiss(queries: Tensor, candidates: Tensor) -> list[retrieval.Ranks]:
    num, one = len(queries), torch.ones(len(queries), dtype=torch.int64)
    right = (
        faiss_index.nearest(queries, candidates, "faiss_flat", max(retrieval.RECALL_AT)) == torch.arange(num)[:, None]
    )
    place = torch.where(right.any(1), right.int().argmax(1), len(candidates) - 1)
    return [retrieval.Ranks(place, one, one, one, len(candidates))]


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def show_retrieval(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    table = Table(
        title=f"{first['case']}: {first['held_bytes'] / 1e9:.1f} GB of embeddings; float32 matmul "
        f"{first['matmul_flops_per_second'] / 1e12:.2f} TFLOP/s",
        title_justify="left",
    )
    for heading in ("contender", "queries", "s", "CPU s", "s for all", "TFLOP/s", "extra GB", "R@1", "checked"):
        table.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["contender"],
            f"{row['queries']:,}",
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['whole_seconds']:,.0f}",
            f"{row['flops'] / row['seconds'] / 1e12:.2f}",
            "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e9:.2f}",
            " ".join(f"{recall:.1%}" for recall in row["recall_at_1"]),
            str(row["num_checked"]),
        )
    (Console() if os.isatty(1) else Console(width=120)).print(table)

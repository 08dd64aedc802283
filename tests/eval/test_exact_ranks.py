"""Exact counts from low-precision products: every step equals float64, and no error exceeds its bound."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from colours import unit_rows
from torch import Tensor

from bclip_fast.eval import exact_ranks, retrieval
from bclip_fast.ops import ranking

TOLERANCE = retrieval.TIE_TOLERANCE
needs_amx = pytest.mark.skipif(not ranking.has_matrix_unit(), reason="no matrix unit (AMX) here")


STEPS = [
    pytest.param(("bfloat16", "float64"), marks=needs_amx),
    pytest.param(("bfloat16x3", "float64"), marks=needs_amx),
    pytest.param(("bfloat16", "bfloat16x3", "float64"), marks=needs_amx),
    ("float32", "float64"),
    ("float64",),
]


def brute_force(queries: Tensor, candidates: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    scores = queries.double() @ candidates.double().T
    return tuple(  # type: ignore[return-value]
        torch.stack([(scores > bound + TOLERANCE).sum(dim), (scores >= bound - TOLERANCE).sum(dim)])
        for bound, dim in ((rows[:, None], 1), (columns[None], 0))
    )


def related(num: int, dim: int, noise: float) -> tuple[Tensor, Tensor]:
    texts = unit_rows(num, dim, 1)
    return F.normalize(texts + noise * unit_rows(num, dim, 2), dim=1), texts


def close(num: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return rows whose scores differ by at most 1e-5, which bfloat16 cannot resolve, or not at all."""
    middle, texts = unit_rows(1, dim, 3), unit_rows(num, dim, 4)
    rows = F.normalize(middle + 3e-3 * texts, dim=1)
    rows[::7] = rows[0]
    return rows, rows.flip(0).roll(3, 0).contiguous()


DATA = {
    "related": related(400, 96, 1.0),
    "weakly related": related(400, 96, 6.0),
    "unrelated": (unit_rows(515, 33, 5), unit_rows(515, 33, 6)),
    "close": close(600, 64),
    "one point": (unit_rows(1, 40, 7).expand(300, 40), unit_rows(1, 40, 7).expand(300, 40)),
    "few numbers": (torch.eye(16)[torch.arange(320) % 16], torch.eye(16)[torch.arange(320) // 20]),
    "one pair": (unit_rows(1, 1, 8), unit_rows(1, 1, 9)),
}


@pytest.mark.parametrize("allowed", STEPS)
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("chunks", [(8192, 131072), (97, 130)])
def test_count_every_step_equals_float64(name: str, allowed: tuple[str, ...], chunks: tuple[int, int]) -> None:
    queries, candidates = DATA[name]
    bounds = (queries.double() * candidates.double()).sum(1)
    counts = exact_ranks.count(
        queries,
        candidates,
        bounds,
        bounds,
        TOLERANCE,
        allowed=allowed,
        query_chunk=chunks[0],
        candidate_chunk=chunks[1],
    )
    for actual, expected in zip(counts, brute_force(queries, candidates, bounds, bounds), strict=True):
        assert torch.equal(actual, expected)


def test_count_undecided_tile_skips_the_step_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    screen = exact_ranks._screen
    monkeypatch.setattr(exact_ranks, "_screen", lambda *args: tried.append(1) or screen(*args))
    queries, candidates = DATA["one point"]
    bounds = torch.ones(300, dtype=torch.float64)
    counts = exact_ranks.count(
        queries, candidates, bounds, bounds, TOLERANCE, allowed=("float32", "float64"), query_chunk=100
    )
    # Only the first of three tiles tries float32.
    assert len(tried) == 1
    assert counts[0][1].tolist() == [300] * 300
    assert not counts[0][0].any()


@pytest.mark.parametrize("step", [*(pytest.param(name, marks=needs_amx) for name in exact_ranks.STEPS[:2]), "float32"])
@pytest.mark.parametrize("name", ["related", "unrelated", "close", "few numbers"])
def test_error_bound_covers_every_product(name: str, step: str) -> None:
    left, right = exact_ranks.Chunk(DATA[name][0], True), exact_ranks.Chunk(DATA[name][1], False)
    bound = exact_ranks.error_bound(left.low_precision(step), right.low_precision(step))
    # The hardware multiplies these numbers and also rounds the sums. The bound covers both errors.
    computed = left.low_precision(step).numbers.double() @ right.low_precision(step).numbers.double().T
    error = float((computed - left.rows.double() @ right.rows.double().T).abs().max())
    assert error <= bound <= {"bfloat16": 9e-3, "bfloat16x3": 2e-4, "float32": 5e-5}[step]


@needs_amx
def test_screen_lists_pairs_between_the_bounds() -> None:
    """Compare with the definition on odd sizes. The numbers are small integers, so every sum is exact."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randint(-4, 5, (size, 70), generator=generator).bfloat16() for size in (1061, 777))
    scores = left.double() @ right.double().T
    bounds = []
    for size in (1061, 777):
        low = torch.randint(0, 100, (size,), generator=generator).float()
        bounds.append((low, low + torch.randint(0, 9, (size,), generator=generator)))
    counts = torch.zeros(1061, dtype=torch.int64), torch.ones(777, dtype=torch.int64)
    pairs = ranking.screen(left, right, bounds[0], bounds[1], *counts, 1061 * 777)
    assert pairs is not None
    flags = torch.zeros(1061, 777, dtype=torch.int64)
    flags.view(-1)[pairs >> 2] = pairs & 3
    assert len(pairs) == len(pairs.unique()) == int((flags > 0).sum())
    row = (scores >= bounds[0][0][:, None]) & (scores <= bounds[0][1][:, None])
    column = (scores >= bounds[1][0]) & (scores <= bounds[1][1])
    assert torch.equal(flags, row.long() + 2 * column.long())
    assert torch.equal(counts[0], (scores > bounds[0][1][:, None]).sum(1))
    assert torch.equal(counts[1], 1 + (scores > bounds[1][1]).sum(0))
    assert ranking.screen(left, right, bounds[0], bounds[1], *counts, len(pairs) - 1) is None


def test_dot_products_equal_float64() -> None:
    pytest.importorskip("bclip_fast._cpu")
    for width in (1, 15, 16, 33, 512):
        left, right = unit_rows(9, width, 1), unit_rows(5, width, 2)
        pairs = torch.tensor([44, 0, 7, 7, 31])
        expected = (left.double() @ right.double().T).view(-1)[pairs]
        assert torch.allclose(ranking.dot_products(left, right, pairs), expected, rtol=0, atol=1e-15)
    assert len(ranking.dot_products(left, right, torch.empty(0, dtype=torch.int64))) == 0
    with pytest.raises(ValueError, match="pairs must lie in"):
        ranking.dot_products(left, right, torch.tensor([45]))


@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (128, 128), (257, 300), (1024, 1), (1, 32640)])
def test_count_true_equals_sum(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.9
    for dim in (0, 1):
        assert torch.equal(exact_ranks.count_true(mask, dim), mask.sum(dim))
    assert torch.equal(
        exact_ranks.count_true(torch.ones(shape, dtype=torch.bool), 1), torch.full((shape[0],), shape[1])
    )

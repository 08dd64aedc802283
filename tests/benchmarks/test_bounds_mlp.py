"""The bounds of an MLP with GELU and of FP8, and their tables in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from bclip_fast.benchmarks.bounds import mlp
from bclip_fast.benchmarks.bounds.rates import GPUS

ROOT = Path(__file__).parents[2]
H100 = GPUS["h100"]


def test_tables_of_the_pages_are_those_of_the_bounds():
    page = "".join((ROOT / "docs" / name).read_text() for name in ("operators.md", "float8.md"))
    for table in mlp.tables().split("\n\n"):
        assert table in page
    # By hand: 2 * 50432 * 768 * 3072 FLOP at 989.4 TFLOP/s, then 4 bytes of 50432 * 3072 elements at 3.35 TB/s.
    bound = mlp.linear_gelu(50432, 768, 3072, H100)["product, then GELU"]
    assert bound.forward == pytest.approx(240.5e-6 + 185.0e-6, rel=0.01)

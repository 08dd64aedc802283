"""Data sets of coloured squares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from colours import write_class_folders, write_shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """20 pairs of four colours in split `val`. The first five have a label of kind `half`."""

    def meta(i: int, name: str) -> dict[str, Any]:
        return {"colour": name, "licence": "CC0", "size": 16} | ({"half": "dark"} if i < 5 else {})

    return write_shards(tmp_path / "shards", 20, lambda i, name: f"a {name} square" + "!" * (i // 8), meta)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One red and one blue image in split `train`, three of each in split `test`."""
    return write_class_folders(tmp_path / "folder", {"train": 1, "test": 3})

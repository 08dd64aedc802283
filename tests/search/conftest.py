"""An index of coloured squares, and its searcher."""

from __future__ import annotations

from pathlib import Path

import pytest
from colours import colour_model, write_shards

from bclip_fast.search.index import EmbedConfig, embed
from bclip_fast.search.searcher import OpenConfig, Searcher


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """40 pairs. Their metadata hold valid and malicious links. The first caption holds a script."""
    metas = [
        {"licence": "CC BY", "licence_url": "https://creativecommons.org/licenses/by/4.0/", "pmcid": "PMC123"},
        {"licence": "CC0", "licence_url": "javascript:alert(1)", "doi": "10.1234/a b"},
        {"licence": "CC0", "licence_url": "", "doi": '10.1234/a"><b>'},
        {"licence": "", "pmcid": "PMC1/../../evil"},
    ]

    def caption(i: int, name: str) -> str:
        return f"a {name} square" if i else "<script>alert(1)</script> a red square"

    return write_shards(tmp_path / "shards", 40, caption, lambda i, name: metas[i % 4])


@pytest.fixture
def index(shards: Path, tmp_path: Path) -> Path:
    return embed(
        EmbedConfig(model="colours", data=str(shards), out=str(tmp_path / "index"), progress=False), colour_model()
    )


@pytest.fixture
def searcher(index: Path) -> Searcher:
    return Searcher(OpenConfig(folder=str(index)), colour_model())

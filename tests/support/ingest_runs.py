"""Builds of datasets from articles, in this process and in others."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from articles import manifest_rows, reject_rows

from bclip_fast.data.shards.verify import verify
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig

ROOT = Path(__file__).parents[2]
# Environment of a process that imports this checkout's package.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run_build(articles: Path, out: Path, **options: Any) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Build a dataset with train as its only split. Return captions by key, and (figure, file, reason) of rejects.

    The captions are sorted by the number of the article, then by figure and graphic.
    """
    options = {"workers": 1, "val_fraction": 0.0, "test_fraction": 0.0, **options}
    build(IngestConfig(str(articles), out, **options))
    assert verify(out) == []
    rows = sorted(manifest_rows(out).values(), key=_article_order)
    return {row["key"]: row["caption"] for row in rows}, [row[1:] for row in reject_rows(out)]


def _article_order(row: dict[str, Any]) -> tuple[list[int], int, str]:
    numbers = re.findall(r"\d+", row["key"].split("_", 1)[0])
    return [int(number) for number in numbers][:1], row["figure_number"], row["key"]


_BUILD_SCRIPT = """
import sys
from pathlib import Path
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
if __name__ == "__main__":
    build(IngestConfig(sys.argv[1], Path(sys.argv[2]), workers=int(sys.argv[3]), engine=sys.argv[4],
          test_fraction=0.2, max_shard_megabytes=1, panels=True))
"""


def build_command(folder: Path, source: Path, out: Path, workers: int = 2, engine: str = "local") -> list[str]:
    """Write a script into `folder`. Return the command that builds `out` with it."""
    script = folder / "build_dataset.py"
    script.write_text(_BUILD_SCRIPT)
    return [sys.executable, str(script), str(source), str(out), str(workers), engine]

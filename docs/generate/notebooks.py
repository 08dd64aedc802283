"""Jupyter notebooks of the tutorials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import cells
from .results import ROOT

TUTORIALS = ROOT / "docs/tutorials"
# The notebook that the repository holds. The site has one for each tutorial.
EXAMPLE = ROOT / "examples/zero_shot.ipynb"


def write() -> list[Path]:
    """Write the notebook of examples/ from its tutorial."""
    EXAMPLE.write_text(notebook(TUTORIALS / f"{EXAMPLE.stem}.py"), encoding="utf-8")
    return [EXAMPLE]


def notebook(tutorial: Path) -> str:
    """Return a tutorial as a notebook (nbformat 4.5) with the expected outputs."""
    content = {
        "cells": [_cell(number, cell) for number, cell in enumerate(cells.read(tutorial))],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, cell: cells.Cell) -> dict[str, Any]:
    text = cell.text.strip("\n")
    common: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
    if cell.kind == "markdown":
        return {"cell_type": "markdown", **common, "source": text.splitlines(keepends=True)}
    if cell.kind == "bash":
        text = f"%%bash\n{text}"
    outputs = []
    if cell.output is not None:
        outputs = [{"name": "stdout", "output_type": "stream", "text": cell.output.splitlines(keepends=True)}]
    source = text.splitlines(keepends=True)
    return {"cell_type": "code", "execution_count": None, **common, "outputs": outputs, "source": source}

"""Cells of tutorials (.py files in percent format) and of Markdown files: prose, Python, commands, and their output.

A tutorial has the cells `# %% [markdown]`, `# %%` (Python) and `# %% [bash]` (commands in comments). A Markdown file
has blocks that begin with ```python or ```bash. In both, a block ```text behind a cell is the output of that cell. Its
`...` stands for any text. The tests run the cells and compare the output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Kind = Literal["markdown", "python", "bash"]
_MARKER = re.compile(r"(?m)^# %%(?: \[(\w+)\])?\n")
_OUTPUT = re.compile(r"\A\s*```text\n(.*?)\n?```\n?", re.DOTALL)
_BLOCK = re.compile(r"(?m)^```(python|bash)\n(.*?)^```\n", re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """A piece of a tutorial.

    line: line of the file where `text` starts. output: expected output, or None for a cell that prints nothing.
    """

    kind: Kind
    text: str
    line: int
    output: str | None = None


def read(path: Path) -> list[Cell]:
    """Return the cells of a tutorial or of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    return list(_with_outputs(_of_markdown(text) if path.suffix == ".md" else _of_tutorial(text)))


def _of_tutorial(text: str) -> Iterator[Cell]:
    matches = list(_MARKER.finditer(text))
    ends = [match.start() for match in matches[1:]] + [len(text)]
    for match, end in zip(matches, ends, strict=True):
        kind = match[1] or "python"
        assert kind in ("markdown", "python", "bash"), f"cells of the kind {kind} are unknown"
        body = text[match.end() : end].strip("\n") + "\n"
        if kind != "python":
            body = re.sub(r"(?m)^# ?", "", body)
        yield Cell(kind, body, text.count("\n", 0, match.end()) + 1)  # type: ignore[arg-type]


def _of_markdown(text: str) -> Iterator[Cell]:
    position = 0
    for match in _BLOCK.finditer(text):
        yield Cell("markdown", text[position : match.start()], text.count("\n", 0, position) + 1)
        yield Cell(match[1], match[2], text.count("\n", 0, match.start(2)) + 1)  # type: ignore[arg-type]
        position = match.end()
    yield Cell("markdown", text[position:], text.count("\n", 0, position) + 1)


def _with_outputs(cells: Iterator[Cell]) -> Iterator[Cell]:
    """Move each output from the beginning of a Markdown cell to the cell before it."""
    before: Cell | None = None
    for cell in cells:
        match = _OUTPUT.match(cell.text) if cell.kind == "markdown" else None
        if before and match:
            before = replace(before, output=match[1] + "\n")
            cell = replace(cell, text=cell.text[match.end() :], line=cell.line + cell.text.count("\n", 0, match.end()))
        if before:
            yield before
        before = cell
    if before:
        yield before


def markdown(cells: list[Cell]) -> str:
    """Return the page of a tutorial."""
    parts = []
    for cell in cells:
        parts.append(cell.text.strip("\n") if cell.kind == "markdown" else f"```{cell.kind}\n{cell.text.rstrip()}\n```")
        if cell.output is not None:
            parts.append(f"```text\n{cell.output.rstrip()}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"

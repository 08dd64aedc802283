"""The tasks: one small file each, `NAME.toml` here or anywhere, with data, protocol, metric and published figures.

    title, protocol ("retrieval", "zero_shot", "probe" or "vqa")
    dataset      how to read the data: see `datasets.READERS`; auto tells by what lies there
    folder       where under --data they may lie, beside --data itself
    split, label, multi_label, metric (the figure published), num_samples (of the published test set), where, about
    [prompts]    as in a prompt file
    [[published]] model, figure, value in per cent, source: shown beside ours, marked as published, never as measured

The protocols' own names are tasks too, for data of one's own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import read_toml
from ...errors import UserError
from ..prompts import PromptSet, read_prompts

FOLDER = Path(__file__).parent
PROTOCOLS = ("retrieval", "zero_shot", "probe", "vqa")
_REQUIRED = {"title": str, "protocol": str}


@dataclass(frozen=True)
class Published:
    """A figure that someone printed; `value` in per cent."""

    model: str
    figure: str
    value: float
    source: str


@dataclass(frozen=True)
class Task:
    """See the file format above; empty fields are left to the caller's settings."""

    name: str
    title: str
    protocol: str
    dataset: str = "auto"
    folder: str = ""
    split: str = ""
    label: str = ""
    multi_label: bool = False
    metric: str = ""
    num_samples: int = 0
    where: str = ""
    about: str = ""
    prompts: PromptSet | None = None
    published: tuple[Published, ...] = ()

    def place(self, data: str) -> str:
        """Where the task's data lie: `data`/folder if it is there, else `data` itself."""
        inner = Path(data) / self.folder
        return str(inner) if self.folder and inner.is_dir() else data


def names() -> list[str]:
    """Every task of the package, protocols first."""
    return [*PROTOCOLS, *sorted(path.stem for path in FOLDER.glob("*.toml"))]


def load(name: str) -> Task:
    """A protocol's name, a task of the package, or the path of a .toml file.

    Raises:
        UserError: unknown, unreadable, or with a key that is missing, unknown or of the wrong type.
    """
    if name in PROTOCOLS:
        return Task(name, name.replace("_", " "), name)
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not name.endswith(".toml") and name not in names():
        raise UserError(f"unknown task {name!r}: use {', '.join(names())} or the path of a TOML file")
    table = read_toml(path, "task file")
    if table.get("protocol") not in PROTOCOLS:
        raise UserError(
            f"task file {path}: protocol is {table.get('protocol')!r}, must be one of {', '.join(PROTOCOLS)}"
        )
    prompts = read_prompts(table.pop("prompts"), f"task file {path}") if "prompts" in table else None
    rows = table.pop("published", [])
    kinds: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(Task)} | _REQUIRED
    for key, value in table.items():
        if key not in kinds or key == "name" or type(value) is not kinds[key]:
            raise UserError(f"task file {path}: key {key!r} is unknown or of the wrong type")
    try:
        published = tuple(Published(**row) for row in rows)
        return Task(name=path.stem, prompts=prompts, published=published, **table)
    except TypeError as error:
        raise UserError(f"task file {path}: {error}") from error

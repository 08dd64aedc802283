"""The tasks: one file `NAME.toml` each, here or anywhere, with data, protocol, metric and published scores.

    title, protocol (one of `protocols.PROTOCOLS`)
    dataset      reader of the data: one of `datasets.READERS`; auto: depends on the files
    folder       subfolder of --data with the data, if it exists
    file         name of the file in the folder, for readers that take one of several
    split, label, multi_label
    metric       name of the published metric; num_samples: size of the published test set
    where        address of the public data; about: remarks for the report
    download     name of the data in `downloads`, for bclip eval fetch
    row, domain  name of the row and its domain in the benchmark, for suites
    [prompts]    as in a prompt file
    [[published]] model, figure (name of the metric), value in per cent, source

The report shows published scores next to ours and marks them as published. The names of the protocols are tasks too,
for users' data.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bclip_fast.config import read_toml
from bclip_fast.data.sources import Source
from bclip_fast.errors import UserError, choices
from bclip_fast.eval.prompts import PromptSet, read_prompts

FOLDER = Path(__file__).parent
_REQUIRED = {"title": str, "protocol": str}
# Keys of a task file whose field has another name.
_FIELDS = {"where": "download_url", "about": "description"}


@dataclass(frozen=True)
class PublishedScore:
    """A score from a publication.

    metric: name of the metric. value: the score in per cent.
    """

    model: str
    metric: str
    value: float
    source: str

    @staticmethod
    def from_table(table: dict[str, Any]) -> PublishedScore:
        """Read an entry of `[[published]]`. Raises KeyError or TypeError for a wrong set of keys."""
        if unknown := table.keys() - {"model", "figure", "value", "source"}:
            raise TypeError(unknown)
        return PublishedScore(table["model"], table["figure"], table["value"], table["source"])

    def as_json(self) -> dict[str, Any]:
        """Return the entry as it is in results.json."""
        return {"model": self.model, "figure": self.metric, "value": self.value, "source": self.source}


@dataclass(frozen=True)
class Task:
    """A task, as the file format above describes it. The caller's settings replace empty fields."""

    name: str
    title: str
    protocol: str
    dataset: str = "auto"
    folder: str = ""
    file: str = ""
    split: str = ""
    label: str = ""
    multi_label: bool = False
    metric: str = ""
    num_samples: int = 0
    download_url: str = ""
    description: str = ""
    download: str = ""
    row: str = ""
    domain: str = ""
    prompts: PromptSet | None = None
    published: tuple[PublishedScore, ...] = ()

    def resolve_data_dir(self, data: str | tuple[Source, ...]) -> str | tuple[Source, ...]:
        """Return the path of the task's data: `data`/folder if that folder exists, else `data`."""
        if isinstance(data, tuple):
            return data
        subfolder = Path(data) / self.folder
        return str(subfolder) if self.folder and subfolder.is_dir() else data


def protocols() -> tuple[str, ...]:
    """Return the names of the protocols."""
    from bclip_fast.eval.protocols import PROTOCOLS  # its module imports this one

    return tuple(PROTOCOLS)


def names() -> list[str]:
    """Return the names of the protocols and of the package's tasks."""
    return [*protocols(), *sorted(path.stem for path in FOLDER.glob("*.toml"))]


def load(name: str) -> Task:
    """Load a task by the name of a protocol, the name of a task of the package, or the path of a .toml file.

    Raises:
        UserError: an unknown name, an unreadable file, or a key that is missing, unknown or of the wrong type.
    """
    if name in protocols():
        return Task(name, name.replace("_", " "), name)
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not name.endswith(".toml") and name not in names():
        raise UserError(f"unknown task {name!r}{choices(name, [*protocols(), *names()])}")
    table = read_toml(path, "task file")
    if table.get("protocol") not in protocols():
        raise UserError(
            f"task file {path}: protocol is {table.get('protocol')!r}, must be one of {', '.join(protocols())}"
        )
    if "title" not in table:
        raise UserError(f"task file {path}: key 'title' is missing")
    prompts = read_prompts(table.pop("prompts"), f"task file {path}") if "prompts" in table else None
    rows = table.pop("published", [])
    types: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(Task)} | _REQUIRED
    types |= {key: types.pop(field) for key, field in _FIELDS.items()}
    for key, value in table.items():
        if key not in types or key == "name" or type(value) is not types[key]:
            raise UserError(f"task file {path}: key {key!r} is unknown or of the wrong type")
    try:
        published = tuple(PublishedScore.from_table(row) for row in rows)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"task file {path}: each [[published]] needs the keys model, figure, value and source, and no others"
        ) from error
    fields = {_FIELDS.get(key, key): value for key, value in table.items()}
    return Task(name=path.stem, prompts=prompts, published=published, **fields)

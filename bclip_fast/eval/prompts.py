"""The words of zero-shot classification, as data: what a class is called, and the sentences it is put into."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import read_toml
from ..errors import UserError

_TASKS = Path(__file__).parent / "tasks"
_SAMPLE_IMAGES = Path(__file__).parent / "prompt_sets" / "sample_images.toml"
GENERIC_TEMPLATES = (
    "{}",
    "a photo of {}",
    "this is an image of {}",
    "{} presented in image",
    "a medical image showing {}",
)
"""For label sets without templates of their own; the middle three are those of the paper."""


@dataclass(frozen=True)
class PromptSet:
    """Class names, the nouns that stand for each in a prompt, and the templates, each with one `{}` for the noun."""

    classes: Mapping[str, tuple[str, ...]]
    templates: tuple[str, ...] = GENERIC_TEMPLATES
    source: str = ""

    def __post_init__(self) -> None:
        if not self.templates:
            raise UserError(f"prompt set {self.source or '(unnamed)'} has no template")
        for template in self.templates:
            if template.count("{}") != 1:
                raise UserError(f"prompt template {template!r} must hold {{}} exactly once, for the class's noun")
        for name, nouns in self.classes.items():
            if not nouns:
                raise UserError(f"prompt set {self.source or '(unnamed)'}: class {name!r} has no noun")

    def prompts(self, name: str) -> list[str]:
        """Every template filled with every noun of class `name`."""
        # str.format would interpret braces within a noun.
        return [template.replace("{}", noun) for noun in self.classes[name] for template in self.templates]


def named(name: str) -> PromptSet:
    """The prompts of the package's task `name`, or of a TOML file: `templates = [...]` and a table `[classes]`."""
    known = sorted(path.stem for path in _TASKS.glob("*.toml") if "prompts" in _read(path))
    if name in known:
        return read_prompts(_read(_TASKS / f"{name}.toml")["prompts"], name)
    if not name.endswith(".toml"):
        raise UserError(f"unknown prompt set {name!r}: use one of {', '.join(known)} or the path of a TOML file")
    table = _read(Path(name))
    return read_prompts(table.get("prompts", table), f"prompt file {name}", Path(name).name)


@functools.cache
def sample_sets() -> Mapping[str, PromptSet]:
    """The prompts for each label kind of the demonstration data."""
    return {
        kind: read_prompts(table, f"prompt file {_SAMPLE_IMAGES}, table [{kind}]")
        for kind, table in _read(_SAMPLE_IMAGES).items()
    }


def _read(path: Path) -> dict[str, Any]:
    return read_toml(path, "prompt file")


def read_prompts(table: Any, where: str, source: str = "") -> PromptSet:
    """A `PromptSet` from a table of TOML: `classes`, and optionally `templates` and `source`."""
    classes = table.get("classes") if isinstance(table, dict) else None
    if not isinstance(classes, dict) or not classes or set(table) - {"classes", "templates", "source"}:
        raise UserError(f"{where} must hold a table [classes] and optionally a list `templates`, no other key")
    return PromptSet(
        {key: _strings(value, f"{where}: class {key!r}") for key, value in classes.items()},
        _strings(table.get("templates", list(GENERIC_TEMPLATES)), f"{where}: templates"),
        str(table.get("source", source)),
    )


def from_values(values: Sequence[str], source: str = "the label's own values, generic templates") -> PromptSet:
    """Each label value stands for itself, underscores read as spaces."""
    return PromptSet({value: (value.replace("_", " "),) for value in values}, source=source)


def _strings(value: object, where: str) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise UserError(f"{where} must be a string or a list of strings, not {value!r}")
    return tuple(strings)

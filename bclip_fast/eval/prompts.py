"""The prompts of zero-shot classification, as data: nouns for each class, and templates to put them into."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bclip_fast.config import read_toml
from bclip_fast.errors import UserError, choices

_TASKS = Path(__file__).parent / "tasks"
_KEYS = {"classes", "templates", "negative_templates", "source"}
_SAMPLE_IMAGES = Path(__file__).parent / "prompt_sets" / "sample_images.toml"
GENERIC_TEMPLATES = (
    "{}",
    "a photo of {}",
    "this is an image of {}",
    "{} presented in image",
    "a medical image showing {}",
)
"""Templates for prompt sets without templates. The middle three are the paper's."""


@dataclass(frozen=True)
class PromptSet:
    """Classes with their nouns, and templates with one `{}` for the noun.

    classes: class name -> nouns. source: origin of the words, for reports. negative_templates: templates of the texts
    that deny a class, for protocols that compare both texts. embeddings: learned class embeddings (C, D), unit norm,
    which take the place of the texts.
    """

    classes: Mapping[str, tuple[str, ...]]
    templates: tuple[str, ...] = GENERIC_TEMPLATES
    source: str = ""
    negative_templates: tuple[str, ...] = ()
    embeddings: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check templates and nouns. Raises UserError."""
        if not self.templates:
            raise UserError(f"prompt set {self.source or '(unnamed)'} has no template")
        for template in (*self.templates, *self.negative_templates):
            if template.count("{}") != 1:
                raise UserError(f"prompt template {template!r} must hold {{}} exactly once, for the class's noun")
        for name, nouns in self.classes.items():
            if not nouns or not all(noun.strip() for noun in nouns):
                raise UserError(f"prompt set {self.source or '(unnamed)'}: class {name!r} has no noun, or an empty one")

    def prompts(self, name: str) -> list[str]:
        """Return every template filled with every noun of class `name`."""
        # str.format would interpret braces within a noun.
        return [template.replace("{}", noun) for noun in self.classes[name] for template in self.templates]


def named(name: str) -> PromptSet:
    """Return the prompts of the package's task `name`, or of a TOML file with `templates` and a table `[classes]`."""
    available = sorted(path.stem for path in _TASKS.glob("*.toml") if "prompts" in _read(path))
    if name in available:
        return read_prompts(_read(_TASKS / f"{name}.toml")["prompts"], name)
    if not name.endswith(".toml"):
        raise UserError(f"unknown prompt set {name!r}{choices(name, available)}")
    table = _read(Path(name))
    return read_prompts(table.get("prompts", table), f"prompt file {name}", Path(name).name)


@functools.cache
def sample_sets() -> Mapping[str, PromptSet]:
    """Return the prompts of the demonstration data, by label kind."""
    return {
        kind: read_prompts(table, f"prompt file {_SAMPLE_IMAGES}, table [{kind}]")
        for kind, table in _read(_SAMPLE_IMAGES).items()
    }


def _read(path: Path) -> dict[str, Any]:
    return read_toml(path, "prompt file")


def read_prompts(table: Any, subject: str, source: str = "") -> PromptSet:
    """Build a `PromptSet` from a TOML table with `classes`, and optionally the other fields of a `PromptSet`.

    subject: name of the table, for error messages.
    """
    classes = table.get("classes") if isinstance(table, dict) else None
    if not isinstance(classes, dict) or not classes or set(table) - _KEYS:
        raise UserError(
            f"{subject} must hold a table [classes] and optionally the lists `templates` and `negative_templates`, no "
            "other key"
        )
    return PromptSet(
        {key: _strings(value, f"{subject}: class {key!r}") for key, value in classes.items()},
        _strings(table.get("templates", list(GENERIC_TEMPLATES)), f"{subject}: templates"),
        str(table.get("source", source)),
        _strings(table.get("negative_templates", []), f"{subject}: negative_templates"),
    )


def as_json(prompt_set: PromptSet) -> dict[str, Any]:
    """Return a prompt set as it is in results.json."""
    return {
        "source": prompt_set.source,
        **({} if prompt_set.embeddings is None else {"learned": True}),
        "templates": list(prompt_set.templates),
        **({"negative_templates": list(prompt_set.negative_templates)} if prompt_set.negative_templates else {}),
        "classes": {name: list(nouns) for name, nouns in prompt_set.classes.items()},
    }


def from_values(values: Sequence[str], source: str = "the label's own values, generic templates") -> PromptSet:
    """Build a `PromptSet` in which each label value is its class's noun. Underscores become spaces."""
    return PromptSet({value: (value.replace("_", " "),) for value in values}, source=source)


def _strings(value: object, subject: str) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise UserError(f"{subject} must be a string or a list of strings, not {value!r}")
    return tuple(strings)

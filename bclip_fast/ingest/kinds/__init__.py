"""The kinds of figures: taxonomy, prompts and a classifier without a model. `kinds.toml` has all texts."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from importlib.resources import files

from bclip_fast.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Kind:
    """A kind of figure. `names` complete the zero-shot templates, and `keywords` are words of captions."""

    name: str
    title: str
    definition: str
    medical: bool
    names: tuple[str, ...]
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Taxonomy:
    """All kinds, and the templates of the zero-shot prompts, in which {} is one of a kind's names."""

    kinds: tuple[Kind, ...]
    templates: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The names of the kinds, in the order of the file."""
        return [kind.name for kind in self.kinds]

    def prompts(self) -> list[list[str]]:
        """Return the zero-shot prompts of each kind."""
        return [
            [template.replace("{}", name) for template in self.templates for name in kind.names] for kind in self.kinds
        ]


def read_taxonomy(text: str, source: str) -> Taxonomy:
    """Return the taxonomy in a TOML text. Raises UserError, which names `source`."""
    try:
        values = tomllib.loads(text)
        templates = tuple(map(str, values.pop("templates")))
        kinds = tuple(
            Kind(
                name,
                str(table.get("title", name)),
                str(table.get("definition", "")),
                bool(table.get("medical", False)),
                tuple(map(str, table["names"])),
                tuple(map(str, table.get("keywords", ()))),
            )
            for name, table in values.items()
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{source} is not a file of kinds: {error!r}; it needs templates, and a table with names for each kind"
        ) from None
    if len(kinds) < 2 or not templates or any("{}" not in template for template in templates):
        raise UserError(f"{source} needs at least two kinds, and templates that contain {{}}")
    if empty := [kind.name for kind in kinds if not (kind.name and kind.names and all(kind.names))]:
        raise UserError(f"{source}: the kind {empty[0]!r} has no names, or an empty one")
    return Taxonomy(kinds, templates)


@functools.cache
def taxonomy() -> Taxonomy:
    """Return the taxonomy of the package."""
    return read_taxonomy((files(__package__) / "kinds.toml").read_text(encoding="utf-8"), "kinds.toml")

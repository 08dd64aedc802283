"""The package's source as griffe reads it: functions and classes with docstrings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import griffe

from .results import ROOT


@cache
def package() -> griffe.Module:
    """Return the package, with `benchmarks` as its module, as the wheel installs it."""
    loader = griffe.GriffeLoader(search_paths=[str(ROOT)])
    module = loader.load("bclip_fast")
    module["benchmarks"] = loader.load("benchmarks")
    assert isinstance(module, griffe.Module)
    return module


def member(reference: str) -> Any:
    """Return the object that `module:Class` or a dotted path names, behind all aliases."""
    path = reference.replace(":", ".").removeprefix("bclip_fast.")
    found: Any = package()
    for name in path.split("."):
        found = _target(found[name])
    return found


def _target(item: Any) -> Any:
    """Follow an import to the definition."""
    while item.is_alias:
        item = member(item.target_path)
    return item


def dataclass_fields(configuration: griffe.Class) -> dict[str, griffe.Attribute]:
    """Return the annotated attributes of a dataclass and of its bases."""
    found: dict[str, griffe.Attribute] = {}
    for base in reversed([configuration, *bases(configuration)]):
        found |= {
            name: attribute
            for name, attribute in base.members.items()
            if isinstance(attribute, griffe.Attribute) and attribute.annotation and "property" not in attribute.labels
        }
    return found


def bases(configuration: griffe.Class) -> Iterator[griffe.Class]:
    """Yield the base classes that the package defines, nearest first."""
    for base in configuration.bases:
        found = resolve(str(base), configuration)
        if isinstance(found, griffe.Class):
            yield found
            yield from bases(found)


def resolve(name: str, scope: Any) -> Any:
    """Return the package's object that a name means in the module of `scope`, or None."""
    module, *rest = name.split(".")
    try:
        found = _target(scope.module[module])
        for part in rest:
            found = _target(found[part])
    except (KeyError, griffe.AliasResolutionError):
        return None
    return found


def type_of(written: str, attribute: griffe.Attribute) -> str:
    """Return a field's type as a user reads it: without tyro's markers, and aliases written out."""
    while match := re.fullmatch(r"(?:tyro\.conf\.\w+|Annotated)\[(.*)\]", written, re.DOTALL):
        written = match[1]
        if ", tyro" in written:
            written = written.partition(", tyro")[0]
    alias = resolve(written, attribute.parent) if re.fullmatch(r"[\w.]+", written) else None
    if isinstance(alias, griffe.Attribute) and alias.value is not None:
        return type_of(str(alias.value), alias)
    literal = re.fullmatch(r"Literal\[(.*)\]", written, re.DOTALL)
    return literal[1].replace("'", "").replace(", ", " | ") if literal else written


def default_of(attribute: griffe.Attribute) -> str:
    """Return a default as the source writes it, or the value of a constant. Empty: the field is required."""
    if attribute.value is None:
        return ""
    written = str(attribute.value)
    factory = re.fullmatch(r"field\(default_factory=lambda: (.*)\)", written, re.DOTALL)
    constant = resolve(written, attribute.parent) if re.fullmatch(r"[A-Z_]+", written) else None
    if isinstance(constant, griffe.Attribute) and constant.value is not None:
        return str(constant.value)
    return factory[1] if factory else written


def unit(name: str, meaning: str) -> str:
    """Return the unit of a field, from the end of its name or the beginning of its meaning, or ""."""
    ends = {
        "_s": "s", "_mib": "MiB", "_gib": "GiB", "_megabytes": "MiB", "_bytes": "bytes", "_steps": "steps",
        "_pixels": "pixels", "_size_px": "pixels", "epochs": "epochs", "_fraction": "share",
    }  # fmt: skip
    last = name.rpartition(".")[2]
    for end, written in ends.items():
        if last.endswith(end):
            return written
    for words, written in {"in pixels": "pixels", "MiB": "MiB", "GiB": "GiB"}.items():
        if words in meaning.partition(". ")[0]:
            return written
    match = re.match(r"(?:Number of (\w+)|(Pairs|Samples|Images|Seconds|Steps|Tokens|Threads)\b)", meaning)
    return (match[1] or match[2]).lower() if match else ""

"""The package's source as griffe reads it: commands, configuration fields, functions and classes with docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import griffe

from .results import ROOT


@dataclass(frozen=True)
class Command:
    """A command of `bclip`, as the table in cli.py names it."""

    name: str
    summary: str
    config: str
    extra: str


@dataclass(frozen=True)
class Field:
    """A field of a configuration.

    name: with the sections before it, such as `optim.lr`. default: as the source writes it. section: the class of the
    section that contains it.
    """

    name: str
    type: str
    default: str
    meaning: str
    is_positional: bool
    section: griffe.Class


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


def commands() -> list[Command]:
    """Return the commands in the order of cli.py."""
    tree = ast.parse((ROOT / "bclip_fast/cli.py").read_text(encoding="utf-8"))
    (table,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "COMMANDS"
    ]
    assert isinstance(table, ast.Dict)
    found = []
    for key, call in zip(table.keys, table.values, strict=True):
        assert isinstance(call, ast.Call)
        words = [ast.literal_eval(argument) for argument in call.args]
        found.append(Command(ast.literal_eval(key), words[0], words[1], words[3]))  # type: ignore[arg-type]
    return found


def fields(configuration: griffe.Class, prefix: str = "", values: dict[str, str] | None = None) -> Iterator[Field]:
    """Yield the fields of a configuration, the inherited ones first, then those of its sections.

    values: defaults that replace those of the class, by field.
    """
    sections = []
    for name, attribute in dataclass_fields(configuration).items():
        if "init=False" in str(attribute.value):
            continue
        section = section_of(attribute)
        if section is not None:
            sections.append((f"{prefix}{name}.", section, _arguments(str(attribute.value))))
            continue
        yield Field(
            f"{prefix}{name}",
            type_of(str(attribute.annotation), attribute),
            (values or {}).get(name) or default_of(attribute),
            attribute.docstring.value if attribute.docstring else "",
            "Positional[" in str(attribute.annotation),
            configuration,
        )
    for start, section, arguments in sections:
        yield from fields(section, start, arguments)


def _arguments(default: str) -> dict[str, str]:
    """Return the arguments of `field(default_factory=lambda: Section(...))`."""
    calls = [node for node in ast.walk(ast.parse(default, mode="eval")) if isinstance(node, ast.Lambda)]
    keywords = calls[0].body.keywords if calls and isinstance(calls[0].body, ast.Call) else []
    return {keyword.arg: ast.unparse(keyword.value) for keyword in keywords if keyword.arg}


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


def section_of(attribute: griffe.Attribute) -> griffe.Class | None:
    """Return the dataclass that is the type of a field, or None for a plain value."""
    found = resolve(str(attribute.annotation), attribute.parent)
    return found if isinstance(found, griffe.Class) and found.has_labels("dataclass") else None


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

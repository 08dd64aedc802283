"""The fields of a command's configuration, read from the source. Nothing is imported, so help takes no time."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Field:
    """A field of a configuration.

    Attributes:
        name: the name with its sections, such as `optim.lr`.
        type: the type as a user reads it, such as `int` or `native | dali`.
        default: the default as the source writes it. Empty if the field is required.
        meaning: the docstring.
        flags: the flags on the command line. Empty for a positional argument.
        choices: the values of a Literal.
    """

    name: str
    type: str
    default: str
    meaning: str
    flags: tuple[str, ...]
    choices: tuple[str, ...]

    @property
    def section(self) -> str:
        """The name of the section that contains the field. Empty for a field of the command itself."""
        return self.name.rpartition(".")[0]


def fields(reference: str) -> list[Field]:
    """Return the fields of the dataclass "module:Class" and of its sections, the command's own fields first."""
    return list(_fields(_find(reference), "", {}))


def about(reference: str) -> str:
    """Return the docstring of the dataclass "module:Class"."""
    return _docstring(_find(reference).node.body)


def sections(reference: str) -> dict[str, str]:
    """Return the docstrings of the sections of a dataclass by their names, such as `optim` or `data.read`."""
    return dict(_sections(_find(reference), ""))


def module_about(reference: str) -> str:
    """Return the docstring of the module of "module:Class"."""
    return _docstring(_find(reference).module.tree.body)


@dataclass(frozen=True)
class _Module:
    name: str
    tree: ast.Module
    is_package: bool


@dataclass(frozen=True)
class _Class:
    module: _Module
    node: ast.ClassDef


@cache
def _module(name: str) -> _Module | None:
    """Read a module of the package. None for a module of another package."""
    root, *rest = name.split(".")
    if root != "bclip_fast":
        return None
    folder = Path(__file__).parent
    if rest[:1] == ["benchmarks"] and not (folder / "benchmarks").is_dir():  # in a clone, beside the package
        folder = folder.parent
    path = folder.joinpath(*rest)
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            tree = ast.parse(candidate.read_text(encoding="utf-8"))
            return _Module(name, tree, candidate.name == "__init__.py")
    return None


def _find(reference: str) -> _Class:
    module, _, name = reference.partition(":")
    found = _lookup(_module(module), name)
    if not isinstance(found, _Class):
        raise LookupError(f"{reference} is not a class")
    return found


def _lookup(module: _Module | None, name: str) -> _Class | ast.expr | None:
    """Return the class or the value that `name` has in a module. It follows imports within the package."""
    if module is None or not name.isidentifier():
        return None
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _Class(module, node)
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == name for target in node.targets):
            return node.value
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == name:
            return node.value
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _lookup(_module(_imported_from(module, node)), alias.name)
    return None


def _imported_from(module: _Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def _own_fields(found: _Class) -> dict[str, tuple[_Module, ast.AnnAssign, str]]:
    """Return the annotated fields of a class and its bases: the module, the statement and the docstring of each."""
    own: dict[str, tuple[_Module, ast.AnnAssign, str]] = {}
    for base in found.node.bases:
        parent = _lookup(found.module, ast.unparse(base))
        if isinstance(parent, _Class):
            own |= _own_fields(parent)
    body = found.node.body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if "ClassVar" in ast.unparse(node.annotation) or "init=False" in ast.unparse(node.value or node.target):
                continue
            own[node.target.id] = found.module, node, _docstring([after] if after else [])
    return own


def _docstring(body: list[ast.stmt]) -> str:
    """Return the docstring with which a body begins, without its indentation."""
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return inspect.cleandoc(first.value.value)
    return ""


def _fields(found: _Class, prefix: str, values: dict[str, str]) -> Iterator[Field]:
    """Yield the plain fields, then those of the sections. `values`: defaults in place of those of the class."""
    nested = []
    for name, (module, node, meaning) in _own_fields(found).items():
        section = _lookup(module, ast.unparse(node.annotation))
        if isinstance(section, _Class) and _is_dataclass(section):
            nested.append((f"{prefix}{name}.", section, _arguments(node.value)))
            continue
        kind, choices = _type(module, node.annotation)
        default = values.get(name) or _default(module, node.value)
        yield Field(f"{prefix}{name}", kind, default, meaning, _flags(f"{prefix}{name}", node.annotation), choices)
    for start, section, arguments in nested:
        yield from _fields(section, start, arguments)


def _sections(found: _Class, prefix: str) -> Iterator[tuple[str, str]]:
    for name, (module, node, meaning) in _own_fields(found).items():
        section = _lookup(module, ast.unparse(node.annotation))
        if isinstance(section, _Class) and _is_dataclass(section):
            yield f"{prefix}{name}", meaning or _docstring(section.node.body)
            yield from _sections(section, f"{prefix}{name}.")


def _is_dataclass(found: _Class) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in found.node.decorator_list)


def _arguments(value: ast.expr | None) -> dict[str, str]:
    """Return the arguments of the default `field(default_factory=lambda: Section(...))`."""
    calls = [node for node in ast.walk(value) if isinstance(node, ast.Lambda)] if value else []
    keywords = calls[0].body.keywords if calls and isinstance(calls[0].body, ast.Call) else []
    return {keyword.arg: ast.unparse(keyword.value) for keyword in keywords if keyword.arg}


def _flags(name: str, annotation: ast.expr) -> tuple[str, ...]:
    written = ast.unparse(annotation)
    if "Positional[" in written:
        return ()
    aliases = re.search(r"aliases=[\[(]([^\])]*)[\])]", written)
    short = re.findall(r"'([^']+)'", aliases[1]) if aliases else []
    return (*short, f"--{name}")


def _type(module: _Module, annotation: ast.expr) -> tuple[str, tuple[str, ...]]:
    """Return a type as a user reads it, without tyro's markers, and the choices of a Literal."""
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value)
        inner = annotation.slice.elts[0] if isinstance(annotation.slice, ast.Tuple) else annotation.slice
        if outer == "Annotated" or outer.startswith("tyro.conf"):
            return _type(module, inner)
        if outer == "Literal":
            elements = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            choices = tuple(str(ast.literal_eval(element)) for element in elements)
            return " | ".join(choices), choices
    if isinstance(annotation, ast.Name):
        alias = _lookup(module, annotation.id)
        if isinstance(alias, ast.Subscript):
            return _type(module, alias)
    return ast.unparse(annotation), ()


def _default(module: _Module, value: ast.expr | None) -> str:
    """Return a default as a user writes it: without `field(...)`, and with the value of a constant."""
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        factory = {keyword.arg: keyword.value for keyword in value.keywords}.get("default_factory")
        if isinstance(factory, ast.Lambda):
            return ast.unparse(factory.body)
        return {"dict": "{}", "list": "[]", "tuple": "()"}.get(ast.unparse(factory) if factory else "", "")
    if isinstance(value, ast.Name):
        constant = _lookup(module, value.id)
        if isinstance(constant, ast.expr):
            return ast.unparse(constant)
    return ast.unparse(value)

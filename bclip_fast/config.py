"""Typed dataclasses filled from TOML files, left to right, then from command-line flags.

A TOML file is converted to flags, so that files and flags share one checker. An unknown key or a wrong type in a file
is an error that names the file. A file can't hold positional arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from bclip_fast.errors import UserError, choices, did_you_mean

T = TypeVar("T")

CONFIGS = Path(__file__).parent / "configs"


def parse(cls: type[T], args: Sequence[str], *, prog: str) -> T:
    """Fill dataclass `cls` from its defaults, the leading `*.toml` files in order, and the remaining flags.

    A file that doesn't exist as a path is looked up in the package's own `configs/`. The only positional argument of a
    command can also be written as a flag, such as `--model NAME`.

    Raises:
        UserError: a file that doesn't exist or isn't TOML, an unknown key, or a value of the wrong type.
        SystemExit: after `--help`.
    """
    args = _with_positional_first(cls, list(args))
    config: T | None = None
    while args and args[0].endswith(".toml"):
        path = find(args.pop(0))
        config = _parse(cls, list(_as_flags(read_toml(path))), config, prog, source=str(path), file=True)
    if config is not None and not args:
        return config
    return _parse(cls, args, config, prog, source="the command line")


def _with_positional_first(cls: type, args: list[str]) -> list[str]:
    """Replace the flag of a command's only positional argument by its value, in the first place."""
    names = [field.name for field in dataclasses.fields(cls) if "Positional[" in str(field.type)]
    if len(names) == 1:
        flag = f"--{names[0]}"
        for place, word in enumerate(args):
            if word == flag and place + 1 < len(args):
                return [args[place + 1], *args[:place], *args[place + 2 :]]
            if word.startswith(f"{flag}="):
                return [word.removeprefix(f"{flag}="), *args[:place], *args[place + 1 :]]
    return args


def from_toml(cls: type[T], path: Path | str) -> T:
    """Read a dataclass that `to_toml` wrote. Raises UserError as `parse` does."""
    return _parse(cls, list(_as_flags(read_toml(Path(path)))), None, str(path), source=str(path), file=True)


def to_toml(config: Any) -> str:
    """Return the resolved configuration as TOML, from which `from_toml` builds an equal dataclass. None is omitted."""
    import tomli_w

    return tomli_w.dumps(plain(config))


def find(name: str) -> Path:
    """Return the path of a TOML file, from the working folder or from the package's configurations."""
    for path in (Path(name), CONFIGS / name):
        if path.is_file():
            return path
    names = sorted(path.name for path in CONFIGS.glob("*.toml"))
    raise UserError(f"configuration file {name} does not exist{choices(name, names)}")


def read_toml(path: Path, kind: str = "configuration file") -> dict[str, Any]:
    """Return the table of a TOML file. Errors call the file a `kind`.

    Raises:
        UserError: the file can't be read or isn't TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{kind} {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{kind} {path} is not valid TOML: {error}") from error


def _as_flags(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _as_flags(value, f"{name}.")
        elif isinstance(value, list):
            yield f"--{name}"
            for item in value:
                # A table in a list is one word of JSON.
                yield from map(_text, item if isinstance(item, list) else [item])
        else:
            # In one token, a value that begins with a dash isn't mistaken for a flag.
            yield f"--{name}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value, default=str)
    return repr(value) if isinstance(value, float) else str(value)


def _parse(cls: type[T], args: list[str], default: T | None, prog: str, source: str, file: bool = False) -> T:
    import tyro

    stderr = io.StringIO()
    keywords: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                cls,
                args=args,
                prog=prog,
                # A file sets `resume = true` where a user types --resume.
                config=(tyro.conf.FlagConversionOff,) if file else (),
                use_underscores=True,
                **keywords,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        unknown = re.search(r"Unrecognized options:?\s+(--?[^\s=,]+)", _flat(stderr.getvalue()))
        if unknown:
            kind, word = ("key", unknown[1].lstrip("-")) if file else ("flag", unknown[1])
            names = [name if file else f"--{name}" for name in _names(cls)]
            raise UserError(f"{source}: unknown {kind} {word}{_similar(word, names, prog)}") from None
        # tyro gives the flags of booleans no value.
        stray = re.search(r"Unrecognized options:\s+(\S+)", _flat(stderr.getvalue()))
        flag = next((arg for arg in args if stray and arg.startswith("--") and arg.endswith(f"={stray[1]}")), "")
        if flag:
            section, dot, last = flag[2:].partition("=")[0].rpartition(".")
            forms = f"--{section}{dot}{last} or --{section}{dot}no_{last}"
            raise UserError(f"{source}: {flag} takes no value; write {forms}") from None
        message = _missing(cls, stderr.getvalue()) or _one_line(stderr.getvalue())
        raise UserError(f"{source}: {message} (see {prog} --help)") from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


# Unicode boxes, or dashes and bars where the stream has no such characters.
_BOX = re.compile(r"[\u2500-\u257f]+|-{4,}|(?<!\S)[|+](?!\S)")
_ANSI = re.compile("\x1b\\[[0-9;]*m")


def _flat(text: str) -> str:
    """Return tyro's boxed and coloured message without boxes and colours, in one line."""
    return " ".join(_BOX.sub(" ", _ANSI.sub("", text)).split())


# What tyro and Python call the mistakes that users make most.
_PHRASES = (
    (r"^(?:Value error )?Error parsing (--\S+): ", r"\1: "),
    (r"^(?:Value error )?Error parsing \w+: ", ""),
    (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number"),
    (r"could not convert string to float: (.*)", r"\1 is not a number"),
    (r"^Missing argument Missing value for argument '(--\S+)'\..*", r"\1 needs a value"),
    (r"^Unrecognized options Unrecognized options: ?(.*)", r"unknown argument '\1'; files come first, then flags"),
    (
        r"^Invalid choice invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*)\)\.",
        r"\2: \1 must be one of \3",
    ),
)


def _one_line(text: str) -> str:
    """Return tyro's message without the parts that only its boxes need."""
    message = re.split(" For full helptext| Argument helptext:", _flat(text))[0]
    for pattern, replacement in _PHRASES:
        message = re.sub(pattern, replacement, message)
    return message


def _missing(cls: Any, text: str) -> str:
    """Name the required arguments that tyro misses, as the help does. Empty for another message of tyro."""
    found = re.search(r"Required options? Missing from [^:]*: (.*)", _flat(text))
    if not found:
        return ""
    entries = [entry.strip() for entry in found[1].split("(required)")[:-1]]
    flags = [re.findall(r"--[\w.]+", entry)[0] for entry in entries if entry.startswith("-")]
    hints = get_type_hints(cls, include_extras=True)
    places = [
        field.name.upper()
        for field in dataclasses.fields(cls)
        if "Positional" in str(hints[field.name]) and field.default is dataclasses.MISSING
    ]
    # Arguments fill the places from left to right, so the last ones are missing.
    names = [*places[len(places) - (len(entries) - len(flags)) :], *flags]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"


def _names(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield the names of the fields of a dataclass and of its sections."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _names(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _similar(word: str, names: list[str], prog: str) -> str:
    """Name the fields like `word`: those that another section has by this name, else those that are spelled alike."""
    last = word.lstrip("-")
    same = [name for name in names if name.lstrip("-").rpartition(".")[2] == last]
    if same:
        return f"; did you mean {' or '.join(same[:3])}?"
    return did_you_mean(word, names) or f"; `{prog} --help` lists the flags"


def word(value: Any) -> str:
    """Return a plain value as one word of a shell's command line."""
    return shlex.quote(_text(value))


def plain(value: Any) -> Any:
    """Return a configuration as the tables, lists and values of its TOML file. None is omitted."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init)
        return {name: plain(item) for name, item in pairs if item is not None}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

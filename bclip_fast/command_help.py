"""The text of `bclip COMMAND --help [TOPIC]`, at most 80 columns wide."""

from __future__ import annotations

import re
import shutil
import textwrap

from . import command_fields
from .command_fields import Field
from .errors import UserError, did_you_mean

_SCREEN = 48
"""Lines of a screen. A longer list shows only the beginning of each description."""
_COLUMN = 26


def command_help(command: str, summary: str, config: str, topic: str = "") -> str:
    """Return the help of a command, or of one of its sections or flags.

    Args:
        summary: the purpose of the command.
        config: the configuration's class, "module:Class".
        topic: name of a section (`optim`) or a flag (`optim.lr`, with or without leading dashes), or `all`.

    Raises:
        UserError: the command has no such section or flag.
    """
    fields = command_fields.fields(config)
    sections = command_fields.sections(config)
    topic = topic.lstrip("-")
    if topic == "all":
        blocks = [usage(command, fields, sections), *_all(fields, sections)]
    elif topic in sections:
        chosen = [field for field in fields if field.section == topic]
        inner = {name: text for name, text in sections.items() if name.rpartition(".")[0] == topic}
        blocks = [f"{topic}: {sections[topic]}", _list(chosen, 4 + len(inner)), _list_of_sections(inner)]
        blocks.append(f"`bclip {command} --help FLAG` describes one flag.")
    elif topic:
        found = [field for field in fields if topic in _names(field)]
        if not found:
            names = [*sections, *(field.name for field in fields)]
            raise UserError(f"no section or flag is called {topic!r}{did_you_mean(topic, names)}")
        blocks = [_entry(found[0], full=True)]
    else:
        own = sorted((field for field in fields if not field.section), key=lambda field: bool(field.flags))
        outer = {name: text for name, text in sections.items() if "." not in name}
        blocks = [f"{summary[0].upper()}{summary[1:]}.", usage(command, fields, sections)]
        used = sum(block.count("\n") + 2 for block in blocks) + len(outer) + 6
        blocks += [_list(own, used), _list_of_sections(outer), _hints(command, bool(outer))]
    return "\n\n".join(_wrapped(block) for block in blocks if block)


def _names(field: Field) -> set[str]:
    return {field.name, *(flag.lstrip("-") for flag in field.flags)}


def usage(command: str, fields: list[Field], sections: dict[str, str]) -> str:
    """Return the usage of a command, folded."""
    words = ["bclip", command]
    if sections:
        words.append("[FILE.toml ...]")
    for field in fields:
        if not field.flags:
            word = field.name.upper()
            word = f"{word} ..." if field.type.startswith("tuple") else word
            words.append(f"[{word}]" if field.default else word)
        elif not field.default and field.type != "bool":
            words.append(f"{field.flags[0]} {_value(field)}")
    words.append("[FLAGS]")
    return textwrap.fill(f"usage: {' '.join(words)}", _width(), subsequent_indent=" " * 10, break_on_hyphens=False)


def _hints(command: str, has_sections: bool) -> str:
    lines = [f"`bclip {command} --help FLAG` describes one flag, and `--help all` everything."]
    if has_sections:
        lines.insert(0, f"`bclip {command} --help SECTION` lists a section's flags, such as --SECTION.NAME.")
    return "\n".join(lines)


def _all(fields: list[Field], sections: dict[str, str]) -> list[str]:
    blocks = ["\n".join(_entry(field, full=True) for field in fields if not field.section)]
    for name, text in sections.items():
        entries = [_entry(field, full=True) for field in fields if field.section == name]
        blocks.append("\n".join([f"{name}: {text}", *entries]))
    return blocks


def _list(fields: list[Field], used: int) -> str:
    """Describe flags at the length at which they fit on a screen that has `used` lines already."""
    texts = ["\n".join(_entry(field, full=full) for field in fields) for full in (True, False)]
    for text in texts:
        if text.count("\n") + 1 + used <= _SCREEN:
            return text
    return "\n".join(_line(field) for field in fields)


def _list_of_sections(sections: dict[str, str]) -> str:
    if not sections:
        return ""
    width = _width()
    rows = [_shortened(f"  {name:<{_COLUMN - 4}}  {_first_sentence(text)}", width) for name, text in sections.items()]
    return "\n".join(["Sections", *rows])


def _entry(field: Field, full: bool) -> str:
    """Return a flag with its description, in as many lines as it takes."""
    meaning = field.meaning if full else _first_sentence(field.meaning)
    text = f"{meaning} {_shown_default(field)}".strip()
    head, indent = f"  {_head(field)}", " " * _COLUMN
    gap = max(1, _COLUMN - len(head))
    filled = [
        textwrap.wrap(paragraph, _width() - _COLUMN, break_on_hyphens=False, break_long_words=False)
        for paragraph in _paragraphs(text)
    ]
    lines = [line for paragraph in filled for line in paragraph]
    if len(head) + 1 > _COLUMN:
        return "\n".join([_shortened(head, _width()), *(indent + line for line in lines)])
    return "\n".join([head + " " * gap + lines[0], *(indent + line for line in lines[1:])]) if lines else head


def _line(field: Field) -> str:
    """Return a flag and the beginning of its description in one line, which ends with the default if it is short."""
    head, default = f"  {_head(field)}", _shown_default(field)
    room = _width() - max(len(head), _COLUMN - 1) - 1
    meaning = _first_sentence(field.meaning)
    if len(meaning) + 1 + len(default) <= room:
        meaning = f"{meaning} {default}".strip()
    return _shortened(f"{head:<{_COLUMN - 1}} {meaning}", _width())


def _head(field: Field) -> str:
    if not field.flags:
        return field.name.upper()
    value = _value(field)
    return ", ".join(field.flags) + (f" {value}" if value else "")


def _value(field: Field) -> str:
    """Return what follows a flag: nothing, the choices or the type."""
    if field.type == "bool":
        return ""
    if field.choices and len(" | ".join(field.choices)) <= 24:
        return "|".join(field.choices)
    kind = field.type.removesuffix(" | None")
    known = {"int": "INT", "float": "NUMBER", "str": "TEXT", "Path": "PATH"}
    if kind in known:
        return known[kind]
    if field.choices:
        return "NAME"
    return "VALUE ..." if "tuple" in kind or "list" in kind else "VALUE"


def _shown_default(field: Field) -> str:
    """Return the choices, if the value does not name them, and the default."""
    parts = []
    if field.choices and len(" | ".join(field.choices)) > 24:
        parts.append(f"One of {', '.join(field.choices)}.")
    if field.type == "bool":
        name = field.name.rpartition(".")
        off = f"--{name[0]}{name[1]}no_{name[2]}"
        parts.append(f"(on; {off} turns it off)" if field.default == "True" else "")
    elif field.default not in ("", "None", "''", '""', "()", "{}", "[]"):
        parts.append(f"(default: {field.default.strip(chr(39))})")
    elif not field.default and field.flags:
        parts.append("(required)")
    return " ".join(filter(None, parts))


def _paragraphs(text: str) -> list[str]:
    """Join the lines of each paragraph. Items of a list keep their lines."""
    joined: list[str] = []
    for line in text.splitlines():
        if joined and joined[-1] and line and not re.match(r"[-*] |\w+: ", line):
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    return [line for line in joined if line]


def _first_sentence(text: str) -> str:
    flat = " ".join(text.split())
    match = re.match(r".*?(?<!e\.g)(?<!i\.e)\.(?= [A-Z(`0-9]|$)", flat)
    return match[0] if match else flat


def _shortened(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    return text[: width - 3].rpartition(" ")[0].rstrip(" ,;:") + " ..."


def _wrapped(block: str) -> str:
    """Fold the lines of a block that are too long, such as the description of a section."""
    width = _width()
    lines = []
    for line in block.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return "\n".join(lines)


def _width() -> int:
    return max(40, min(80, shutil.get_terminal_size((80, 24)).columns))

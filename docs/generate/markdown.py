"""Markdown from docstrings, and the checks and changes of links between pages."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from urllib.parse import urlsplit

_HEADING = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\s*$")
_ENTRY = re.compile(r"^ {4}([\w*][\w.*, ]*): +(.*)$")
_TITLES = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Raises": "Raises",
    "Yields": "Yields",
}
_LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
# `https://...` and a bare `https://` stand for any URL.
_URL = re.compile(r"https?://(?!\.\.\.)[^\s)>\]\"'`|,]+")


def from_docstring(text: str) -> str:
    """Return a docstring as Markdown. Entries of Args, Raises and the like become lists, and tables become code."""
    text = "\n\n".join(map(_indented_table, text.split("\n\n")))
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        if match := _HEADING.match(line):
            section = match[1]
            lines += ["", f"**{_TITLES[section]}**", ""]
        elif not section or (line and not line.startswith(" ")):
            section = ""
            lines.append(line)
        elif (match := _ENTRY.match(line)) and section != "Returns":
            lines.append(f"- `{match[1]}`: {match[2]}")
        else:
            # Continue an entry, or the text of Returns.
            lines.append(f"  {line.strip()}" if section != "Returns" else line[4:])
    return "\n".join(lines).strip("\n") + "\n"


def _indented_table(paragraph: str) -> str:
    """Indent a paragraph whose lines have columns, so that Markdown keeps the lines."""
    is_table = re.search(r"(?m)^\S.*\S {3,}\S", paragraph) and not _HEADING.match(paragraph.partition("\n")[0])
    return re.sub(r"(?m)^", "    ", paragraph) if is_table else paragraph


def directive(name: str, argument: str, body: str, level: int = 0) -> str:
    """Return a MyST directive. level: number of directives inside it, which need a shorter fence."""
    fence = ":" * (3 + level)
    return f"{fence}{{{name}}} {argument}\n{body.strip()}\n{fence}\n"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def with_links(text: str, page: str, place: Callable[[str], str]) -> str:
    """Return a page with other targets of its relative links.

    Args:
        page: path of the page in the site.
        place: function from a link's target (without its anchor) to a path in the site.
    """

    def replace(match: re.Match[str]) -> str:
        target, separator, anchor = match[1].partition("#")
        if not target or ":" in target:
            return match[0]
        return f"]({os.path.relpath(place(target), os.path.dirname(page) or '.')}{separator}{anchor})"

    return _LINK.sub(replace, text)


def bad_urls(text: str) -> list[str]:
    """Return the external links that can't be right: a host without a dot, or characters that need an escape."""
    bad = []
    for url in _URL.findall(text):
        parts = urlsplit(url.rstrip(".,;:"))
        host = parts.hostname or ""
        is_local = host in ("localhost", "127.0.0.1")
        if not is_local and (not re.fullmatch(r"[\w-]+(\.[\w-]+)+", host) or re.search(r"[{}\\^]", url)):
            bad.append(url)
    return bad

"""List the turns of phrase that docs/style.md forbids, in docstrings, comments, messages and Markdown; never fail."""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import random
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

MAX_WORDS = 25
_ARCHAIC = ["but for", "save for", "told", "beforehand", "likewise", "anew", "afresh", "besides", "level with", "lest"]
_ARCHAIC += ["whatever", "wherever", "dearest", "for ever", "till", r"of (?:one's|its|their|our) own", "the same of"]
RULES = {
    "archaic": rf"\b(?:{'|'.join(_ARCHAIC)})\b",
    "alone": r"(?<!stand-)\balone\b",
    "is no": r"\b(?:is|are|was|were) (?:no(?! (?:longer|more than|less than))|none|nothing but)\b",
    "have not": r"\bwhich [^.;,]*\b(?:have|has|had) not\b",
    "opening": r"^(?:\w+: )?(?:What|Which|Of|Where|Whose|of|what|whose)\b(?!.*\?$)",
    "noun clause": r"\b(?:as|beyond|by|for|from|in|into|of|on|than|to|with) what\b|\bwhat (?:are|is|it|they|was)\b",
    "passive": r"\b(?:is|are|was|were|been) (?:said|given|found|wanted|meant|asked for)\b",
    "picture": r"\bpictures?\b",
    "glue": r"(?:\S+ ){4}(?<=; )\S+(?: \S+){3}",
}
_RULES = {name: re.compile(rule) for name, rule in RULES.items()}
_END = re.compile(r"(?<!\bal\.)(?<!e\.g\.)(?<!i\.e\.)(?<!\bcf\.)(?<=[.!?])\s+(?=[A-Z0-9`*\"'(])")
_PARAGRAPH = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*+>] |\||#|\d+\. ))|\n(?=\s*\w[\w, *-]{0,60}: )|\s\|\s")
_CODE = re.compile(r"``[^`]+``|`[^`]+`|https?://\S+|\]\([^)]*\)|(?<![\w*])\*[^*\s][^*]*\*(?!\w)")
_INDENTED = re.compile(r"(?:^|\n)\n( {4,}.*\n?)+")
_FENCED = re.compile(r"^```.*?^```|^(?: {4}|\t).*?$|^<.*?>$", re.DOTALL | re.MULTILINE)
# Cells of a tutorial (docs/tutorials) that aren't prose, and the marks of the lines that are.
_CODE_CELL = re.compile(r"(?ms)^# %%(?! \[markdown\]).*?(?=^# %%|\Z)")
_HASH_COMMENTS = {".toml", ".sbatch", ".yml", ".yaml", ""}  # "": a Makefile
_PRAGMA = re.compile(r"namespace \w|type: ignore|noqa|fmt: |clang-format ")
_CPP = re.compile(r'//[^\n]*(?:\n[ \t]*//[^\n]*)*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"(?:\s*"(?:[^"\\\n]|\\.)*")*', re.DOTALL)


class Sentence(NamedTuple):
    """A sentence and its place. is_message: it is the string of a message."""

    path: Path
    line: int
    text: str
    is_message: bool = False

    def problems(self) -> list[str]:
        """Return the names of the broken rules. A semicolon is allowed in a message, where the remedy follows it."""
        text = _CODE.sub("x", self.text)
        names = [
            name for name, rule in _RULES.items() if rule.search(text) and not (self.is_message and name == "glue")
        ]
        return names + ["long"] * (len(re.findall(r"[A-Za-z]\S*", text)) > MAX_WORDS)


class Text(NamedTuple):
    """A piece of prose and the line where it starts."""

    line: int
    text: str
    is_message: bool = False


def python_texts(source: str, with_messages: bool) -> Iterator[Text]:
    """Yield docstrings, comments and, on request, the strings that read like messages."""
    docstrings, parts = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.add(node.value)
            yield Text(node.lineno, _hide(_INDENTED, inspect.cleandoc(node.value.value)))
        elif isinstance(node, ast.JoinedStr):
            parts.update(node.values)
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values)
            if with_messages:
                yield from _message(node.lineno, text)
        elif with_messages and isinstance(node, ast.Constant) and node not in docstrings and node not in parts:
            yield from _message(node.lineno, str(node.value))
    comment, start, last = "", 0, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield Text(start, comment)
                comment, start = "", token.start[0]
            comment, last = comment + token.string.lstrip("#! ") + "\n", token.start[0]
    yield Text(start, comment)


def _hide(code: re.Pattern[str], text: str) -> str:
    """Replace code blocks by as many blank lines, so that the lines after them keep their numbers."""
    return code.sub(lambda match: "\n" * match[0].count("\n"), text)


def _message(line: int, text: str) -> Iterator[Text]:
    if "\n" not in text and len(re.findall(r"\b[a-z]+ ", text)) >= 3:
        yield Text(line, text, is_message=True)


def texts(path: Path) -> Iterator[Text]:
    """Yield every piece of prose in a file."""
    source = path.read_text(encoding="utf-8")
    if source.startswith("# %%"):
        lines = re.sub(r"(?m)^# %%.*$|^# ?", "", _hide(_CODE_CELL, source))
        yield Text(1, _hide(_FENCED, lines))
    elif path.suffix == ".py":
        yield from python_texts(source, with_messages=path.parts[0] != "tests")
    elif path.suffix == ".md":
        yield Text(1, _hide(_FENCED, source))
    elif path.suffix in _HASH_COMMENTS:
        for match in re.finditer(r"(?m)(?:^[ \t]*#.*\n?)+", source):
            yield Text(source.count("\n", 0, match.start()) + 1, re.sub(r"(?m)^[ \t]*#+!? ?", "", match[0]))
    else:
        for match in _CPP.finditer(source):
            text = re.sub(r'"\s*"', "", match[0]).strip('"') if match[0][0] == '"' else match[0]
            line = source.count("\n", 0, match.start()) + 1
            text = re.sub(r"(?m)^[ \t]*(?://+|/?\*+/?) ?|\*/", "", text)
            yield from _message(line, text) if match[0][0] == '"' else [Text(line, text)]


def sentences(path: Path) -> Iterator[Sentence]:
    """Yield the sentences of a file in their order. Fragments of fewer than three words do not count."""
    for start, text, is_message in sorted(texts(path)):
        position = 0
        for piece in _split(text):
            position = text.index(piece, position)
            line = start + text.count("\n", 0, position)
            words = re.sub(r"^(?:[-*+>|#]+|\d+\.) *", "", " ".join(piece.split())).strip("| ")
            if len(re.findall(r"(?<![\w<])[A-Za-z]{2,}(?![\w<(])", words)) >= 3 and not _PRAGMA.match(words):
                yield Sentence(path, line, words, is_message)


def _split(text: str) -> Iterable[str]:
    return (piece for block in _PARAGRAPH.split(text) for piece in _END.split(block) if piece and piece.strip())


def files(paths: list[Path]) -> list[Path]:
    """Return the files with prose below the paths, without hidden folders and build outputs."""
    suffixes = {".py", ".md", ".h", ".cpp", ".cu", ".cuh", *_HASH_COMMENTS} - {""}
    candidates = [path for root in paths for path in ([root] if root.is_file() else sorted(root.rglob("*")))]
    hidden = re.compile(r"(?:^|/)(?:\.\w|build/)")
    candidates = [path for path in candidates if not hidden.search(path.as_posix())]
    return [path for path in candidates if path.suffix in suffixes or path.name == "Makefile"]


def package(path: Path) -> str:
    """Return the name of the group that the summary counts a file in."""
    depth = 2 if path.parts[0] in ("bclip_fast", "csrc") else 1
    return "/".join(path.parts[:-1][:depth]) or "top level"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path(".")])
    parser.add_argument("--summary", action="store_true", help="print only the counts per package")
    parser.add_argument("--sample", type=int, default=0, help="print this many random sentences per package")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    by_package: dict[str, list[Sentence]] = defaultdict(list)
    for path in files(args.paths):
        by_package[package(path)] += sentences(path)
    counts = {}
    for name, every in sorted(by_package.items()):
        if args.sample:
            every = random.Random(args.seed).sample(every, min(args.sample, len(every)))
        flagged = [(sentence, sentence.problems()) for sentence in every]
        counts[name] = sum(bool(problems) for _, problems in flagged), len(every)
        for sentence, problems in [] if args.summary else flagged:
            if problems or args.sample:
                print(f"{sentence.path}:{sentence.line}: [{', '.join(problems) or 'ok'}] {sentence.text}")
    rows = [f"{name} {count}/{total}" for name, (count, total) in counts.items()]
    print(f"prose: {sum(count for count, _ in counts.values())} warnings (sentences flagged/all): {', '.join(rows)}")


if __name__ == "__main__":
    main()

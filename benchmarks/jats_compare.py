"""Captions of our parser beside two others on the same files: python -m bclip_fast.benchmarks.jats_compare DIR [N]

DIR is searched for `*.nxml` and `*.xml`. The other extractions are pubmed_parser (if it is installed, as
`pip install pubmed_parser`) and a plain one: the text of the first `caption` in each `fig`. The program prints the
classes of differences with their counts, and N examples of each (3 by default). A class is the relation of the two
texts and the properties of the figure that may explain it, so that a person reads a few figures of each class instead
of all of them.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
_XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
_NUM_EXAMPLES = 3
_MAX_EXAMPLE = 240

# Captions and first graphics of a file by the ids of the figures.
Captions = dict[str, tuple[str, str]]


@dataclass
class Differences:
    """The differences between our parser and another one.

    `examples`: (figure, our text, their text) of each class.
    """

    classes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str, str]]] = field(default_factory=lambda: defaultdict(list))
    num_equal: int = 0
    num_lost: int = 0


def our_captions(path: Path) -> Captions:
    """Return the captions of our parser. Figures that the rules exclude have none."""
    from bclip_fast.ingest import jats

    captions = {}
    for element in jats.split(path.read_bytes())[0]:
        for figure in jats.read_article(element).figures:
            graphic = figure.graphics[0].hrefs[0] if figure.graphics else ""
            captions[figure.id] = ("" if figure.excluded else figure.caption, graphic)
    return captions


def plain_captions(path: Path) -> Captions:
    """Return all text of the first `caption` of each figure, and its first graphic."""
    captions = {}
    for figure in _figures(path):
        caption = next((node for node in figure.iterchildren("{*}caption")), None)
        text = "" if caption is None else " ".join(" ".join(caption.itertext()).split())
        graphic = next((node.get(_XLINK_HREF) or "" for node in figure.iter("{*}graphic")), "")
        captions[figure.get("id") or ""] = (text, graphic)
    return captions


def pubmed_parser_captions(path: Path) -> Captions:
    """Return the captions of pubmed_parser. Raises any exception for a file that it cannot read."""
    from pubmed_parser import parse_pubmed_caption

    rows = parse_pubmed_caption(str(path)) or ()
    return {row["fig_id"]: (row["fig_caption"], row["graphic_ref"] or "") for row in rows}


def _figures(path: Path) -> Iterator[Any]:
    from bclip_fast.ingest import safe_xml

    yield from safe_xml.parse(path.read_bytes()).iter("{*}fig")


def compare(paths: list[Path], other: Callable[[Path], Captions], num_examples: int = _NUM_EXAMPLES) -> Differences:
    """Compare our captions with those of another extraction, figure by figure."""
    differences = Differences()
    for path in paths:
        try:
            ours = our_captions(path)
        except ValueError:
            continue
        try:
            theirs = other(path)
        except Exception:  # other parsers document no exceptions
            differences.num_lost += 1
            continue
        elements = {figure.get("id") or "": figure for figure in _figures(path)}
        for name in dict.fromkeys((*ours, *theirs)):
            our_text, their_text = ours.get(name, ("", ""))[0], theirs.get(name, ("", ""))[0]
            if (name in ours) != (name in theirs):
                kind = "figure only in ours" if name in ours else "figure only in theirs"
            else:
                kind = relation(our_text, their_text)
                if not kind and _stem(ours[name][1]) != _stem(theirs[name][1]):
                    kind = "another graphic"
                    our_text, their_text = ours[name][1], theirs[name][1]
            if not kind:
                differences.num_equal += 1
                continue
            kind += "".join(f", {each}" for each in _properties(elements.get(name)))
            differences.classes[kind] += 1
            if len(differences.examples[kind]) < num_examples:
                differences.examples[kind].append((f"{path.name}#{name}", our_text, their_text))
    return differences


def relation(ours: str, theirs: str) -> str:
    """Return how two texts differ, regardless of white space and invisible characters. Empty if they don't."""
    one, two = squeeze(ours), squeeze(theirs)
    if one == two:
        return "" if re.findall(r"\d+", ours) == re.findall(r"\d+", theirs) else "digits apart"
    if not one or not two:
        return "no caption in theirs" if one else "no caption in ours"
    if one in two or two in one:
        return "more text in theirs" if one in two else "more text in ours"
    changes = {code for code, *_ in SequenceMatcher(None, one, two, autojunk=False).get_opcodes()} - {"equal"}
    if changes == {"insert"}:
        return "more text inside theirs"
    return "more text inside ours" if changes == {"delete"} else "another text"


def squeeze(text: str) -> str:
    """Return the text in NFC without white space and invisible characters."""
    return "".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def _properties(figure: Any) -> list[str]:
    """Return the properties of a figure that may explain a difference."""
    if figure is None:
        return []

    def has(path: str) -> bool:
        return figure.find(path) is not None

    checks = {
        "references": any(node.get("ref-type") == "bibr" for node in figure.iter("{*}xref")),
        "formula": has(".//{*}math") or has(".//{*}tex-math"),
        "attached file": has(".//{*}supplementary-material") or has("{*}caption//{*}media"),
        "in a figure": next(figure.iterancestors("{*}fig"), None) is not None,
        "in a group": next(figure.iterancestors("{*}fig-group"), None) is not None,
        "holds figures": has(".//{*}fig"),
        "legends": has("{*}p"),
        "several captions": len(figure.findall("{*}caption")) > 1,
        "alternatives": has("{*}alternatives"),
    }
    return [name for name, holds in checks.items() if holds]


def _stem(name: str) -> str:
    return re.sub(r"\.(jpe?g|png|tiff?|gif|eps)$", "", name.rpartition("/")[2], flags=re.IGNORECASE)


def report(name: str, differences: Differences) -> Iterator[str]:
    """Yield lines about the comparison with one extraction."""
    num_different = differences.classes.total()
    yield f"{name}: {differences.num_equal} figures equal, {num_different} different, {differences.num_lost} files lost"
    for kind, count in differences.classes.most_common():
        yield f"  {count:6d}  {kind}"
        for figure, ours, theirs in differences.examples[kind]:
            yield f"          {figure}"
            yield f"            ours:   {ours[:_MAX_EXAMPLE]!r}"
            yield f"            theirs: {theirs[:_MAX_EXAMPLE]!r}"


def main(folder: Path, num_examples: int = _NUM_EXAMPLES) -> None:
    """Print the differences between our parser and the others on all articles below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".nxml", ".xml") and path.is_file())
    others = {"plain extraction": plain_captions}
    try:
        import pubmed_parser  # noqa: F401 -- only whether it is installed
    except ImportError:
        print("pubmed_parser is not installed")
    else:
        others["pubmed_parser"] = pubmed_parser_captions
    print(f"{len(paths)} files")
    for name, other in others.items():
        print("\n".join(report(name, compare(paths, other, num_examples))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:3]))

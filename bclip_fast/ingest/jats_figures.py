"""The figures of an article: which elements are figures, their captions, languages and images.

The rules:
- Every `fig` counts (in the body, a floats-group, sub-article, appendix or box), except inside supplementary material
  and table-wraps. A graphic outside `fig` and `fig-group` is not a figure: `loose_graphics` names it with the reason.
- A caption consists of the title and paragraphs of the figure's `caption`, then the paragraphs directly in the `fig`
  (legends of the panels). It excludes identifiers, credits, attached files, and paragraphs that contain only a DOI.
  If there are several `caption`s in a language, the first one that is not only for print counts.
- A group is a `fig-group`, or a `fig` without its own image that contains figures. A figure in a group has the caption
  of the group, then its own. A figure in a figure with an image (a figure supplement) has only its own.
  A graphic directly in a group is a figure of the group.
- A figure never takes the caption of another figure. A caption that only repeats the label, or is a placeholder
  ("Image", "No caption"), counts as missing.
- A caption in several languages gives the text in the language of its article or sub-article. If that is missing, it
  gives the English text, else the first one. If the language is not English, the English text follows, if there is one.
  A group whose figures are one image in different languages is one figure. Figures of one image in different languages,
  elsewhere in the article, are one figure too: the first one in the article's language.
- The mentions of a figure are the paragraphs and sentences that refer to it or its group (`mentions`).
- Each `graphic` of a figure is a separate image, and may add its own caption. The graphics in one `alternatives` are
  versions of one image. So are a graphic and its thumbnail, or a graphic for print and one for the screen.
  Graphics inside formulae and tables do not belong to the figure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from lxml import etree

from .jats_captions import ENGLISH, language_of, own_text, read_caption, stated_language
from .jats_graphics import Graphic, LooseGraphic, graphics_of, loose_graphics
from .jats_text import fold
from .licences import MAX_TEXT, read_licence, strictest
from .mentions import Mentions, find_mentions, merged_mentions

# Real articles stay far below these limits. Together, they bound the time and memory that one article takes.
MAX_FIGURES = 2000
MAX_CAPTION = 32_768
MAX_NAME = 256

_EXCLUDING = ("supplementary-material", "table-wrap")


class FiguresError(ValueError):
    """The article has too many figures."""


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        number: position in the document, from 1. It identifies the figure, because an id may repeat or be missing.
        licence: code or text of the figure's own licence. Empty: the article's licence applies.
        excluded: reason why the rules exclude the figure. Empty if they don't.
        mentions: the paragraphs and sentences that refer to the figure.
        language: language of the caption, as the XML states it, such as "pt". Empty: not stated, which means English.
        translation: "en" if the caption continues with an English version of itself, else empty.
        parts: (source, text) of each part of the caption.
    """

    number: int
    id: str
    label: str
    caption: str
    graphics: tuple[Graphic, ...]
    licence: str = ""
    excluded: str = ""
    mentions: Mentions = field(default_factory=Mentions)
    language: str = ""
    translation: str = ""
    parts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Group:
    """The values that a group passes on to its figures."""

    label: str = ""
    caption: str = ""
    mentions: Mentions = field(default_factory=Mentions)
    licence: str = ""


def find_figures(root: etree._Element) -> tuple[list[Figure], list[LooseGraphic]]:
    """Return the figures of an article in document order, and its other images.

    Raises FiguresError for more than MAX_FIGURES figures.
    """
    used: set[etree._Element] = set()
    figures = _merge_translations(list(_figures(root, used)), language_of(root) or ENGLISH)
    return figures, list(loose_graphics(root, used))


def _figures(root: etree._Element, used: set[etree._Element]) -> Iterator[Figure]:
    number = 0
    mentions = find_mentions(root)
    # A group comes before its figures. A figure with an image is not a group, so it passes nothing on.
    groups: dict[etree._Element, _Group] = {}
    merged: set[etree._Element] = set()
    for node in root.iter("fig", "fig-group"):
        if node in merged:
            continue
        group = groups.get(next(node.iterancestors("fig", "fig-group"), None), _Group())
        graphics = graphics_of(node, used)
        members = _languages_of_one_image(node, graphics)
        merged.update(members)
        for member in members:
            graphics = graphics or graphics_of(member, used)
            graphics_of(member, used)
        own = read_caption([node])
        caption = read_caption(members) if members else own
        parts = [("group", group.caption), ("own", own.text), *([("member", caption.text)] if members else [])]
        text = " ".join(part for _, part in parts if part)
        ids = [name for each in (node, *members) if (name := each.get("id"))]
        figure_mentions = merged_mentions((*(mentions[name] for name in ids if name in mentions), group.mentions))
        label = next(filter(None, (own_text(each.find("label")) for each in (node, *members))), "") or group.label
        licence = next(filter(None, map(_own_licence, (node, *members))), "") or group.licence
        is_group = not members and (node.tag == "fig-group" or (not graphics and node.find(".//fig") is not None))
        if is_group:
            # One character beyond the limit is enough to detect a caption that is too long.
            groups[node] = _Group(label, text[: MAX_CAPTION + 1], figure_mentions, licence)
            if not graphics:
                continue
        number += 1
        if number > MAX_FIGURES:
            raise FiguresError(f"more than {MAX_FIGURES} figures")
        excluded = next((f"inside {above.tag}" for above in node.iterancestors(*_EXCLUDING)), "")
        if len(text) > MAX_CAPTION:
            excluded = excluded or f"caption longer than {MAX_CAPTION} characters"
            text = ""
        yield Figure(
            number=number,
            id=next(iter(ids), "")[:MAX_NAME],
            label=label[:MAX_NAME],
            caption=text,
            graphics=graphics,
            licence=licence,
            excluded=excluded,
            mentions=figure_mentions,
            language=caption.language,
            translation=caption.translation,
            parts=tuple((source, part[:MAX_CAPTION]) for source, part in parts if part),
        )


def _languages_of_one_image(node: etree._Element, graphics: tuple[Graphic, ...]) -> list[etree._Element]:
    """Return the figures of a group if they are one image in different languages. Else return nothing."""
    members = node.findall("fig") if node.tag == "fig-group" else []
    languages = [stated_language(fig) or next(map(stated_language, fig.findall("caption")), "") for fig in members]
    if len(members) < 2 or not all(languages) or len(set(languages)) < len(languages):
        return []
    hrefs = [tuple(graphic.hrefs for graphic in graphics_of(fig, set())) for fig in members]
    images = {each for each in hrefs if each}
    return members if len(images) == (0 if graphics else 1) else []


def _merge_translations(figures: list[Figure], language: str) -> list[Figure]:
    """Exclude the figures that repeat the images of another figure in another language, as a translation does."""
    by_images: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for index, figure in enumerate(figures):
        if figure.graphics and figure.caption and not figure.excluded:
            by_images.setdefault(tuple(graphic.hrefs for graphic in figure.graphics), []).append(index)
    for indices in by_images.values():
        languages = [figures[index].language or ENGLISH for index in indices]
        if len(set(languages)) < 2:
            continue
        rank = {ENGLISH: 1, language: 0}
        chosen = min(indices, key=lambda index: rank.get(figures[index].language or ENGLISH, 2))
        kept = figures[chosen]
        for index, each in zip(indices, languages, strict=True):
            if each == (kept.language or ENGLISH):
                continue
            if each == ENGLISH and not kept.translation:
                kept = dataclasses.replace(kept, caption=f"{kept.caption} {figures[index].caption}", translation=each)
            reason = f"translation: the same image is figure {kept.number} of the article"
            figures[index] = dataclasses.replace(figures[index], excluded=reason)
        figures[chosen] = kept
    return figures


def _own_licence(node: etree._Element) -> str:
    """Return the code of a figure's or group's licence, else the text of its permissions (a third party's image)."""
    texts = [
        read_licence(permissions).code or fold(" ".join(permissions.itertext()))[:MAX_TEXT]
        for permissions in node.iter("permissions")
        if next(permissions.iterancestors("fig", "fig-group", *_EXCLUDING)) is node
    ]
    return strictest(texts)

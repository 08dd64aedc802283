"""The images of a figure, the versions of one image, and the images outside all figures.

`jats_figures` states the rules.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lxml import etree

from .jats_captions import read_caption
from .jats_text import local_name

_MAX_LOOSE = 2000
_MAX_NAME = 256
_XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
_FORMULAE = ("disp-formula", "inline-formula", "disp-formula-group", "tex-math")
_NOT_OF_FIGURE = ("disp-formula", "inline-formula", "table-wrap", "supplementary-material", "fig")
# Marks of the versions of one image, in `specific-use` and `content-type`.
_THUMBNAIL = re.compile(r"thumb|preview|\bicon\b", re.IGNORECASE)
_MEDIUM = re.compile(r"print|web|online|html|screen", re.IGNORECASE)
# Elements that say where a graphic outside the figures is.
_PLACES = ("table-wrap", "supplementary-material", "boxed-text", "abstract", "app", "bio", "front", "back", "body")


@dataclass(frozen=True)
class Graphic:
    """One image: the hrefs of its versions in the XML, and its own caption, which is usually empty.

    `thumbnails`: the hrefs that the XML marks as thumbnails.
    """

    hrefs: tuple[str, ...]
    caption: str = ""
    thumbnails: tuple[str, ...] = ()


@dataclass(frozen=True)
class LooseGraphic:
    """An image of the article that belongs to no figure. `reason`: where it is. `href`: the first href."""

    href: str
    reason: str


def graphics_of(figure: etree._Element, used: set[etree._Element]) -> tuple[Graphic, ...]:
    """Return the images of a figure, for a group those outside its figures. Add their elements to `used`."""
    images: list[tuple[Graphic, str]] = []
    walker = etree.iterwalk(figure, events=("start",))
    for _, node in walker:
        name = local_name(node)
        if node is figure:
            continue
        if name in (*_NOT_OF_FIGURE, "fig-group", "caption", "permissions", "alt-text", "long-desc"):
            walker.skip_subtree()
        elif name == "alternatives":
            walker.skip_subtree()
            versions = [child for child in node if _is_image(child) and _href(child)]
            if versions:
                used.update(versions)
                thumbnails = tuple(_href(child) for child in versions if _THUMBNAIL.search(_use(child)))
                caption = next((text for child in versions if (text := read_caption([child]).text)), "")
                images.append((Graphic(tuple(map(_href, versions)), caption, thumbnails), "alternatives"))
        elif _is_image(node) and (href := _href(node)):
            used.add(node)
            images.append((Graphic((href,), read_caption([node]).text), _use(node)))
    return _merge_versions(images)


def _merge_versions(images: list[tuple[Graphic, str]]) -> tuple[Graphic, ...]:
    """Merge graphics that the XML marks as versions of one image: a thumbnail, or one for print and one for screens."""
    thumbnails = [graphic for graphic, use in images if _THUMBNAIL.search(use)]
    others = [(graphic, use) for graphic, use in images if not _THUMBNAIL.search(use)]
    media = [match.group().lower() for _, use in others if (match := _MEDIUM.search(use))]
    graphics = [graphic for graphic, _ in others]
    if len(graphics) > 1 and len(set(media)) == len(graphics):
        graphics = [_merged(graphics)]
    if not graphics:
        return tuple(thumbnails)
    if thumbnails and len(graphics) == 1:
        small = tuple(href for each in thumbnails for href in each.hrefs)
        merged = _merged([*graphics, *thumbnails])
        graphics = [dataclasses.replace(merged, thumbnails=(*merged.thumbnails, *small))]
    return tuple(graphics)


def _merged(graphics: list[Graphic]) -> Graphic:
    hrefs = tuple(href for graphic in graphics for href in graphic.hrefs)
    caption = next((graphic.caption for graphic in graphics if graphic.caption), "")
    return Graphic(hrefs, caption, tuple(href for graphic in graphics for href in graphic.thumbnails))


def loose_graphics(root: etree._Element, used: set[etree._Element]) -> Iterator[LooseGraphic]:
    """Yield the images outside all figures. Images of formulae and of characters only count, in one row each."""
    small: dict[str, list[str]] = {}
    rest: list[LooseGraphic] = []
    seen: set[etree._Element] = set()
    for node in root.iter("graphic", "media", "inline-graphic"):
        href = _href(node)
        if node in used or not href or (node.tag == "media" and not _is_image(node)):
            continue
        parent = node.getparent()
        if local_name(parent) == "alternatives":
            if parent in seen:
                continue
            seen.add(parent)
        if next(node.iterancestors(*_FORMULAE), None) is not None:
            small.setdefault("image of a formula", []).append(href)
        elif node.tag == "inline-graphic":
            small.setdefault("image in running text", []).append(href)
        else:
            rest.append(LooseGraphic(href[:_MAX_NAME], f"outside a figure: {_place(node)}"))
    yield from rest[:_MAX_LOOSE]
    if len(rest) > _MAX_LOOSE:
        yield LooseGraphic(rest[_MAX_LOOSE].href, f"outside a figure: {len(rest) - _MAX_LOOSE} more images")
    for reason, hrefs in small.items():
        yield LooseGraphic(hrefs[0][:_MAX_NAME], f"{reason}: {len(hrefs)} in the article")


def _place(node: etree._Element) -> str:
    if _THUMBNAIL.search(_use(node)):
        return "thumbnail"
    place = next(node.iterancestors(*_PLACES), None)
    if place is None:
        return local_name(node.getparent())
    return f"{place.get('abstract-type', '')[:40]} {place.tag}".strip()


def _is_image(node: etree._Element) -> bool:
    return local_name(node) == "graphic" or (local_name(node) == "media" and node.get("mimetype") == "image")


def _use(node: etree._Element) -> str:
    return f"{node.get('specific-use', '')} {node.get('content-type', '')}"


def _href(node: etree._Element) -> str:
    # NLM files without a namespace declaration have a plain `href`.
    return (node.get(_XLINK_HREF) or node.get("href") or "").strip()

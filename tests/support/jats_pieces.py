"""Parse articles from pieces of JATS."""

from __future__ import annotations

from bclip_fast.ingest import jats
from bclip_fast.ingest.jats import Article

HEAD = (
    '<article xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:mml="http://www.w3.org/1998/Math/MathML" '
    'xmlns:ali="http://www.niso.org/schemas/ali/1.0/">'
)


def parse_article(body: str, front: str = "") -> Article:
    """Parse an article with this body and front matter."""
    return jats.parse(f"{HEAD}<front>{front}</front><body>{body}</body></article>".encode())


def parse_figures(body: str) -> list[tuple[str, str, str, list[tuple[str, ...]]]]:
    """Return (id, label, caption, hrefs of the graphics) of each figure."""
    figures = parse_article(body).figures
    return [
        (figure.id, figure.label, figure.caption, [graphic.hrefs for graphic in figure.graphics]) for figure in figures
    ]


def parse_caption(content: str) -> str:
    """Return the text of a caption element with this content."""
    (figure,) = parse_article(f'<fig id="f"><caption>{content}</caption><graphic xlink:href="g"/></fig>').figures
    return figure.caption

# ruff: noqa: E501 -- XML reads better unbroken
"""Nested figures, languages, versions of an image, and images outside figures, by the rules of `jats_figures`."""

from __future__ import annotations

import pytest
from jats_pieces import HEAD, parse_article, parse_figures

from bclip_fast.ingest import jats


def fig(name: str, caption: str, graphic: str = "", inside: str = "", attributes: str = "") -> str:
    """Return a figure with a label, a caption, perhaps a graphic, and other content."""
    image = f'<graphic xlink:href="{graphic}"/>' if graphic else ""
    return (
        f'<fig id="{name}" {attributes}><label>{name}</label><caption><p>{caption}</p></caption>{image}{inside}</fig>'
    )


@pytest.mark.parametrize("wrap", ["{}", "<p>{}</p>", "<fig-group>{}</fig-group>", "<boxed-text><p>{}</p></boxed-text>"])
def test_figure_in_a_figure_with_an_image_has_its_own_caption(wrap):
    inner = wrap.format(fig("s1", "Control.", "2") + fig("s2", "Lane.", "3"))
    expected = [("f", "f", "Main.", [("1",)]), ("s1", "s1", "Control.", [("2",)]), ("s2", "s2", "Lane.", [("3",)])]
    assert parse_figures(fig("f", "Main.", "1", inner)) == expected
    # Three levels, and a nested figure without a caption.
    deep = fig("f", "Main.", "1", fig("s1", "Control.", "2", '<p><fig id="t"><graphic xlink:href="4"/></fig></p>'))
    assert parse_figures(deep) == [*expected[:2], ("t", "", "", [("4",)])]


def test_figures_in_a_figure_without_an_image_share_its_caption():
    inner = fig("a", "Left.", "1") + '<fig id="b"><graphic xlink:href="2"/></fig>'
    expected = [("a", "a", "Both. Left.", [("1",)]), ("b", "f", "Both.", [("2",)])]
    assert parse_figures(fig("f", "Both.", "", inner)) == expected


def test_supplementary_material_in_a_figure_adds_nothing_to_its_caption():
    data = (
        '<supplementary-material id="d"><label>Source data 1.</label><caption><title>Values.</title><p>Table.</p></caption>'
        '<media xlink:href="d.xlsx"/><graphic xlink:href="9"/></supplementary-material>'
    )
    article = parse_article(fig("f", "Main.", "1", data))
    assert [(figure.caption, [g.hrefs for g in figure.graphics]) for figure in article.figures] == [("Main.", [("1",)])]
    assert [(g.href, g.reason) for g in article.loose_graphics] == [("9", "outside a figure: supplementary-material")]


def parse_in(language: str, body: str) -> list[tuple[str, str, str]]:
    """Return (caption or reason, language, translation) of the figures in an article in `language`."""
    head = HEAD.replace(">", f' xml:lang="{language}">') if language else HEAD
    figures = jats.parse(f"{head}<front/><body>{body}</body></article>".encode()).figures
    return [(figure.excluded or figure.caption, figure.language, figure.translation) for figure in figures]


FRENCH, ENGLISH = '<caption xml:lang="fr"><p>Coupe.</p></caption>', '<caption xml:lang="en"><p>Section.</p></caption>'


@pytest.mark.parametrize(
    ("language", "captions", "expected"),
    [
        ("en", FRENCH + ENGLISH, ("Section.", "en", "")),
        ("", FRENCH + ENGLISH, ("Section.", "en", "")),
        ("EN-US", FRENCH + ENGLISH, ("Section.", "en", "")),
        ("en", FRENCH + "<caption><p>Section.</p></caption>", ("Section.", "en", "")),
        ("fr", ENGLISH + FRENCH, ("Coupe. Section.", "fr", "en")),
        ("fr", ENGLISH, ("Section.", "en", "")),
        ("de", ENGLISH + FRENCH, ("Section.", "en", "")),
        ("de", FRENCH, ("Coupe.", "fr", "")),
        ("en", '<caption xml:lang="en"><p>Figure 1</p></caption>' + FRENCH, ("Coupe.", "fr", "")),
        ("en", '<caption><title xml:lang="fr">Coupe.</title><title xml:lang="en">Section.</title><p>Bar.</p></caption>', ("Section. Bar.", "en", "")),
        ("fr", "<caption><p>Coupe.</p></caption>", ("Coupe.", "fr", "")),
        ("", "<caption><!-- no --><p>Section.</p></caption>", ("Section.", "", "")),
        ("en", FRENCH + ENGLISH + '<p>(a) Cell.</p><p xml:lang="fr">(a) Cellule.</p>', ("Section. (a) Cell.", "en", "")),
    ],
)  # fmt: skip
def test_caption_is_in_the_language_of_the_article(language, captions, expected):
    assert parse_in(language, f'<fig>{captions}<graphic xlink:href="g"/></fig>') == [expected]


def portuguese(graphic: str = "") -> str:
    return fig("a", "Corte.", graphic, attributes='xml:lang="pt"')


def english(graphic: str = "") -> str:
    return fig("b", "Section.", graphic, attributes='xml:lang="en"')


@pytest.mark.parametrize(
    "content",
    [
        # The image is in the group, in one of its figures, or in all of them.
        portuguese() + english() + '<graphic xlink:href="1"/>',
        portuguese() + english("1"),
        portuguese("1") + english("1"),
        english("1") + portuguese(),
    ],
)
def test_group_of_one_image_in_two_languages_is_one_figure(content):
    group = f'<fig-group id="g">{content}</fig-group>'
    assert parse_in("pt", group) == [("Corte. Section.", "pt", "en")]
    assert parse_in("en", group) == [("Section.", "en", "")]


def test_group_of_two_languages_with_two_images_stays_two_figures():
    group = f"<fig-group>{portuguese('1')}{english('2')}</fig-group>"
    assert parse_in("pt", group) == [("Corte.", "pt", ""), ("Section.", "en", "")]


def test_translation_of_the_article_repeats_no_image():
    own, other = fig("a", "Corte.", "1"), fig("a", "Section.", "1") + fig("b", "Only here.", "2")
    body = f'{own}</body><sub-article article-type="translation" xml:lang="en"><body>{other}</body></sub-article><body>'
    reason = "translation: the same image is figure 1 of the article"
    assert parse_in("pt", body) == [("Corte. Section.", "pt", "en"), (reason, "en", ""), ("Only here.", "en", "")]
    # The same image twice in one language stays two figures.
    assert parse_in("pt", own + own) == [("Corte.", "pt", "")] * 2


@pytest.mark.parametrize(
    ("graphics", "hrefs", "thumbnails"),
    [
        ('<alternatives><graphic xlink:href="a.tif"/><graphic xlink:href="t.jpg" content-type="thumb-267x140"/></alternatives>', [("a.tif", "t.jpg")], ("t.jpg",)),
        ('<graphic xlink:href="a"/><graphic xlink:href="t" specific-use="thumbnail"/>', [("a", "t")], ("t",)),
        ('<graphic xlink:href="p.eps" specific-use="print"/><graphic xlink:href="w.png" specific-use="web"/>', [("p.eps", "w.png")], ()),
        ('<graphic xlink:href="a" specific-use="print"/><graphic xlink:href="b" specific-use="print"/>', [("a",), ("b",)], ()),
        ('<graphic xlink:href="a"/><graphic xlink:href="b"/>', [("a",), ("b",)], ()),
        ('<graphic xlink:href="t" content-type="thumbnail"/>', [("t",)], ()),
        ('<chem-struct-wrap><graphic xlink:href="a"/></chem-struct-wrap>', [("a",)], ()),
        ('<chem-struct-wrap><chem-struct><alternatives><graphic xlink:href="a"/><graphic xlink:href="b"/></alternatives></chem-struct></chem-struct-wrap>', [("a", "b")], ()),
    ],
)  # fmt: skip
def test_versions_of_an_image_are_one_graphic(graphics, hrefs, thumbnails):
    (figure,) = parse_article(f"<fig><caption><p>x y z</p></caption>{graphics}</fig>").figures
    assert [graphic.hrefs for graphic in figure.graphics] == hrefs
    assert figure.graphics[0].thumbnails == thumbnails


def test_graphics_outside_figures_are_named_with_their_place():
    image = '<graphic xlink:href="{}"/>'
    abstract = f'<article-meta><abstract abstract-type="graphical"><p>{image.format("a")}</p></abstract></article-meta>'
    body = (
        f"<boxed-text><label>Chart 1</label>{image.format('b')}</boxed-text><table-wrap>{image.format('c')}</table-wrap>"
        f"<p><alternatives>{image.format('d')}{image.format('d2')}</alternatives></p>{fig('f', 'Liver.', 'g')}"
        f"<disp-formula>{image.format('e1')}</disp-formula><p><inline-formula><inline-graphic xlink:href='e2'/></inline-formula>"
        "<inline-graphic xlink:href='i'/><media mimetype='image' xlink:href='m.png'/><media xlink:href='film.mp4'/></p>"
    )
    article = parse_article(body, abstract)
    assert len(article.figures) == 1
    assert [(graphic.href, graphic.reason) for graphic in article.loose_graphics] == [
        ("a", "outside a figure: graphical abstract"),
        ("b", "outside a figure: boxed-text"),
        ("c", "outside a figure: table-wrap"),
        ("d", "outside a figure: body"),
        ("m.png", "outside a figure: body"),
        ("e1", "image of a formula: 2 in the article"),
        ("i", "image in running text: 1 in the article"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        "<fig>{}{}</fig>",
        "<fig-group>{}<fig>{}</fig></fig-group>",
        '<fig>{1}<graphic xlink:href="h">{0}</graphic></fig>',
        '<fig>{1}<alternatives><graphic xlink:href="h">{0}</graphic></alternatives></fig>',
    ],
)
def test_permissions_of_figure_group_and_graphic_count(content):
    permissions = "<permissions><license><license-p>CC BY-NC-ND</license-p></license></permissions>"
    body = content.format(permissions, '<caption><p>x y z</p></caption><graphic xlink:href="g"/>')
    assert [figure.licence for figure in parse_article(body).figures] == ["CC BY-NC-ND"]


WRAPS = {
    "efetch": "<pmc-articleset>{}{}</pmc-articleset>",
    "oai": '<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><ListRecords><record><metadata>{}</metadata></record><record><metadata>{}</metadata></record></ListRecords></OAI-PMH>',
    "other": "<articles><item>{}</item><item>{}</item></articles>",
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("namespace", ["", ' xmlns="https://jats.nlm.nih.gov/ns/archiving/1.3/"', ' xmlns=""'])
def test_set_of_articles_gives_every_article(wrap, namespace):
    def article(number: int) -> str:
        identity = f'<article-meta><article-id pub-id-type="pmc">{number}</article-id></article-meta>'
        return (
            HEAD.replace(">", namespace + ">")
            + f"<front>{identity}</front><body>{fig('F', f'Of {number}.', 'g')}</body></article>"
        )

    elements, problems = jats.split(wrap.format(article(1), article(2)).encode())
    articles = [jats.read_article(element) for element in elements]
    assert [(each.pmcid, each.figures[0].caption) for each in articles] == [("PMC1", "Of 1."), ("PMC2", "Of 2.")]
    assert problems == []


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ('<pmc-articleset><Reply Id="9" error="The following PMCID is not available: 9"/></pmc-articleset>', "the root is <pmc-articleset>: 9 The following PMCID is not available: 9"),
        ('<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><error code="idDoesNotExist">No such record</error></OAI-PMH>', "the root is <OAI-PMH>: idDoesNotExist No such record"),
        ('<OAI-PMH><GetRecord><record><header status="deleted"><identifier>oai:7</identifier></header></record></GetRecord></OAI-PMH>', "the root is <OAI-PMH>: deleted record oai:7"),
        ("<html><body><article><p>News</p></article></body></html>", "the root is <html>"),
    ],
)  # fmt: skip
def test_set_without_an_article_gives_the_reason_of_the_server(document, reason):
    with pytest.raises(jats.JatsError) as caught:
        jats.split(document.encode())
    assert str(caught.value) == f"not a JATS article: {reason}"

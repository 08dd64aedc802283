# ruff: noqa: E501 -- XML reads better unbroken
"""The figures and metadata of articles, by the rules of `ingest/jats.py`."""

from __future__ import annotations

import re
import time

import pytest
from jats_pieces import HEAD, parse_article, parse_figures

from bclip_fast.ingest import jats, jats_figures, mentions
from bclip_fast.ingest.jats import JatsError


def test_figure_without_caption_stays_without():
    body = """
      <fig id="a"><graphic xlink:href="0"/></fig>
      <fig id="b"><label>Figure 1</label><caption><p>First.</p></caption><graphic xlink:href="1"/></fig>
      <fig id="c"><label>Figure 2</label><graphic xlink:href="2"/></fig>
      <fig id="d"><caption/><graphic xlink:href="3"/></fig>
      <fig><caption><p>Last.</p></caption><graphic id="x" xlink:href="4"/></fig>"""
    assert parse_figures(body) == [
        ("a", "", "", [("0",)]),
        ("b", "Figure 1", "First.", [("1",)]),
        ("c", "Figure 2", "", [("2",)]),
        ("d", "", "", [("3",)]),
        ("", "", "Last.", [("4",)]),
    ]


def test_graphics_are_images_and_alternatives_are_one():
    body = """<fig id="f"><caption><p>All.</p></caption>
      <graphic xlink:href="one"/>
      <alternatives><graphic xlink:href="two.tif"/><graphic xlink:href="two.jpg"/></alternatives>
      <graphic xlink:href="three"><caption><p>Own.</p></caption></graphic>
      <media mimetype="image" xlink:href="four.png"/><media mimetype="video" xlink:href="film.mp4"/>
      <disp-formula><graphic xlink:href="equation"/></disp-formula>
      <table-wrap><graphic xlink:href="table"/></table-wrap></fig>"""
    (figure,) = parse_article(body).figures
    assert [graphic.hrefs for graphic in figure.graphics] == [
        ("one",),
        ("two.tif", "two.jpg"),
        ("three",),
        ("four.png",),
    ]
    assert [graphic.caption for graphic in figure.graphics] == ["", "", "Own.", ""]
    assert figure.caption == "All."


def test_group_caption_belongs_only_to_its_figures():
    body = """<fig-group id="g"><label>Figure 1</label><caption><title>Both.</title></caption>
        <fig id="a"><caption><p>Left.</p></caption><graphic xlink:href="1"/></fig>
        <fig id="b"><label>B</label><graphic xlink:href="2"/></fig>
        <graphic xlink:href="3"/></fig-group>
      <fig id="c"><graphic xlink:href="4"/></fig>
      <fig-group><fig id="d"><caption><p>Alone.</p></caption><graphic xlink:href="5"/></fig></fig-group>"""
    assert parse_figures(body) == [
        ("g", "Figure 1", "Both.", [("3",)]),
        ("a", "Figure 1", "Both. Left.", [("1",)]),
        ("b", "B", "Both.", [("2",)]),
        ("c", "", "", [("4",)]),
        ("d", "", "Alone.", [("5",)]),
    ]


def test_caption_includes_panel_legends_but_no_credit():
    body = """<fig id="f"><object-id>10.1/z</object-id><label>Figure 1</label><caption><p>Cells.</p></caption>
      <graphic xlink:href="g"/><p><bold>A.</bold> Control.</p><attrib>Photo: N. N.</attrib></fig>"""
    assert parse_figures(body) == [("f", "Figure 1", "Cells. A. Control.", [("g",)])]


def test_several_captions_screen_version_counts():
    body = """<fig id="f"><caption specific-use="print"><p>See page 3.</p></caption>
      <caption specific-use="online"><p>Full.</p></caption><graphic xlink:href="g"/></fig>"""
    assert parse_figures(body) == [("f", "", "Full.", [("g",)])]


def test_figures_count_in_all_places_except_excluded_ones():
    def fig(name: str) -> str:
        return f'<fig id="F1"><caption><p>{name}</p></caption><graphic xlink:href="{name}"/></fig>'

    text = (
        f'{HEAD}<front/><body><p>text {fig("paragraph")}</p><boxed-text>{fig("box")}<graphic xlink:href="x"/></boxed-text>'
        f'<table-wrap>{fig("table")}<graphic xlink:href="t"/></table-wrap><graphic xlink:href="loose"/>'
        f"<supplementary-material>{fig('supplement')}</supplementary-material></body>"
        f"<floats-group>{fig('float')}</floats-group><sub-article><body>{fig('sub')}</body></sub-article></article>"
    )
    figures = jats.parse(text.encode()).figures
    assert [(f.number, f.id, f.caption, f.excluded) for f in figures] == [
        (1, "F1", "paragraph", ""),
        (2, "F1", "box", ""),
        (3, "F1", "table", "inside table-wrap"),
        (4, "F1", "supplement", "inside supplementary-material"),
        (5, "F1", "float", ""),
        (6, "F1", "sub", ""),
    ]


def test_parse_huge_article_is_bounded():
    long = "x" * (jats_figures.MAX_CAPTION + 1)
    body = f'<fig-group><caption><p>{long}</p></caption><fig><graphic xlink:href="g"/></fig></fig-group>'
    (figure,) = parse_article(body).figures
    assert (figure.caption, figure.excluded) == ("", "caption longer than 32768 characters")
    with pytest.raises(JatsError, match="more than 2000 figures"):
        parse_article("<fig/>" * 2001)
    start = time.process_time()
    groups = "<fig-group><caption><p>" + long + "</p></caption>"
    parse_article(groups * 100 + "<fig/>" * 2000 + "</fig-group>" * 100)
    parse_article(f"<fig><caption><p><alternatives>{'<a>x</a>' * 100_000}</alternatives></p></caption></fig>")
    parse_article(f"<fig><caption>{'<p>doi:10.1234/x</p>' * 20_000}</caption></fig>")
    reference = '<xref ref-type="bibr">1</xref>'
    for content in (
        f"[{reference * 100_000}",
        f"{'[' * 50_000}{reference}{']' * 50_000}",
        f"({'e.g. ' * 50_000}{reference}x)",
    ):
        parse_article(f"<fig><caption><p>{content}</p></caption></fig>")
    figure = '<fig id="a"><caption><p>One.</p></caption></fig>'
    for content in ('<xref rid="a"/>. A ' * 30_000, ". A" * 200_000, ".'\"" * 200_000):
        parse_article(f'<p>{content}<xref rid="a">1</xref></p>{figure}')
    parse_article(f"<fig><caption><p>{(reference + ' ' * 1000 + '1<sup>2</sup>') * 1000}</p></caption></fig>")
    assert time.process_time() - start < 10
    titled = parse_article(
        "", f"<article-meta><title-group><article-title>{long}</article-title></title-group></article-meta>"
    )
    assert len(titled.title) == jats.MAX_TITLE


def test_mentions_are_the_paragraphs_that_refer_to_a_figure():
    body = """<p>As <xref ref-type="fig" rid="a">Fig. 1</xref> and <xref rid="a b">both</xref> show.</p>
      <fig-group id="g"><caption><p>All, see <xref rid="a">1</xref>.</p></caption>
        <fig id="a"><caption><p>One.</p></caption><graphic xlink:href="1"/></fig>
        <fig id="b"><caption><p>Two.</p></caption><graphic xlink:href="2"/></fig></fig-group>
      <p>Of the group: <xref rid="g">here</xref>. <xref rid="ref1">[1]</xref></p>
      <table-wrap><table><td><p><xref rid="b">x</xref></p></td></table></table-wrap>
      <list><list-item><p>In a list <xref rid="b">2</xref>.</p></list-item></list><p>None.</p>"""
    one, two = parse_article(body).figures
    assert one.mentions.paragraphs == ["As Fig. 1 and both show.", "Of the group: here. [1]"]
    assert two.mentions.paragraphs == ["As Fig. 1 and both show.", "In a list 2.", "Of the group: here. [1]"]
    many = "".join(f'<p>{i} <xref rid="a">1</xref>{"x" * 3000}</p>' for i in range(20))
    (figure,) = parse_article(f'{many}<fig id="a"><caption><p>One.</p></caption></fig>').figures
    assert len(figure.mentions.paragraphs) == mentions.MAX_MENTIONS
    assert all(len(text) == mentions.MAX_MENTION for text in figure.mentions.paragraphs)
    # A sentence of any length is no sentence, and one that only points to the figure says nothing.
    assert figure.mentions.sentences == []


def test_sentences_of_mentions_are_those_around_the_reference():
    first, second = '<xref ref-type="fig" rid="a">Fig. 1</xref>', '(<xref rid="b">Figs. 2A</xref>, see also e.g. [3])'
    body = f"""<p>We measured growth of E. coli in broth. As {first} shows, growth was faster than in vivo (p. 5).
      Rates {second} differ vs. those of Smith et al. Then the cells were counted once more.</p>
      <p>See {first}. <list><list-item><p>Both {first} and {second} show it again in detail.</p></list-item></list></p>
      <p>As {first} shows, growth was faster than in vivo (p. 5).</p>
      <p><media>About this film {first} says nothing that anybody would read.</media></p>
      <fig id="a"><caption><p>One.</p></caption></fig><fig id="b"><caption><p>Two.</p></caption></fig>"""
    one, two = parse_article(body).figures
    both = "Both Fig. 1 and (Figs. 2A, see also e.g. [3]) show it again in detail."
    assert one.mentions.sentences == ["As Fig. 1 shows, growth was faster than in vivo (p. 5).", both]
    rates = (
        "Rates (Figs. 2A, see also e.g. [3]) differ vs. those of Smith et al. Then the cells were counted once more."
    )
    assert two.mentions.sentences == [rates, both]
    many = "".join(f"<p>Sentence {i} of {first} has enough words to count here.</p>" for i in range(20))
    (figure,) = parse_article(f'{many}<fig id="a"><caption><p>One.</p></caption></fig>').figures
    assert len(figure.mentions.sentences) == mentions.MAX_MENTIONS
    assert not any(mentions.MARK in text for text in figure.mentions.paragraphs + figure.mentions.sentences)


def test_caption_that_repeats_the_label_counts_as_missing():
    body = '<fig><label>Abb. 3</label><caption><p>Abb. 3</p></caption><graphic xlink:href="g"/></fig>'
    assert parse_figures(body) == [("", "Abb. 3", "", [("g",)])]


FRONT = """<journal-meta><journal-title-group><journal-title>J. of Tests</journal-title></journal-title-group></journal-meta>
<article-meta><article-id pub-id-type="pmc">123</article-id><article-id pub-id-type="pmid">9</article-id>
<article-id pub-id-type="doi">10.1/a.b</article-id><title-group><article-title>On <italic>x</italic></article-title></title-group>
<pub-date pub-type="nihms-submitted"><year>2009</year></pub-date><pub-date><year>2012</year></pub-date>
<pub-date><year>2011</year></pub-date><permissions>{}</permissions></article-meta>"""


def test_front_matter_gives_metadata():
    parsed = parse_article("", FRONT.format(""))
    assert (parsed.pmcid, parsed.pmid, parsed.doi, parsed.title) == ("PMC123", "9", "10.1/a.b", "On x")
    assert (parsed.journal, parsed.year, parsed.licence) == ("J. of Tests", 2011, "")


@pytest.mark.parametrize(
    ("permissions", "code"),
    [
        ('<license xlink:href="http://creativecommons.org/licenses/by/4.0/"/>', "CC BY"),
        ("<license><ali:license_ref>https://creativecommons.org/licenses/by-nc-nd/4.0/</ali:license_ref></license>", "CC BY-NC-ND"),
        ('<license><license-p>CC <ext-link xlink:href="https://creativecommons.org/publicdomain/zero/1.0/">0</ext-link></license-p></license>', "CC0"),
        ("<license><license-p>under the Creative Commons Attribution License, which permits</license-p></license>", "CC BY"),
        ("<license><license-p>the Creative Commons Attribution-NonCommercial-ShareAlike 3.0 License</license-p></license>", "CC BY-NC-SA"),
        ("<license><p>published as CC BY-NC.</p></license>", "CC BY-NC"),
        ("<license><p>All rights reserved.</p></license>", ""),
    ],
)  # fmt: skip
def test_permissions_give_licence_code_and_url(permissions, code):
    parsed = parse_article("", FRONT.format(permissions))
    assert parsed.licence == code
    assert parsed.licence_url == (re.findall(r"https?://[^<\"]+", permissions) or [""])[0]


def test_figure_permissions_give_its_licence():
    body = '<fig><caption><p>x</p></caption><graphic xlink:href="g"/><permissions><copyright-statement>(c) Somebody</copyright-statement></permissions></fig>'
    (figure,) = parse_article(body).figures
    assert (figure.licence, figure.caption) == ("(c) Somebody", "x")


def test_old_dtd_with_default_namespace_is_parsed():
    text = """<?xml version="1.0" encoding="ISO-8859-1"?>
      <!DOCTYPE article PUBLIC "-//NLM//DTD Journal Archiving v2.3//EN" "archivearticle.dtd" [<!-- don't > -->]>
      <article xmlns="http://dtd.nlm.nih.gov/2.0/xsd/archivearticle"><front><journal-meta><journal-title>J</journal-title>
      </journal-meta><article-meta><article-id pub-id-type="pmc">PMC7</article-id></article-meta></front>
      <body><fig id="F"><caption><p>caf\u00e9 &nbsp;&alpha;&amp;&le;&unheardof;</p></caption><graphic href="g.gif"/></fig></body></article>"""
    parsed = jats.parse(text.strip().encode("latin-1"))
    assert (parsed.pmcid, parsed.journal) == ("PMC7", "J")
    (figure,) = parsed.figures
    assert (figure.caption, figure.graphics[0].hrefs) == ("caf\u00e9 \u03b1&\u2264&unheardof;", ("g.gif",))

"""The visible text of captions and formulae."""

from __future__ import annotations

import pytest
from jats_pieces import parse_caption


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<title>A title</title><p>One.</p><p>Two.</p>", "A title One. Two."),
        ("<p>x <bold>b<italic>i<sup>s</sup>j</italic>c</bold> y</p>", "x bisjc y"),
        ("<p>CO<sub>2</sub> in <italic>E. coli</italic></p>", "CO2 in E. coli"),
        ('<p>as in [<xref ref-type="bibr" rid="r1"><sup>12</sup></xref>], see</p>', "as in, see"),
        ("<p>a\n   b\t c\u00a0d\u2009e</p>", "a b c d e"),
        ("<p>soft\u00adhyphen\u200b, e\u0301</p>", "softhyphen, \u00e9"),
        ("<p>a<!-- no -->b<?pi no?>c</p>", "abc"),
        ("<p>a <![CDATA[<b> &amp; ]]>c</p>", "a <b> &amp; c"),
        ("<p>one<break/>two</p>", "one two"),
        (
            "<p>a<list><list-item><label>1</label><p>b</p></list-item><list-item><p>c</p></list-item></list>d</p>",
            "a 1 b c d",
        ),
        ("plain text, no paragraph", "plain text, no paragraph"),
        ("<p>Text.</p><p><bold>DOI:</bold> <ext-link>http://dx.doi.org/10.7554/eLife.1.003</ext-link></p>", "Text."),
        (
            "<p>Data at <ext-link>https://doi.org/10.5061/dryad.x</ext-link>.</p>",
            "Data at https://doi.org/10.5061/dryad.x.",
        ),
        (
            "<p>T.<supplementary-material><object-id>10.1/x</object-id><label>S1</label>"
            "<caption><p>No</p></caption></supplementary-material> U.</p>",
            "T. U.",
        ),
        ('<object-id pub-id-type="doi">10.1/y</object-id><p>T.</p>', "T."),
        ("<p>***</p>", ""),
        ("", ""),
    ],
)
def test_caption_content_gives_visible_text(content, expected):
    assert parse_caption(content) == expected


MATH = (
    "<mml:math><mml:mrow>\n <mml:msup><mml:mi>x</mml:mi> <mml:mn>2</mml:mn></mml:msup>\n <mml:mo>=</mml:mo>"
    "<mml:mfrac><mml:mi>a</mml:mi><mml:mi>b</mml:mi></mml:mfrac></mml:mrow></mml:math>"
)
TEX = r"<tex-math>\documentclass{minimal}\begin{document}$$x^2=\frac{a}{b}$$\end{document}</tex-math>"


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (MATH, "if x2=a/b then"),
        (f'<alternatives>{TEX}{MATH}<inline-graphic xlink:href="e1"/></alternatives>', "if x2=a/b then"),
        (f"<alternatives>{TEX}<textual-form>x squared</textual-form></alternatives>", "if x squared then"),
        (f'<alternatives><inline-graphic xlink:href="e1"/>{TEX}</alternatives>', r"if x^2=\frac{a}{b} then"),
        (f"{TEX}{MATH}", "if x2=a/b then"),
        (
            "<mml:math><mml:mfrac><mml:mrow><mml:mi>a</mml:mi><mml:mo>+</mml:mo><mml:mi>b</mml:mi></mml:mrow>"
            "<mml:mrow><mml:mi>d</mml:mi><mml:mo>\u2062</mml:mo><mml:mi>t</mml:mi></mml:mrow></mml:mfrac></mml:math>",
            "if (a+b)/dt then",
        ),
        ("<italic>x</italic> = 1", "if x = 1 then"),
        ('<inline-graphic xlink:href="e1"/>', "if then"),
    ],
)
def test_formula_alternatives_give_one_text(formula, expected):
    assert parse_caption(f"<p>if <inline-formula>{formula}</inline-formula> then</p>") == expected


@pytest.mark.parametrize(
    "text", ["Figure 1", "fig. 2a.", "Image", "No caption available.", "See legend", "N/A", "untitled"]
)
def test_caption_placeholder_counts_as_missing(text):
    assert parse_caption(f"<p>{text}</p>") == ""
    assert parse_caption(f"<p>{text} of a cell</p>") == f"{text} of a cell"

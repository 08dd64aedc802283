"""References to the literature leave a caption, and digits of different height stay apart."""

from __future__ import annotations

import pytest
from jats_pieces import parse_article, parse_caption


def reference(text: str) -> str:
    return f'<xref ref-type="bibr" rid="b">{text}</xref>'


SMITH, DOE = reference("Smith et al., 2010"), reference("Doe, 2011")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # A number: superscript inside or outside, lists, ranges, brackets, at the start, at the end.
        (f"cells as before{reference('<sup>12</sup>')}.", "cells as before."),
        (f"before<sup>{reference('12')}</sup> and after", "before and after"),
        (f"before<sup>{reference('12')},{reference('13')}</sup>.", "before."),
        (f"before<sup>{reference('12')}\u201315</sup>.", "before."),
        (f"before{reference('<sup>1</sup>')}<sup>,</sup>{reference('<sup>2</sup>')}.", "before."),
        (f"before{reference('1')}, {reference('2')} and {reference('3')} after", "before after"),
        (f"before{reference('12')}after", "before after"),
        (f"cells [{reference('1')}, {reference('2')}\u2013{reference('4')}].", "cells."),
        (f"as in [{reference('<sup>12</sup>')}], see", "as in, see"),
        (f"[{reference('1')}] Cells", "Cells"),
        (f"cells ({reference('12')}; n = 5).", "cells (n = 5)."),
        ("Registry.<sup>[1]</sup>", "Registry."),
        # By name: alone in a bracket, beside other text, or as a part of the sentence.
        (f"cells ({SMITH}; {DOE}).", "cells."),
        (f"cells (see also {SMITH}) die", "cells die"),
        (f"cells (n = 5; {DOE}).", "cells (n = 5)."),
        (f"cells (data of {DOE}, with permission).", "cells (data of Doe, 2011, with permission)."),
        (f"Data from {SMITH}.", "Data from Smith et al., 2010."),
        (f"the conventions of ({SMITH}) with", "the conventions of Smith et al., 2010 with"),
        (f"by{SMITH}again", "by Smith et al., 2010 again"),
        (f"of Smith et al. ({reference('2010')}) show", "of Smith et al. show"),
        # In plain text, or in front of a year that is a reference. One name with a year may be a place.
        ("cells (Smith et al., 2010; Smith and Doe 2011).", "cells."),
        ("cells (after Smith et al. 2010) die", "cells die"),
        ("cells (Chiapas, 2003; Ukraine, 1993).", "cells (Chiapas, 2003; Ukraine, 1993)."),
        (f"found (Van Smith and Doe, {reference('2002')}; Wang et al., {reference('2006')}), which", "found, which"),
        (f"found (Smith, {reference('2002')}; see Fig. 1).", "found (see Fig. 1)."),
        (f"found (Smith et al., 2010[{reference('26')}]).", "found."),
        ("as in Smith et al., 2010, of cells", "as in Smith et al., 2010, of cells"),
        ("cells ( Figure 5A ) , n = 5 .", "cells (Figure 5A), n = 5."),
        # Phrases that lead to a number.
        (f"cells (adapted from [{reference('11')}]).", "cells."),
        (f"cells as described in [{reference('6')}] relative to", "cells relative to"),
        # Other references stay.
        ('see <xref ref-type="fig" rid="f">Figure 1</xref>', "see Figure 1"),
        ('in Table <xref ref-type="table" rid="t">1</xref> (<xref ref-type="fig" rid="g">2</xref>)', "in Table 1 (2)"),
    ],
)
def test_references_are_dropped_and_never_join_words(content, expected):
    assert parse_caption(f"<p>{content}</p>") == expected


def test_xref_without_type_counts_if_it_points_into_the_reference_list():
    body = '<fig id="f"><caption><p>Cells<xref rid="r1">1</xref> of <xref rid="f">1</xref>.</p></caption></fig>'
    assert parse_article(body).figures[0].caption == "Cells1 of 1."
    references = '<ref-list><ref id="r1"><label>1</label></ref></ref-list>'
    assert parse_article(body + references).figures[0].caption == "Cells of 1."


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("10<sup>6</sup> cells", "10 6 cells"),
        ("10<italic><sup>6</sup></italic>\u201310<sup><bold>7</bold></sup>", "10 6\u201310 7"),
        ("1.12x10<sup>-7</sup>, 10<sup>\u22126</sup> M, 10<sup>+3</sup>", "1.12x10 -7, 10 \u22126 M, 10 +3"),
        ("10<sup>6</sup>5", "10 6 5"),
        ("H<sub>2</sub><sup>18</sup>O, SO<sub>4</sub><sup>2\u2212</sup>, P2<sub>1</sub>", "H2 18O, SO4 2\u2212, P2 1"),
        # Letters and units join, as in print.
        ("CO<sub>2</sub>, Ca<sup>2+</sup>, CD4<sup>+</sup>, 25<sup>th</sup>", "CO2, Ca2+, CD4+, 25th"),
        ("m<sup>2</sup>, g<sup>\u22121</sup>, [<sup>3</sup>H], 1<sup>.</sup>5", "m2, g\u22121, [3H], 1.5"),
        ("<mml:math><mml:msup><mml:mn>10</mml:mn><mml:mn>6</mml:mn></mml:msup></mml:math>", "10 6"),
        ("<mml:math><mml:msubsup><mml:mi>x</mml:mi><mml:mn>1</mml:mn><mml:mn>2</mml:mn></mml:msubsup></mml:math>",
         "x1 2"),
    ],
)  # fmt: skip
def test_digits_of_different_height_stay_apart(content, expected):
    assert parse_caption(f"<p>{content}</p>") == expected


def test_sentences_that_cite_a_figure_are_cleaned_as_captions():
    references = f"(Smith et al., 2010)<sup>{reference('1')}</sup>"
    content = f"10<sup>6</sup> cells\u00a0of CO<sub>2</sub> grew {references} more than the others ( <b>%s</b> ) ."
    mention, caption = content % '<xref rid="f">Figure 1</xref>', content % "Figure 1"
    body = f'<p>{mention}</p><fig id="f"><caption><p>{caption}</p></caption></fig>'
    (figure,) = parse_article(body).figures
    assert figure.caption == "10 6 cells of CO2 grew more than the others (Figure 1)."
    assert figure.mentions.sentences == [figure.caption]

# ruff: noqa: E501 -- the words of licences read better unbroken
"""Every form of a licence that articles have: addresses, words, types, older NLM forms, and statements that differ."""

from __future__ import annotations

from collections import Counter

import pytest
from articles import manifest_rows, red_image, reject_rows, write_files
from ingest_runs import run_build
from jats_pieces import HEAD, parse_article

from bclip_fast.ingest import jats
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.ingest.licences import address_code, strictest, words_code
from bclip_fast.ingest.pmc import Rules

CC = "https://creativecommons.org"


@pytest.mark.parametrize(
    ("address", "code"),
    [
        (f"{CC}/licenses/by/4.0/", "CC BY"),
        ("http://creativecommons.org/licenses/by/2.0", "CC BY"),
        ("http://creativecommons.org/licenses/by/2.5/", "CC BY"),
        ("http://creativecommons.org/licenses/CC-BY/4.0", "CC BY"),
        ("http://creativecommons.org/licenses/by4.0", "CC BY"),
        ("HTTPS://WWW.CreativeCommons.org/licenses/BY-NC/4.0/legalcode.de", "CC BY-NC"),
        ("creativecommons.org/licenses/by-nc-sa/3.0/igo/", "CC BY-NC-SA"),
        ("http://creativecommons.org/licenses/by-nc/2.0/uk/", "CC BY-NC"),
        ("https://creativecommons.org/licenses/by_nc_nd/4.0/", "CC BY-NC-ND"),
        ("https://creativecommons.org/licenses/by\u2013nc\u2013nd/4.0", "CC BY-NC-ND"),
        ("https://creativecommons.org/licenses/by%2Dsa/4.0", "CC BY-SA"),
        ("http://creativecommons.org/licenses/by-nd-nc/1.0", "CC BY-NC-ND"),
        ("http://creativecommons.org/licenses/by-ncsa/4.0", "CC BY-NC-SA"),
        ("http://creativecommons.org/licence/by-sa/4.0/", "CC BY-SA"),
        ("http://creativecommons.org/license/by/4.0/", "CC BY"),
        ("http://creativecommons.org/by-nc/4.0/", "CC BY-NC"),
        ("http://creativecommon.org/licenses/by/4.0/", "CC BY"),
        ("http://creativecommons.org/licenses/nc/1.0/", "CC BY-NC"),
        (f"{CC}/publicdomain/zero/1.0/", "CC0"),
        (f"{CC}/publicdomain/mark/1.0/", "CC0"),
        ("http://creativecommons.org/licenses/zero/1.0", "CC0"),
        ("http://creativecommons.org/licenses/publicdomain/", "CC0"),
        ("http://creativecommons.org/licenses/sampling+/1.0/", "Creative Commons sampling+"),
        (f"{CC}/", ""),
        (f"{CC}/about/cclicenses/", ""),
        ("https://spdx.org/licenses/CC-BY-NC-4.0.html", "CC BY-NC"),
        ("https://pubs.acs.org/page/policy/authorchoice_ccbyncnd_termsofuse.html", "CC BY-NC-ND"),
        ("https://pubs.acs.org/page/policy/authorchoice_termsofuse.html", "ACS AuthorChoice"),
        ("https://www.elsevier.com/open-access/userlicense/1.0/", "Elsevier user licence"),
        ("http://onlinelibrary.wiley.com/termsAndConditions#vor", "Wiley terms of use"),
        ("http://doi.wiley.com/10.1002/tdm_license_1.1", "text and data mining"),
        ("http://www.springer.com/tdm", "text and data mining"),
        ("https://www.springernature.com/gp/researchers/text-and-data-mining", "text and data mining"),
        ("https://academic.oup.com/journals/pages/open_access/funder_policies/chorus/standard_publication_model", "Oxford standard publication model"),
        ("http://www.nationalarchives.gov.uk/doc/open-government-licence/version/3/", "Open Government Licence"),
        ("http://arxiv.org/licenses/nonexclusive-distrib/1.0/", "arXiv licence"),
        ("http://ivyspring.com/terms", ""),
        ("https://example.org/standby-sand/nd", ""),
    ],
)  # fmt: skip
def test_address_gives_code_or_name(address, code):
    assert address_code(address) == code


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("distributed under the Creative Commons Attribution License, which permits unrestricted use", "CC BY"),
        ("under the terms of the Creative Commons Attribution 4.0 International License", "CC BY"),
        ("available under a Creative Commons License (Attribution 4.0 International), CC BY 4.0", "CC BY"),
        ("the Creative Commons Attribution License 4.0 (CCBY), which permits", "CC BY"),
        ("the Creative Commons Deed, Attribution 2.5", "CC BY"),
        ("published as CC BY-NC.", "CC BY-NC"),
        ("licence CC-BY-NC-ND 4.0", "CC BY-NC-ND"),
        ("licence CC\u2011BY\u2011NC\u2011SA", "CC BY-NC-SA"),
        ("a Creative Commons Attribution-NonCommercial-NoDerivatives 4.0 International License", "CC BY-NC-ND"),
        ("Creative Commons Attribution \u2013 Non Commercial (unported, v3.0) License", "CC BY-NC"),
        ("Creative Commons Attribution-Noncommercial-No Derivative Works 3.0 Unported", "CC BY-NC-ND"),
        ("the Creative Commons Attribution-NonCommercial-ShareAlike 3.0 License", "CC BY-NC-SA"),
        ("an Attribution\u2013Noncommercial\u2013Share Alike\u2013No Mirror Sites license for six months", "CC BY-NC-SA"),
        ("Creative Commons Attribution Non-Commercial License (http://creativecommons.org/licenses/by-nc/2.0/uk/) which permits unrestricted non-commercial use", "CC BY-NC"),
        ("Creative Commons Attribution License, which permits reproduction. This license does not permit commercial exploitation without specific permission.", "CC BY-NC"),
        ("Creative Commons Attribution License. This license does not permit commercial exploitation or the creation of derivative works without permission.", "CC BY-NC-ND"),
        ("by the Creative Commons Deed, Attribution 2.5, which excludes any commercial exploitation", "CC BY-NC"),
        ("Creative Commons Attribution License. For commercial re-use, please contact journals.permissions@oup.com", "CC BY-NC"),
        ("Creative Commons Attribution licence: the material may not be used for commercial purposes", "CC BY-NC"),
        ("Creative Commons Attribution License, provided the use is non\u2010commercial and no modifications or adaptations are made", "CC BY-NC-ND"),
        ("Creative Commons Attribution License: remix non\u2011commercially, as long as the new creations are licensed under the identical terms", "CC BY-NC-SA"),
        ("a Creative Commons Non-Commercial No Derivatives licence", "CC BY-NC-ND"),
        ("sob a licen\u00e7a Creative Commons Attribution, que permite uso sem fins comerciais", "CC BY-NC"),
        ("Licencia Creative Commons Atribuci\u00f3n-NoComercial-SinDerivar 4.0, sin obras derivadas", "CC BY-NC-ND"),
        ("Licencia Creative Commons Atribuci\u00f3n-CompartirIgual", "CC BY-SA"),
        ("Creative Commons Namensnennung - Nicht kommerziell - Keine Bearbeitungen", "CC BY-NC-ND"),
        ("Creative Commons Attribution - Pas d\u2019Utilisation Commerciale - Pas de Modification", "CC BY-NC-ND"),
        ("licen\u00e7a Creative Commons Atribui\u00e7\u00e3o 4.0", "CC BY"),
        ("Creative Commons Attribution License: use for any purpose, even commercially", "CC BY"),
        ("Creative Commons Attribution License: for both commercial and non-commercial use", "CC BY"),
        ("Creative Commons Attribution License, which permits use, including commercial use, without permission", "CC BY"),
        ("CC BY. The Creative Commons Public Domain Dedication waiver (http://creativecommons.org/publicdomain/zero/1.0/) applies to the data", "CC BY"),
        ("made available under the Creative Commons CC0 public domain dedication", "CC0"),
        ("This publication is in the public domain and is therefore without copyright.", "public domain"),
        ("This is a work of the U.S. Government and is not subject to copyright protection", "public domain"),
        ("verbatim copying and redistribution of this article are permitted in all media for any purpose", "verbatim copying"),
        ("It may also be used consistent with the principles of fair use under the copyright law.", "fair use and text mining"),
        ("These permissions are granted for the duration of the COVID-19 pandemic", "COVID-19 emergency terms"),
        ("All rights reserved.", ""),
        ("This article is free to read.", ""),
        ("a Creative Commons licence", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_words_give_code_or_name(words, code):
    assert words_code(words)[0] == code


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        (["CC BY", "CC BY-NC"], "CC BY-NC"),
        (["CC BY-SA", "CC BY-NC"], "CC BY-NC-SA"),
        (["CC BY-SA", "CC BY-ND"], "CC BY-ND"),
        (["CC BY", "CC0"], "CC BY"),
        (["CC0", "public domain"], "CC0"),
        (["CC BY", "Elsevier user licence"], "Elsevier user licence"),
        (["", "CC BY"], "CC BY"),
        ([""], ""),
    ],
)
def test_strictest_adds_up_restrictions(codes, code):
    assert strictest(codes) == code


BY = f"{CC}/licenses/by/4.0/"
NC_WORDS = "Creative Commons Attribution-NonCommercial 4.0 International License."


def permissions(*licences: tuple[str, str], statement: str = "", kind: str = "open-access") -> str:
    """Return a `permissions` element with licences (address, words)."""
    elements = "".join(
        f'<license license-type="{kind}" xlink:href="{address}"><license-p>{words}</license-p></license>'
        for address, words in licences
    )
    return f"<permissions><copyright-statement>{statement}</copyright-statement>{elements}</permissions>"


@pytest.mark.parametrize(
    ("content", "code", "problem"),
    [
        (permissions((BY, "Open access.")), "CC BY", ""),
        (permissions((BY, NC_WORDS)), "CC BY-NC", "address: CC BY; words: CC BY-NC"),
        (permissions((BY, "No commercial use.")), "CC BY-NC", "address: CC BY; words: no commercial use"),
        (permissions((BY, "Creative Commons Attribution-ShareAlike License")), "CC BY-SA", "address: CC BY; words: CC BY-SA"),
        (permissions((BY, "a"), (f"{CC}/licenses/by-nc/4.0/", "b")), "CC BY-NC", "address: CC BY; address: CC BY-NC"),
        (permissions((BY, "a"), ("http://www.springer.com/tdm", "")), "CC BY", ""),
        (permissions(("http://www.springer.com/tdm", "")), "text and data mining", ""),
        (permissions((BY, "a"), ("https://www.elsevier.com/open-access/userlicense/1.0/", "")), "Elsevier user licence", "address: CC BY; address: Elsevier user licence"),
        (permissions((BY, "a"), ("https://example.org/terms", "")), "", "address: CC BY; address: another licence"),
        (permissions(("https://example.org/terms", "Our terms.")), "", "not understood: https://example.org/terms"),
        (permissions(("", "Our terms.")), "", "not understood: Our terms."),
        (permissions(("", ""), kind="creativeCommonsBy-nc-nd"), "CC BY-NC-ND", ""),
        (permissions(("", ""), kind="cc-by"), "CC BY", ""),
        (permissions((BY, ""), kind="CC BY-NC"), "CC BY-NC", "address: CC BY; type: CC BY-NC"),
        (permissions((BY, ""), statement="Copyright 2015 Authors. All rights reserved."), "CC BY", ""),
        (permissions((BY, ""), statement="Copyright 2015. Not for commercial use."), "CC BY-NC", "address: CC BY; copyright statement: no commercial use"),
        (permissions(statement="Copyright 2015 Authors. All rights reserved."), "", "not understood: Copyright 2015 Authors. All rights reserved."),
        (permissions(statement="Copyright 2015 Authors."), "", "not understood: Copyright 2015 Authors."),
        ("", "", "not stated"),
        # NLM 2.x: without `permissions`, and the licence in the copyright statement.
        ('<copyright-statement>This is an open-access article distributed under the terms of the Creative Commons Attribution License</copyright-statement>', "CC BY", ""),
        (f'<copyright-statement>Open Access: <ext-link xlink:href="{CC}/licenses/by-nc/2.0">licence</ext-link></copyright-statement>', "CC BY-NC", ""),
        (f'<license xlink:href="{BY}"><p>Open access.</p></license>', "CC BY", ""),
        ("<copyright-statement>Verbatim copying of this article is permitted</copyright-statement>", "verbatim copying", ""),
    ],
)  # fmt: skip
def test_permissions_give_strictest_code_and_the_reason(content, code, problem):
    licence = parse_article("", f"<article-meta>{content}</article-meta>").terms
    assert (licence.code, licence.problem) == (code, problem)


def article_with(content: str, number: int) -> bytes:
    return (
        f'{HEAD}<front><article-meta><article-id pub-id-type="pmc">{number}</article-id>{content}</article-meta></front>'
        f'<body><fig id="F"><caption><p>Organ {number}.</p></caption><graphic xlink:href="f"/></fig></body></article>'
    ).encode()


def test_build_refuses_contradictory_licences_by_name_and_keeps_the_words(tmp_path):
    contents = {
        1: permissions((BY, "Creative Commons Attribution License")),
        2: permissions((BY, NC_WORDS)),
        3: permissions((BY, "a"), (f"{CC}/licenses/by-nc/4.0/", "b")),
        4: permissions(("https://example.org/terms", "")),
        5: permissions((f"{CC}/publicdomain/zero/1.0/", "")),
    }
    for number, content in contents.items():
        write_files(tmp_path / f"in/{number}", {"x.nxml": article_with(content, number), "f.jpg": red_image()})
    captions, rejects = run_build(tmp_path / "in", tmp_path / "commercial", license="commercial")
    assert list(captions) == ["PMC1_f1", "PMC5_f1"]
    assert [reason for _, _, reason in rejects] == [
        "licence not commercial: CC BY-NC (address: CC BY; words: CC BY-NC)",
        "licence not commercial: CC BY-NC (address: CC BY; address: CC BY-NC)",
        "licence not commercial: not understood: https://example.org/terms",
    ]
    build(IngestConfig(str(tmp_path / "in"), tmp_path / "all", workers=1))
    rows = manifest_rows(tmp_path / "all")
    values = [rows["PMC2_f1"][name] for name in ("licence", "licence_url", "licence_text", "licence_conflict")]
    assert values == ["CC BY-NC", BY, NC_WORDS, "address: CC BY; words: CC BY-NC"]
    assert [rows[f"PMC{n}_f1"]["licence"] for n in contents] == ["CC BY", "CC BY-NC", "CC BY-NC", None, "CC0"]
    assert not [row for row in reject_rows(tmp_path / "all") if "licence" in row[3]]


@pytest.mark.parametrize("license", ["commercial", "noncommercial", "all"])
def test_rules_accept_open_codes_only(license):
    open_codes = ["CC0", "public domain", "CC BY", "CC BY-SA", "CC BY-ND"]
    accepted = {
        "commercial": open_codes,
        "noncommercial": [*open_codes, "CC BY-NC", "CC BY-NC-SA", "CC BY-NC-ND"],
        "all": [*open_codes, "CC BY-NC", "CC BY-NC-SA", "CC BY-NC-ND", "Elsevier user licence", ""],
    }[license]
    codes = [*open_codes, "CC BY-NC", "CC BY-NC-SA", "CC BY-NC-ND", "Elsevier user licence", ""]
    assert [code for code in codes if not Rules(license).licence_problem(code)] == accepted


def test_real_articles_have_an_understood_licence(shared_data):
    articles = [jats.parse(path.read_bytes()) for path in (shared_data / "pmc_articles").glob("*/*/*.nxml")]
    assert Counter(article.licence for article in articles) == {"CC BY": 153, "CC BY-NC-ND": 1, "": 1}
    problems = {article.terms.problem for article in articles}
    assert problems == {"", "address: CC BY; words: CC BY-NC-ND", "not stated"}

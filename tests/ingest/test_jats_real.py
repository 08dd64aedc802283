"""Captions of real articles against a second extraction, and against readings of the XML by eye."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter

import pytest

from bclip_fast.ingest import jats
from bclip_fast.io.hashing import sha256

# The second extraction takes the text of `caption` without a space between title and paragraphs. It keeps attached
# files, references and invisible operators, writes fractions without a stroke, and ignores paragraphs outside the
# caption. For each difference, a person read the XML. These are hashes of the right texts.
CHECKED_BY_EYE = {
    "elife-30274-v1/fig2": "9bfac4057e849df3",  # attached file
    "elife-46793-v1/fig8": "b72368ccf3f79179",  # attached file
    "elife-46793-v1/fig8s3": "adb5514e872f9e00",  # attached file
    "elife-46793-v1/fig10": "6670e198f1cce9d7",  # attached file
    "elife-52882-v2/fig2": "82d67fd5a70beaa9",  # fraction, exponent
    "elife-52882-v2/fig3s1": "61303fa78f9a71d1",  # fraction
    "PMC4575751/F1": "e691933b609e62d9",  # panel legends
    "PMC4575751/F2": "db3047986a43be56",  # panel legends
    "PMC4575751/F3": "bf09c525647fe714",  # panel legends
    "elife-43154-v2/fig2": "a9609f5853a86195",  # reference
    "plosone-0178565/pone.0178565.g005": "0861951ef41584c4",  # reference
    "biorxiv-2020.04.07.030213/fig2": "e9ed48a9ed692b2d",  # reference
    "biorxiv-2020.04.07.030213/fig13": "94132d172468c88a",  # reference
    "PMC4657150/fig3": "f8998dfe5d607428",  # reference
    "PMC4737045/fig1": "59892a41c8006856",  # reference
    "PMC6206834/Fig3": "4c5318020a56b186",  # reference
    "PMC6206834/Fig4": "456d419e7d0f8767",  # reference
    "PMC6206834/Fig5": "660b2c9a2b5f4e2b",  # reference
    "PMC6206834/Fig7": "411b0cd3173bad56",  # reference
    "PMC6206834/Fig8": "30a27cf9fde193cd",  # reference
    "PMC6206834/Fig9": "5059c5bb431c09be",  # reference
    "PMC6206834/Fig10": "4489c357f32c95d6",  # reference
    "PMC6206834/Fig11": "ee7bb77c7e94e378",  # reference
    "PMC7870244/F1": "4633043a60180b05",  # reference
    "PMC7380168/f1": "0d4df5de2a9da0aa",  # reference
    "PMC7380168/f4": "0424845601f6fa00",  # reference
    "PMC6315527/nutrients-10-01916-f003": "8b236ce739ae9e05",  # reference
    "plosone-0091296/pone-0091296-g007": "21bb6054b87406fb",  # reference in plain text
}
# One figure of each of 40 articles. A person compared these captions with the XML.
COMPARED_WITH_XML = {
    "PMC6240187/Fig1": "26b550972f66821f",
    "elife-30274-v1/fig2s1": "34e2d8b103261151",
    "PMC4745289/fig1": "365987ea8f431968",
    "PMC7870244/F1": "4633043a60180b05",
    "PMC7906827/Fig2": "1c6f4915df0f0f82",
    "PMC4707348/fig1": "4f59356e5d594292",
    "PMC6150305/molecules-22-01763-f004": "53b04341134e7c34",
    "PMC4238170/fig4": "1281e61ea57b64c0",
    "PMC4736587/fig4": "197d264b3637f544",
    "PMC6151011/Fig1": "378253c712f9ad57",
    "PMC4738734/fig1": "47ae45252966bb04",
    "PMC2832770/F1": "4c95338571b61c68",
    "PMC4736231/fig1": "a5e31680dbab05c8",
    "PMC5806308/Fig1": "c225cbdf5c5dbd20",
    "PMC6215600/Fig1": "fbbc68bbbda6cfe0",
    "PMC5911624/cam41306-fig-0001": "4ebee1e1ac29c212",
    "PMC4745290/fig1": "6565c8b898fdc4c0",
    "PMC4735925/fig3": "7770aed42938f3ba",
    "PMC2803133/F1": "efae48d46bc4cf90",
    "PMC5203915/fig2": "c966240b3a1acbd1",
    "PMC4745327/fig1": "da877ac0b3858a1c",
    "PMC4889806/fig1": "0a3827a1bf169228",
    "PMC4736318/fig2": "98c35e6474f84f6b",
    "PMC5824918/Fig6": "a36ffc6c21805e02",
    "PMC5981179/F1": "96a237fc55753c7b",
    "PMC4736757/fig3": "1ba1dfb1d9e42797",
    "elife-46793-v1/fig9s2": "c13e2e8caee712f5",
    "biorxiv-2020.04.07.030213/fig25": "111d38c7a4795570",
    "PMC4709619/fig3": "b94e93237b1b817b",
    "PMC4738724/fig1": "7826b9d2e2df4236",
    "PMC7738016/F1": "f965dd4a4fc68198",
    "PMC7836185/Fig1": "9842fe030232e36e",
    "PMC4738934/fig1": "39a4432a4eb85ccf",
    "PMC7378597/fig6": "b90bbb6a9fe119d4",
    "PMC4558530/F4": "d65f1ca2de6575e4",
    "PMC7908915/F1": "b58f2265922dfed6",
    "PMC7667753/Fig2": "d83251f41e36d244",
    "PMC4736393/fig1": "10b3a79ef5361608",
    "PMC4735921/fig1": "48c50f921654eea5",
    "PMC4745307/fig1": "789b8e239ca11b22",
}
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")


def squeeze(text: str) -> str:
    return "".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def digest(text: str) -> str:
    return sha256(text)[:16]


@pytest.fixture(scope="module")
def articles_and_pairs(shared_data):
    folder = shared_data / "pmc_articles"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    parsed = {}
    for path in sorted(folder.glob("*/*/*.nxml")):
        figures = jats.parse(path.read_bytes()).figures
        parsed[f"{path.parent.parent.name}/{path.parent.name}"] = {figure.id: figure for figure in figures}
    return parsed, pairs


def test_captions_equal_second_extraction_except_checked_ones(articles_and_pairs):
    parsed, pairs = articles_and_pairs
    different = {}
    for pair in pairs:
        figure = parsed[pair["image"].rpartition("/")[0]][pair["figure_id"]]
        assert (figure.label, len(figure.graphics)) == (" ".join((pair["label"] or "").split()), 1)
        if squeeze(figure.caption) != squeeze(pair["caption"]):
            different[f"{pair['pmcid']}/{figure.id}"] = digest(figure.caption)
    assert len(pairs) == 558
    assert different == CHECKED_BY_EYE


def test_captions_equal_those_compared_with_the_xml(articles_and_pairs):
    parsed, _ = articles_and_pairs
    figures = {
        f"{folder.rpartition('/')[2]}/{name}": figure
        for folder, named in parsed.items()
        for name, figure in named.items()
    }
    assert {name: digest(figures[name].caption) for name in COMPARED_WITH_XML} == COMPARED_WITH_XML
    assert len(COMPARED_WITH_XML) == 40


def test_real_articles_have_title_licence_and_id(shared_data):
    articles = [jats.parse(path.read_bytes()) for path in (shared_data / "pmc_articles").glob("*/*/*.nxml")]
    assert Counter(bool(item.title) for item in articles) == {True: 155}
    # The address of one article says CC BY, and its words say NonCommercial-NoDerivatives.
    assert Counter(item.licence for item in articles) == {"CC BY": 153, "CC BY-NC-ND": 1, "": 1}
    assert all(item.pmcid or item.doi or item.pmid for item in articles if item.journal != "")

"""Words, language and quality of captions."""

from __future__ import annotations

import gzip
import json

import pytest

from bclip_fast.ingest.build import build
from bclip_fast.ingest.caption_facts import BOILERPLATE, NEAR_EMPTY, caption_facts, detected_language, quality
from bclip_fast.ingest.config import IngestConfig


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Figure 1.", NEAR_EMPTY),
        ("(A)", NEAR_EMPTY),
        ("Study flowchart.", NEAR_EMPTY),
        ("Fig. 3. Study design. Scale bar, 50 \u00b5m.", NEAR_EMPTY),
        ("See text for details.", BOILERPLATE),
        ("Click here for additional data file.", BOILERPLATE),
        ("Graphical abstract", BOILERPLATE),
        ("Supplementary Figure S1.", BOILERPLATE),
        ("Figure 2. (continued)", BOILERPLATE),
        ("Scale bars = 5 \u03bcm. Error bars indicate SD.", BOILERPLATE),
        ("\u00a9 2019 American Chemical Society. All rights reserved.", BOILERPLATE),
        ("This is an open-access article distributed under the terms of the Creative Commons licence.", BOILERPLATE),
        ("Image courtesy of Dr. Smith", BOILERPLATE),
        ("Chest CT scan.", ""),
        ("Photograph of a patient", ""),
        ("Figure 2. CT of the chest. See text for details. Scale bar, 1 cm.", ""),
        ("Images of the lung in two views", ""),
        ("Tables of results over time", ""),
        ("\u80f8\u90e8X\u7ebf\u7247\u663e\u793a\u53f3\u80ba", ""),
    ],
)
def test_quality(caption: str, expected: str):
    assert quality(caption) == expected


def test_own_label_does_not_count_as_words():
    assert quality("Box 12 lungs and hearts") == ""
    assert quality("Box 12 lungs and hearts", "Box 12 lungs") == NEAR_EMPTY


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Radiographie thoracique de face montrant de multiples opacit\u00e9s bilat\u00e9rales", "fr"),
        ("TC de t\u00f3rax, corte axial, com janela para o mediastino e contraste intravenoso", "pt"),
        ("R\u00f6ntgenbild der Lunge eines Patienten mit einem gro\u00dfen Tumor im rechten Oberlappen", "de"),
        ("\u80f8\u90e8X\u7ebf\u7247\u663e\u793a\u53f3\u80ba\u4e0a\u53f6\u6709\u4e00\u4e2a\u5927\u80bf\u7624", "zh"),
        ("Chest radiograph that shows bilateral opacities in both of the lower lobes", "en"),
        # Names of species, which detectors take for Latin, and texts that are too short to tell.
        ("Ocimum species of India. (A) Ocimum basilicum, (B) Ocimum americanum, (C) Ocimum gratissimum", "en"),
        ("Chest radiograph", ""),
        ("p < 0.05, n = 12 \u00b1 3, 4.5 (2.1-6.9)", ""),
    ],
)
def test_detected_language(text: str, expected: str):
    assert detected_language(text) == expected


def test_stated_language_counts_and_words_are_counted():
    facts = caption_facts("Radiographie du thorax de face (n = 2)", stated="pt")
    assert facts == {"num_words": 7, "caption_language": "pt", "caption_quality": ""}
    assert caption_facts("\u80f8\u90e8CT\u7247")["num_words"] == 4


def test_real_english_captions_are_rarely_marked(shared_data):
    """0.4 % of 14,446 captions are near empty. The detector takes 1 in 1,000 for another language."""
    with gzip.open(shared_data / "pairs/jats_captions_ccby_text.jsonl.gz", "rt") as file:
        lines = file.readlines()[::20]
    facts = [caption_facts(row["caption"], row["label"] or "") for row in map(json.loads, lines)]
    assert sum(each["caption_quality"] != "" for each in facts) < 0.01 * len(facts)
    languages = [each["caption_language"] for each in facts]
    assert languages.count("en") > 0.85 * len(facts)
    assert sum(language not in ("en", "") for language in languages) < 0.005 * len(facts)


def test_broken_detector_ends_the_build_and_rejects_no_article(tmp_path, monkeypatch):
    def broken() -> None:
        raise AttributeError("another release")

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.nxml").write_text("<article/>")
    monkeypatch.setattr("bclip_fast.ingest.extract.language_detector", broken)
    with pytest.raises(AttributeError, match="another release"):
        build(IngestConfig(str(tmp_path / "in"), tmp_path / "out", workers=1))

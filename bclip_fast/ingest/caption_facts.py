"""Facts about a caption for the manifest: its words, its language, and whether it says anything about the image.

The rules are data (`caption_rules.toml`). They mark captions, and drop none.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from bclip_fast.config import read_toml
from bclip_fast.data.sentences import split_sentences

NEAR_EMPTY, BOILERPLATE = "near_empty", "boilerplate"
QUALITIES = ("", NEAR_EMPTY, BOILERPLATE)

# Chinese, Japanese and Thai have no spaces between words, so each of their characters counts as a word.
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W_](?:[^\s\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff])*")
_LETTERS = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W\d_\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]{2,}")
_LABEL = re.compile(
    r"\W*(?:(?:supplementary|supplemental|extended data|additional|online|web)\s+)?"
    r"(?:fig(?:ure|s)?|figura|abbildung|abb|image|scheme|chart|plate|photo(?:graph)?|video|movie|file|table)s?\b[\s.:]*"
    r"[se]?\s?\d+\s?[a-z]?\b(?:\s?[-\u2013,&]\s?(?:\d+|[a-z])\b)*[\s.:|\u2013\u2014-]*",
    re.IGNORECASE,
)
# The language of a caption shows in its beginning.
_MAX_DETECTED = 1000
# No boilerplate is longer. The limit also bounds the time of the patterns.
_MAX_BOILERPLATE = 400


def caption_facts(caption: str, label: str = "", stated: str = "") -> dict[str, Any]:
    """Return `num_words`, `caption_language` and `caption_quality` of a caption.

    Args:
        label: the label of the figure, such as "Figure 1".
        stated: language that the XML states, such as "pt". Empty: the XML states none, so the language is detected.

    Returns:
        `caption_language` is a code of ISO 639-1, and empty if the caption is too short or too uncertain to tell.
        `caption_quality` is one of QUALITIES. near_empty: fewer than `min_words` words apart from its label and
        boilerplate. boilerplate: only sentences that describe no image, such as a link or a licence.
    """
    return {
        "num_words": len(_WORD.findall(caption)),
        "caption_language": stated or detected_language(caption),
        "caption_quality": quality(caption, label),
    }


def quality(caption: str, label: str = "") -> str:
    """Return the quality of a caption, one of QUALITIES."""
    sentences = [sentence for sentence in split_sentences(_without_label(caption, label)) if _LETTERS.search(sentence)]
    own = [sentence for sentence in sentences if not _is_boilerplate(sentence)]
    if not own:
        return BOILERPLATE if sentences or _is_boilerplate(caption) else NEAR_EMPTY
    return NEAR_EMPTY if sum(len(_LETTERS.findall(sentence)) for sentence in own) < _rules()["min_words"] else ""


def detected_language(text: str) -> str:
    """Return the language of a text as a code of ISO 639-1. Empty if the text is too short or too uncertain."""
    rules = _rules()
    if len(_LETTERS.findall(text)) < rules["language_min_words"]:
        return ""
    language, probability = language_detector().classify(text[:_MAX_DETECTED])
    return str(language) if probability >= rules["language_min_probability"] else ""


def _without_label(caption: str, label: str) -> str:
    if label and caption.startswith(label):
        caption = caption[len(label) :].lstrip(" .:|-\u2013\u2014")
    match = _LABEL.match(caption)
    return caption[match.end() :] if match else caption


def _is_boilerplate(sentence: str) -> bool:
    return len(sentence) <= _MAX_BOILERPLATE and bool(_rules()["pattern"].fullmatch(_normalised(sentence)))


def _normalised(sentence: str) -> str:
    return " ".join(re.sub(r"[^\w\s#\u00a9]", " ", re.sub(r"\d+(?:[.,]\d+)*", "#", sentence.lower())).split())


@functools.cache
def _rules() -> dict[str, Any]:
    rules = read_toml(Path(__file__).with_name("caption_rules.toml"), "rules of captions")
    return {**rules, "pattern": re.compile("|".join(f"(?:{phrase})" for phrase in rules["boilerplate"]))}


@functools.cache
def language_detector() -> Any:
    """Return the detector of py3langid, whose model is a file of the installed package.

    Release 0.4 has another model, whose probabilities mean something else. The rules are measured with 0.3.
    """
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    detector = LanguageIdentifier.from_pickled_model(MODEL_FILE, norm_probs=True)
    detector.set_languages(_rules()["languages"])
    return detector

"""What is known of a sample picture, and the sentence that says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bclip_fast.config import read_toml

_PROMPT_SETS = Path(__file__).parents[1] / "eval" / "prompt_sets"
# Label kind -> label -> noun phrases that fit "a photo of ...". Captions and prompts use the same phrases.
LABELS: dict[str, dict[str, list[str]]] = {
    kind: table["classes"] for kind, table in read_toml(_PROMPT_SETS / "sample_images.toml").items()
}

_TERSE = 0.4  # share of captions; prompts of zero-shot classification are terse too


@dataclass(frozen=True)
class Facts:
    """What headers, geometry and documentation say; the keys of `LABELS`, None where unknown.

    `details` are further phrases ("slice thickness 5 mm"), a few of which a caption names.
    """

    modality: str
    body_part: str | None = None
    plane: str | None = None
    sequence: str | None = None
    stain: str | None = None
    details: tuple[str, ...] = ()

    def labels(self) -> dict[str, str]:
        """The label of each kind that applies."""
        values = {kind: getattr(self, kind) for kind in LABELS}
        return {kind: value for kind, value in values.items() if value is not None}


def _pick(choices: Sequence[str], random: np.random.Generator) -> str:
    return choices[int(random.integers(len(choices)))]


def _noun(facts: Facts, random: np.random.Generator) -> str:
    if facts.sequence is None:
        return _pick(LABELS["modality"][facts.modality], random)
    if facts.sequence == "T1" and random.random() < 0.5:
        return f"T1-weighted {_pick(LABELS['modality']['MR'], random)}"
    return _pick(LABELS["sequence"][facts.sequence], random)


def _article(phrase: str) -> str:
    # MRI and MR are spoken as letters; no noun here begins with a silent h or a long u but these.
    vowel = phrase[0].lower() in "aeio" or phrase.startswith(("MR", "ultra", "X-ray"))
    return f"{'an' if vowel else 'a'} {phrase}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _abridged(facts: Facts, random: np.random.Generator) -> Facts:
    known = [kind for kind in ("plane", "body_part", "stain") if getattr(facts, kind) is not None]
    kept = _pick(known, random) if known else None
    return replace(
        facts,
        details=(),
        plane=facts.plane if kept == "plane" else None,
        body_part=facts.body_part if kept == "body_part" else None,
        stain=facts.stain if kept == "stain" else None,
    )


def compose(facts: Facts, random: np.random.Generator) -> str:
    """One caption: modality, plane, body part and stain, and up to two details.

    Two in five are terse, as many captions are: it names the modality and one thing more.
    """
    if random.random() < _TERSE:
        facts = _abridged(facts, random)
    noun = _noun(facts, random)
    part = "" if facts.body_part is None else _pick(LABELS["body_part"][facts.body_part], random)
    of_part = f" of the {part}" if part else ""
    stain = ""
    if facts.stain is not None:
        joiner = _pick(["stained with", "with", "showing"], random)
        stain = f" {joiner} {_pick(LABELS['stain'][facts.stain], random)}"
    num_details = min(len(facts.details), int(random.integers(0, 3)))
    chosen = random.permutation(len(facts.details))[:num_details]
    details = [facts.details[i] for i in sorted(chosen)]

    if facts.plane is None:
        subject = f"{noun}{of_part}{stain}"
    else:
        slice_noun = _pick(LABELS["plane"][facts.plane], random)
        subject = _pick(
            [
                f"{facts.plane} {noun}{of_part}{stain}",
                f"{noun}{of_part}{stain}, {slice_noun}",
                f"{slice_noun}{of_part}, {noun}{stain}",
            ],
            random,
        )
    listed = ", ".join(details)
    forms = [
        f"{_capital(subject)}{', ' if listed else ''}{listed}.",
        f"{_capital(subject)}." + (f" {_capital('; '.join(details))}." if details else ""),
        f"{_capital(_article(subject))}{f' ({listed})' if listed else ''}.",
        f"Figure showing {_article(subject)}{': ' if listed else ''}{listed}.",
    ]
    return _pick(forms, random)

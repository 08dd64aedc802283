"""Facts about a sample image, and captions that state them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bclip_fast.config import read_toml

_PROMPT_SETS = Path(__file__).parents[1] / "eval" / "prompt_sets"
# For each kind and label: noun phrases that fit "a photo of ...". Captions and prompts use the same phrases.
LABELS: dict[str, dict[str, list[str]]] = {
    kind: table["classes"] for kind, table in read_toml(_PROMPT_SETS / "sample_images.toml").items()
}

# Share of terse captions. The prompts of zero-shot classification are terse too.
_TERSE = 0.4


@dataclass(frozen=True)
class Facts:
    """Facts from headers, geometry and documentation.

    The fields that are kinds of `LABELS` hold a label, or None if it is unknown. `details` are further phrases, such as
    "slice thickness 5 mm". A caption uses at most two of them.
    """

    modality: str
    body_part: str | None = None
    plane: str | None = None
    sequence: str | None = None
    stain: str | None = None
    details: tuple[str, ...] = ()

    def labels(self) -> dict[str, str]:
        """Return the labels by kind, without unknown ones."""
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
    # MRI, MR and X-ray start with the name of a letter. "ultra" is the only noun here that starts with a u.
    vowel = phrase[0].lower() in "aeio" or phrase.startswith(("MR", "ultra", "X-ray"))
    return f"{'an' if vowel else 'a'} {phrase}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _abridged(facts: Facts, random: np.random.Generator) -> Facts:
    kinds = [kind for kind in ("plane", "body_part", "stain") if getattr(facts, kind) is not None]
    kept = _pick(kinds, random) if kinds else None
    return replace(
        facts,
        details=(),
        plane=facts.plane if kept == "plane" else None,
        body_part=facts.body_part if kept == "body_part" else None,
        stain=facts.stain if kept == "stain" else None,
    )


def compose(facts: Facts, random: np.random.Generator) -> str:
    """Return a caption with modality, plane, body part, stain, and up to two details.

    Two in five captions are terse: they state the modality and one other fact.
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
    indices = random.permutation(len(facts.details))[:num_details]
    details = [facts.details[i] for i in sorted(indices)]

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

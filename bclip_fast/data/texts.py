"""The choice of one text for each sample, of the caption and the other texts that its shard holds.

The text of a sample depends only on (seed, pass over its dataset, sample), as its crop does. So it depends neither on
the ranks and workers nor on an interruption.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sized
from dataclasses import dataclass, fields

from bclip_fast.errors import UserError

from .shards.format import CAPTION, Sample
from .shards.mixed import Dataset

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class CaptionWeights:
    """Weights of the kinds of texts. A sample draws a kind among those it has, then one of its texts of this kind."""

    caption: float = 1.0
    """The caption of the figure or panel. A sample without any text of a weighted kind also takes its caption."""
    mention: float = 0.0
    """The sentences of the article that cite the figure."""
    panel: float = 0.0
    """The parts of the caption that describe one panel of the figure."""
    title: float = 0.0
    """The title of the article, then the caption."""

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not 0 <= weight < float("inf"):
                raise UserError(f"data.captions.{name}={weight} must be finite and not negative")
        if not self.kinds:
            raise UserError("data.captions has only weights of 0; set at least one of them above 0")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds with a weight above 0."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name))

    def check(self, dataset: Dataset) -> None:
        """Raise UserError if no sample of `dataset` has a text of one of the kinds."""
        counts = dataset.num_samples_with()
        if missing := [kind for kind in self.kinds if not counts.get(kind)]:
            known = ", ".join(f"{kind} ({count} samples)" for kind, count in counts.items())
            raise UserError(
                f"data.captions.{missing[0]}={getattr(self, missing[0])}: no sample of {dataset.root} (split "
                f"{dataset.split}) has such a text; they have {known}; set it to 0, or build the shards with texts"
            )


class TextChoice:
    """Draws the text of each sample.

    Args:
        seed: seed of the run.
    """

    def __init__(self, weights: CaptionWeights, seed: int) -> None:
        self._weights = {kind: float(getattr(weights, kind)) for kind in weights.kinds}
        self._seed = seed
        self._state = functools.lru_cache(4)(self._state_of_pass)

    def draw(self, number: int, index: int, texts: Mapping[str, Sized]) -> tuple[str, int]:
        """Return the kind of the text of a sample, and its position among the sample's texts of this kind.

        Args:
            number: number of the pass over the sample's dataset. Without a mixture, it is the epoch.
            index: index of the sample in the dataset.
            texts: the texts of the sample by kind, or anything else of the same numbers.
        """
        weights = {kind: weight for kind, weight in self._weights.items() if texts.get(kind)}
        if not weights:
            return CAPTION, 0
        if len(weights) == 1 and len(texts[kind := next(iter(weights))]) == 1:
            return kind, 0
        first, second = self._random(number, index, 1), self._random(number, index, 2)
        remaining = first / 2**64 * sum(weights.values())
        for kind in weights:
            remaining -= weights[kind]
            if remaining < 0:
                break
        return kind, second * len(texts[kind]) >> 64

    def draw_part(self, number: int, index: int, num_parts: int) -> int:
        """Return the part of a long text that a sample draws, from 0 to `num_parts` - 1. `draw` describes the rest."""
        return self._random(number, index, 3) * num_parts >> 64

    def _random(self, number: int, index: int, place: int) -> int:
        """Return one of a sample's random numbers of 64 bits."""
        state = _mix(self._state(number) ^ (index + 1) * _GOLDEN & _MASK)
        return _mix(state + place * _GOLDEN & _MASK)

    def _state_of_pass(self, number: int) -> int:
        return _mix(_mix((self._seed + 1) * _GOLDEN & _MASK) ^ (number + 1) * _GOLDEN & _MASK)

    def text(self, number: int, index: int, sample: Sample) -> str:
        """Return the text of a sample that was read."""
        texts = {CAPTION: [sample.caption], **sample.texts}
        kind, place = self.draw(number, index, texts)
        return texts[kind][place]

    def num_bytes(self, number: int, index: int, dataset: Dataset) -> int:
        """Return the size of the text of a sample. Only reads the index."""
        if tuple(self._weights) == (CAPTION,):
            return dataset.caption_bytes(index)
        sizes = dataset.text_bytes(index)
        kind, place = self.draw(number, index, sizes)
        return sizes[kind][place]


def _mix(value: int) -> int:
    """Apply the finaliser of SplitMix64 (Steele, Lea, Flood 2014) to a number of 64 bits."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31

"""A part of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bclip_fast.io.hashing import sha256

from . import EvalDataset


class SubsetDataset:
    """The samples `rows` of `base`, in this order. See `EvalDataset`."""

    def __init__(self, base: EvalDataset, rows: Sequence[int]) -> None:
        """Keep a view of the base. It copies no image."""
        self.base, self.rows = base, list(rows)
        self.path, self.split, self.label_kinds = base.path, base.split, base.label_kinds

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the base's fingerprint and the rows."""
        return sha256(f"{self.base.fingerprint} {self.rows}")

    @property
    def questions(self) -> list[Any]:
        """The questions of a base that has them."""
        questions = self.base.questions  # type: ignore[attr-defined]
        return [questions[row] for row in self.rows]

    @property
    def groups(self) -> list[str] | None:
        """The groups of the samples, such as patients, or None if the base has none."""
        groups = getattr(self.base, "groups", None)
        return groups and [groups[row] for row in self.rows]

    def key(self, i: int) -> str:
        """Return the base's name of the sample."""
        return self.base.key(self.rows[i])

    def image(self, i: int) -> bytes:
        """Return the encoded image."""
        return self.base.image(self.rows[i])

    def captions(self) -> list[str] | None:
        """Return the captions of the samples, or None."""
        captions = self.base.captions()
        return captions and [captions[row] for row in self.rows]

    def labels(self, kind: str) -> list[str | None]:
        """Return the labels of one kind."""
        labels = self.base.labels(kind)
        return [labels[row] for row in self.rows]

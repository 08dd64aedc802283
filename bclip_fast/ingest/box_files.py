"""The files of panel boxes in an unfinished build: one for each group of packages, and boxes.json with the counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError


def boxes_path(folder: str | Path, number: int) -> Path:
    """Return the file of a group's boxes. folder: work/boxes."""
    return Path(folder) / f"{number // 1000:06d}" / f"{number:09d}.json"


def counts_path(folder: str | Path) -> Path:
    """Return the file that says that all groups have boxes."""
    return Path(folder).with_suffix(".json")


def read_boxes(path: str | Path) -> dict[str, Any]:
    """Return a group's boxes: for the SHA-256 of an image, (left, top, right, bottom, score) of each box, or a problem.

    Raises UserError for a damaged file, and deletes it, so that the next run writes it again with the same content.
    """
    path = Path(path)
    try:
        return dict(json.loads(path.read_bytes()))
    except ValueError:
        counts_path(path.parents[1]).unlink(missing_ok=True)
        path.unlink()
        raise UserError(
            f"{path} was damaged on the disk (a power failure?); run it again: the other boxes are kept"
        ) from None

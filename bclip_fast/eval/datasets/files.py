"""List and read image files of a data set."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from bclip_fast.data.image_files import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from bclip_fast.errors import UserError
from bclip_fast.io.file_names import printable

log = logging.getLogger(__name__)

_NUM_SHOWN = 20


def select_images(paths: Iterable[Path], root: Path) -> list[Path]:
    """Return the image files among `paths`, sorted. Log the images in formats that are not read.

    root: folder that the names in the log start from.
    """
    files = sorted(path for path in paths if path.is_file())
    unread = [printable(str(path.relative_to(root))) for path in files if path.suffix.lower() in UNREAD_SUFFIXES]
    if unread:
        names = ", ".join(unread[:_NUM_SHOWN]) + (", ..." if len(unread) > _NUM_SHOWN else "")
        log.warning("%s: left out %d images in formats that are not read: %s", root, len(unread), names)
    return [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]


def read_image(path: Path, remark: str = "") -> bytes:
    """Return the bytes of an image file. Raises UserError, whose message has `remark` after the path."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"image {path}{remark} cannot be read: {error.strerror}") from error

"""JSON files from untrusted sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError

from . import stand_ins

MAX_BYTES = 1 << 20


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object of at most `max_bytes`. Raises UserError."""
    try:
        if path.stat().st_size > max_bytes:
            raise UserError(f"{path} is larger than {max_bytes} bytes, too large for a configuration")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        stand_ins.refuse(path)
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content

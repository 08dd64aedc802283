"""The compiled modules of this installation, and the reason why one is missing."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

# setup.py writes this file.
_FILE = Path(__file__).parents[1] / "build_info.json"


def why_missing(module: str, file: Path = _FILE) -> str | None:
    """Return the reason why `module`, "bclip_fast._cpu" or "bclip_fast._cuda", is missing, or None if it is installed.

    file: the file that the build wrote.
    """
    if find_spec(module) is not None:
        return None
    try:
        info = json.loads(file.read_bytes())
        reason, built = str(info["reason"]), module in info["modules"]
    except (OSError, ValueError, KeyError, TypeError):
        reason, built = "", False  # a source tree in which setup.py built nothing
    if reason:
        return f"bclip_fast was built without compiled modules: {reason}"
    if built:
        return f"{module} was built for another Python than this one ({sys.implementation.cache_tag})"
    return f"{module} is not installed"

"""The compiled modules of this installation, and the reasons why a module, or a part of it, is missing."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# setup.py writes this file.
_FILE = Path(__file__).parents[1] / "build_info.json"


def why_missing(module: str, file: Path = _FILE) -> str | None:
    """Return the reason why `module`, "bclip_fast._cpu" or "bclip_fast._cuda", is missing, or None if it is installed.

    file: the file that the build wrote.
    """
    if find_spec(module) is not None:
        return None
    if reason := _field(file, "reason"):
        return f"bclip_fast was built without compiled modules: {reason}"
    if module in _field(file, "modules"):
        return f"{module} was built for another Python than this one ({sys.implementation.cache_tag})"
    return f"{module} is not installed"


def why_no_hopper(file: Path = _FILE) -> str:
    """Return the reason why the CUDA module was built without the kernels for Hopper, or "" if it is unknown.

    file: the file that the build wrote.
    """
    return _field(file, "no_hopper")


def _field(file: Path, name: str) -> Any:
    """A field of the file, or "" without it: in a source tree, setup.py may have built nothing."""
    try:
        return json.loads(file.read_bytes())[name]
    except (OSError, ValueError, KeyError, TypeError):
        return ""

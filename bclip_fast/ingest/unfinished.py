"""The unfinished build of an earlier run: what decides its parts, and whether a run may continue it."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

from bclip_fast.data.shards.format import to_json
from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256_of_file, sha256_of_sources

log = logging.getLogger(__name__)


def can_resume(allow_changes: bool, folder: Path, signature: dict[str, Any]) -> bool:
    """Return whether the files of an earlier run in `folder` have the same options.

    Raises:
        UserError: other code or packages wrote them, and `allow_changes` is False.
    """
    recorded = _recorded(folder)
    if recorded is None or (folder / "dataset.json").exists():
        return recorded is not None and bool(recorded["config"] == json.loads(to_json(signature["config"])))
    changed = [name for name, value in json.loads(to_json(signature)).items() if recorded.get(name) != value]
    if "config" in changed or any(name in changed and name in recorded for name in ("tokenizer", "panel_model")):
        log.warning("the parts of an earlier run had other options; they are written again")
        return False
    if changed and not allow_changes:
        raise UserError(
            f"the unfinished build in {folder} has parts of other {' and '.join(changed)}; finish it with the version "
            "that began it, keep its parts with --allow_changes, or delete the folder to begin again"
        )
    return True


def recorded_options(folder: Path) -> dict[str, Any] | None:
    """Return the options of the unfinished build in `folder`. None without one."""
    recorded = _recorded(folder)
    return None if recorded is None else recorded["config"]


def _recorded(folder: Path) -> dict[str, Any] | None:
    try:
        if (folder / "dataset.json").exists():
            return {"config": json.loads((folder / "dataset.json").read_bytes())["ingest"]["config"]}
        recorded = json.loads((folder / "work/signature.json").read_bytes())
        # An earlier version recorded only the options.
        return recorded if "config" in recorded else {"config": recorded}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def work_signature(options: dict[str, Any], tokenizer: Path | None, panel_model: str = "") -> dict[str, Any]:
    """Return all that decides the parts of a run.

    Args:
        options: those that affect the bytes of the dataset.
        panel_model: hash of the panel detector's files. Empty: the build has none.
    """
    packages = {
        name: importlib.metadata.version(name) for name in ("pillow", "lxml", "numpy", "tokenizers", "py3langid")
    }
    code = sha256_of_sources("ingest", "data", "model/tokenizer.py")
    if panel_model:
        packages |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    detector = {"panel_model": panel_model} if panel_model else {}
    return {
        **detector,
        "config": options,
        "tokenizer": tokenizer and sha256_of_file(tokenizer),
        "code": code,
        "packages": packages,
    }

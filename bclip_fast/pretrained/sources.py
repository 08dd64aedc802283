"""Where the files of a checkpoint are: a folder or the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bclip_fast.errors import UserError, first_line
from bclip_fast.model.open_clip_config import CONFIG_FILE

HUB_PREFIX = "hf-hub:"
_MAX_JSON_BYTES = 1 << 20


class Source(Protocol):
    """Where the files of one checkpoint are."""

    def get(self, names: Sequence[str]) -> Path:
        """The first of these files that is there. Raises UserError if none is."""
        ...


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, names: Sequence[str]) -> Path:
        for name in names:
            if (self.path / name).is_file():
                return self.path / name
        raise UserError(f"{self.path} holds no {' or '.join(names)}")


class Hub:
    def __init__(self, name: str) -> None:
        self.repository, _, revision = name.partition("@")
        self.revision = revision or None

    def get(self, names: Sequence[str]) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError

        absent: Exception | None = None
        for name in names:
            try:
                return Path(hf_hub_download(self.repository, name, revision=self.revision))
            except EntryNotFoundError as error:  # not in the repository, or no network and not in the cache
                absent = error
            except HFValidationError as error:
                raise UserError(f"{self.repository!r} is no repository id of the hub (org/name): {error}") from error
            except OSError as error:  # unknown repository, no permission, connection
                raise UserError(f"hf-hub:{self.repository}: {name} cannot be fetched: {first_line(error)}") from error
        raise UserError(f"hf-hub:{self.repository} gave no {' or '.join(names)}: {first_line(absent)}") from absent


def source_of(name_or_path: str | Path) -> Source:
    name = str(name_or_path)
    if name.startswith(HUB_PREFIX):
        return Hub(name.removeprefix(HUB_PREFIX))
    folder = Path(name_or_path)
    for path in (folder, folder / "model"):
        if (path / CONFIG_FILE).is_file():
            return Folder(path)
    if not folder.is_dir():
        raise UserError(f"{name} is not a folder; a model of the hub is named hf-hub:ORG/NAME")
    raise UserError(f"{name} holds no {CONFIG_FILE}, neither does {folder / 'model'}")


def hub_json(name: str) -> dict[str, Any]:
    return read_json(Hub(name).get(["config.json"]))


def read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path} is larger than {_MAX_JSON_BYTES} bytes; that is no configuration")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content

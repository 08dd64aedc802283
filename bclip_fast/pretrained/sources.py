"""The files of a checkpoint, from a folder or from the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bclip_fast.errors import UserError, first_line
from bclip_fast.io import stand_ins
from bclip_fast.io.atomic import settle
from bclip_fast.io.json_files import read_object
from bclip_fast.model import tokenizer_files
from bclip_fast.model.open_clip_sections import CONFIG_FILE

log = logging.getLogger(__name__)

HUB_PREFIX = "hf-hub:"
TRANSFORMERS_CONFIG = "config.json"
PMC_CLIP_FILES = ("image_encoder(resnet50).pth", "checkpoint.pt")
"""The files by which a checkpoint of PMC-CLIP is found: its parts, and the checkpoint of its training."""


class Source(Protocol):
    """Access to the files of one checkpoint."""

    def get(self, names: Sequence[str]) -> Path:
        """Return the path of the first of these files that exists. Raises UserError if none exists."""
        ...

    def find(self, name: str) -> Path | None:
        """Return the path of a file, or None if the source doesn't have it. Raises UserError."""
        ...


class Folder:
    """A local folder. See `Source`."""

    def __init__(self, path: Path) -> None:
        """path: need not exist."""
        self.path = path

    def get(self, names: Sequence[str]) -> Path:
        """Return the path of the first of these files that exists. Raises UserError if none exists."""
        for name in names:
            if (self.path / name).is_file():
                return self.path / name
        for name in names:
            if path := stand_ins.unfinished(self.path, name):
                raise UserError(
                    f"{self.path} holds no {name}, but an unfinished download of it, {path}; download it again"
                )
        raise UserError(f"{self.path} holds no {' or '.join(names)}")

    def find(self, name: str) -> Path | None:
        """Return the path of a file, or None if the folder doesn't have it."""
        return self.path / name if (self.path / name).is_file() else None


class Hub:
    """A repository of the Hugging Face hub. See `Source`."""

    def __init__(self, name: str) -> None:
        """name: ORG/NAME[@REVISION]."""
        self.repository, _, revision = name.partition("@")
        self.revision = revision or None

    def get(self, names: Sequence[str]) -> Path:
        """Download the first of these files that exists, unless it is cached. Raises UserError."""
        from huggingface_hub.errors import EntryNotFoundError

        last_error: EntryNotFoundError | None = None
        for name in names:
            path_or_error = self._download(name)
            if isinstance(path_or_error, Path):
                return path_or_error
            last_error = path_or_error
        raise UserError(
            f"hf-hub:{self.repository} gave no {' or '.join(names)}: {first_line(last_error)}"
        ) from last_error

    def find(self, name: str) -> Path | None:
        """Download a file, unless it is cached. None if the repository or, offline, the cache lacks it."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        path_or_error = self._download(name)
        if isinstance(path_or_error, LocalEntryNotFoundError):
            log.warning("hf-hub:%s: %s isn't in the cache, and the hub can't be asked for it", self.repository, name)
        return path_or_error if isinstance(path_or_error, Path) else None

    def _download(self, name: str) -> Any:
        """Return the path of a file, or the EntryNotFoundError. Raises UserError for all other errors."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError

        try:
            return Path(hf_hub_download(self.repository, name, revision=self.revision))
        except EntryNotFoundError as error:  # not in the repository, or neither in the cache nor reachable
            return error
        except HFValidationError as error:
            raise UserError(
                f"{self.repository!r} is not a repository id of the hub; use ORG/NAME: {first_line(error)}"
            ) from error
        except OSError as error:  # unknown repository, no permission, no connection
            reason = first_line(error)
            raise UserError(f"hf-hub:{self.repository}: {name} cannot be downloaded: {reason}") from error


def source_of(name_or_path: str | Path) -> Source:
    """Return the source of a checkpoint: a short name (`named_models`), hf-hub:ORG/NAME, its folder, or a run folder.

    Raises:
        UserError: a folder without open_clip_config.json, config.json or PMC-CLIP's files.
    """
    from .named_models import source_of_name  # it builds on this module

    name = str(name_or_path)
    if isinstance(name_or_path, str) and (named := source_of_name(name)) is not None:
        return named
    if name.startswith(HUB_PREFIX):
        return Hub(name.removeprefix(HUB_PREFIX))
    folder = Path(name_or_path)
    for path in (folder, folder / "model"):
        settle(path)
        if (path / CONFIG_FILE).is_file():
            return Folder(path)
    if any((folder / name).is_file() for name in (TRANSFORMERS_CONFIG, *PMC_CLIP_FILES)):
        return Folder(folder)
    if not folder.is_dir() and "=" in name:
        raise UserError(
            f"{name} is not a folder, and {name.partition('=')[0]} is not a short name of a model (NAME=FOLDER); pass "
            "a folder, or hf-hub:ORG/NAME"
        )
    if not folder.is_dir():
        raise UserError(f"{name} is not a folder; for a model of the hub, use hf-hub:ORG/NAME")
    raise UserError(
        f"{name} holds no {CONFIG_FILE}, and neither does {folder / 'model'}; nor does it hold transformers' "
        f"{TRANSFORMERS_CONFIG} or the files of PMC-CLIP"
    )


def tokenizer_file(source: Source) -> Path:
    """Return the file of a tokenizer's pipeline, with the files of its settings in the same folder.

    Raises:
        UserError: the source has none, or only a tokenizer of another kind.
    """
    for name in tokenizer_files.SETTINGS:  # the folder holds only downloaded files of a repository
        source.find(name)
    for name in (*tokenizer_files.PIPELINES, *tokenizer_files.OTHER_KINDS):
        if path := source.find(name):
            return path
    return source.get(tokenizer_files.PIPELINES)


def hub_json(name: str) -> dict[str, Any]:
    """Return config.json of the hub's repository `name`. Raises UserError."""
    return read_object(Hub(name).get(["config.json"]))

"""`bclip push FOLDER ORG/NAME`: upload a folder of `bclip export` to the Hugging Face hub.

Without --yes, nothing leaves the machine. The command only prints the files and their destination.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import tyro

from bclip_fast.errors import UserError, first_line
from bclip_fast.io.folders import Listing
from bclip_fast.pretrained.model_card import FILE as CARD

log = logging.getLogger(__name__)

_TOKEN_HELP = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Upload an exported model to the Hugging Face hub. Without --yes, only print what would be uploaded."""

    folder: tyro.conf.Positional[Path]
    """Folder of `bclip export`."""
    repository: tyro.conf.Positional[str]
    """Repository ORG/NAME. It is created if necessary."""
    yes: bool = False
    """Upload."""
    public: bool = False
    """Create a repository that everyone can read. An existing repository stays as it is."""
    message: str = "Upload a model of bclip_fast"
    """Title of the commit."""


def run(config: PushConfig) -> None:
    """Run `bclip push`.

    Raises:
        UserError: the folder holds no exported model, the name is malformed, or the hub refuses the upload.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(config.repository)
    except HFValidationError as error:
        raise UserError(f"repository={config.repository!r}: {first_line(error)}; pass ORG/NAME") from error
    if config.repository.count("/") != 1:
        raise UserError(f"repository={config.repository!r} must be ORG/NAME")
    files = _files(config.folder)
    api = HfApi()
    place = f"{constants.ENDPOINT}/{config.repository}"
    for path in files:
        print(f"{path.stat().st_size:>14,} bytes  {path.relative_to(config.folder).as_posix()}")
    total = sum(path.stat().st_size for path in files)
    kind = "public" if config.public else "private"
    print(f"{total:>14,} bytes in {len(files)} files, to {place} (a new repository is {kind})")
    if not config.yes:
        print("Nothing was uploaded; add --yes to upload these files.")
        return
    try:
        api.create_repo(config.repository, private=not config.public, exist_ok=True)
        operations = [CommitOperationAdd(path.relative_to(config.folder).as_posix(), path) for path in files]
        commit = api.create_commit(config.repository, operations, commit_message=config.message)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        remedy = _TOKEN_HELP if status in (401, 403) else "run the command again"
        raise UserError(f"{place} refused the upload: {first_line(error)}; {remedy}") from error
    except (OSError, _client_error(HfHubHTTPError)) as error:
        raise UserError(
            f"{place} cannot be reached: {first_line(error)}; check the network, and run the command again"
        ) from error
    print(f"uploaded: {commit.commit_url}")


def _client_error(error: type[Exception]) -> type[Exception]:
    """The base class of the errors of the hub's HTTP client, such as a failed connection.

    The client is requests, httpx or httpx2. Its connection errors aren't OSErrors in every release of huggingface_hub.

    Args:
        error: the hub's own error, which inherits from the client's.
    """
    return next(base for base in error.__mro__[1:] if issubclass(base, Exception))


def _files(folder: Path) -> list[Path]:
    """The files of an exported model, sorted. Hidden files and links stay here.

    Raises:
        UserError: the folder doesn't exist, or isn't an exported model.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass the folder of `bclip export`")
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} has no model card {CARD}; `bclip export` writes one")
    listing = Listing(folder)
    files = [path for path in listing.files_below(folder) if not path.is_symlink()]
    listing.log()
    if not any(path.suffix in (".safetensors", ".onnx") for path in files):
        raise UserError(f"{folder} holds no weights (.safetensors or .onnx); pass the folder of `bclip export`")
    return sorted(files)

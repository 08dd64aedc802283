"""`bclip eval fetch TASK --data DIR`: fetch the public data of tasks, after their licence has been shown.

Each file is written as NAME.part, checked, and renamed. So a file is complete or absent, and an interrupted download
continues with a Range request if the server still has the same file. Data that need a login or work by hand are
described with their address.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import tyro

from bclip_fast.config import read_toml
from bclip_fast.errors import UserError, choices, first_line
from bclip_fast.io import stand_ins
from bclip_fast.io.atomic import replacing, replacing_folder
from bclip_fast.io.hashing import blocks

from . import suites, tasks
from .download import Remote, download, part_of, probe

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "downloads.toml"
_MAX_RATIO = 200
_MIN_BOMB = 1 << 30


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch. path: place below --data. unpack: "", gzip or zip. md5: hexadecimal, or "" if none is stated."""

    url: str
    path: str
    unpack: str = ""
    md5: str = ""

    @property
    def name(self) -> str:
        """The file's name in its address."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class DataSource:
    """The source of a data set. by_hand: instructions for a person, if the source has no files."""

    title: str
    page: str
    licence: str
    files: tuple[RemoteFile, ...] = ()
    by_hand: str = ""


@dataclass(frozen=True)
class FetchCommand:
    """Fetch the public data of tasks."""

    tasks: tyro.conf.Positional[tuple[str, ...]]
    """Tasks (medpmc_pcam, medpmc_kather_et_al_2016, ...) or a suite (medpmc)."""
    data: str
    """Folder for the data. Each data set gets the subfolder in which the tasks look for it."""
    yes: bool = False
    """Fetch without a question after the addresses, sizes, checksums and licences have been shown."""
    mirror: str = ""
    """Address of a folder that holds all files by their names, to fetch them from there."""


def sources() -> dict[str, DataSource]:
    """Return all sources by their names."""
    return {
        name: DataSource(**{**table, "files": tuple(RemoteFile(**file) for file in table.get("files", []))})
        for name, table in read_toml(SOURCES).items()
    }


def run(command: FetchCommand, *, ask: Callable[[str], str] | None = None) -> int:
    """Show and fetch the data. Return 1 if some have to be had by hand or the user declines, else 0.

    Raises:
        UserError: an unknown task, a task without a source, or a file that cannot be fetched or has a wrong checksum.
    """
    root = Path(command.data)
    selected = _selected(command.tasks)
    by_hand = {name: source for name, source in selected.items() if not source.files}
    missing = [
        (source, file) for source in selected.values() for file in source.files if not (root / file.path).exists()
    ]
    for name, source in selected.items():
        print(f"{source.title} ({name})\n  page     {source.page}\n  licence  {source.licence}")
        for file in source.files:
            if (root / file.path).exists():
                print(f"  there    {root / file.path}")
        if source.by_hand:
            print(f"  by hand  {source.by_hand.replace('DIR', str(root))}")
    remotes = []
    for _, file in missing:
        url = f"{command.mirror.rstrip('/')}/{file.name}" if command.mirror else file.url
        remote = probe(url)
        remotes.append((file, remote))
        print(f"fetch {url}\n  to       {root / file.path}\n  size     {_size(remote)}")
        print(f"  checksum {_checksum(file, remote)}")
    if not remotes:
        return int(bool(by_hand))
    if not command.yes and not _agreed(ask):
        log.warning("nothing was fetched; answer yes, or pass --yes")
        return 1
    for file, remote in remotes:
        _fetch(root, file, remote)
    return int(bool(by_hand))


def _selected(names: Sequence[str]) -> dict[str, DataSource]:
    available = sources()
    selected: dict[str, DataSource] = {}
    for name in names:
        members = suites.load(name).tasks if name in suites.names() else (_task(name),)
        for task in members:
            if task.download not in available:
                raise UserError(
                    f"task {task.name} has no data to fetch; get them from {task.download_url or 'their owner'}"
                )
            selected[task.download] = available[task.download]
    return selected


def _task(name: str) -> tasks.Task:
    if name in tasks.protocols() or name not in tasks.names():
        known = [*suites.names(), *(task for task in tasks.names() if task not in tasks.protocols())]
        raise UserError(f"unknown task {name!r}{choices(name, known)}")
    return tasks.load(name)


def _size(remote: Remote) -> str:
    return "unknown" if remote.size is None else f"{remote.size:,} bytes, as the server says"


def _checksum(file: RemoteFile, remote: Remote) -> str:
    if file.md5:
        return f"MD5 {file.md5}"
    return f"SHA-256 {remote.sha256}, as the server says" if remote.sha256 else "unknown"


def _agreed(ask: Callable[[str], str] | None) -> bool:
    if ask is None:
        if not sys.stdin.isatty():
            return False
        ask = input
    return ask("Fetch these files under their licences? [yes/no] ").strip().lower() in ("y", "yes")


def _fetch(root: Path, file: RemoteFile, remote: Remote) -> None:
    target = root / file.path
    archive = target if not file.unpack else target.parent / file.name
    if not archive.is_file() or archive == target:
        part = download(remote, archive)
        _check(part, file, remote)
        part.replace(archive)
        part_of(archive).with_suffix(".json").unlink(missing_ok=True)
    if file.unpack:
        (_gunzip if file.unpack == "gzip" else _unzip)(archive, target)
        archive.unlink()
    log.info("fetched %s", target)


def _check(part: Path, file: RemoteFile, remote: Remote) -> None:
    """Remove a download with a wrong checksum, and raise UserError."""
    for kind, expected in (("MD5", file.md5), ("SHA-256", "" if file.md5 else remote.sha256)):
        if not expected:
            continue
        digest: Any = hashlib.md5() if kind == "MD5" else hashlib.sha256()
        for block in blocks(part):
            digest.update(block)
        if digest.hexdigest() != expected:
            problem = stand_ins.of_file(part) or f"has the {kind} {digest.hexdigest()}, but must have {expected}"
            part.unlink()
            raise UserError(f"{remote.url} {problem}; nothing was kept, so fetch it again")
    if reason := stand_ins.of_file(part):
        part.unlink()
        raise UserError(f"{remote.url} {reason}")


def _gunzip(archive: Path, target: Path) -> None:
    try:
        with replacing(target, sync=True) as partial, gzip.open(archive) as source, partial.open("wb") as sink:
            while block := source.read(1 << 20):
                _check_size(archive, source.tell())
                sink.write(block)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{archive} is not an intact gzip file ({first_line(error)}); delete it and fetch it again"
        ) from error


def _check_size(archive: Path, num_bytes: int) -> None:
    """Raise UserError if an archive unpacks to many more bytes than images do."""
    if num_bytes > max(_MIN_BOMB, _MAX_RATIO * archive.stat().st_size):
        raise UserError(
            f"{archive} unpacks to {num_bytes:,} bytes or more, far more than images do; get it from another place"
        )


def _unzip(archive: Path, target: Path) -> None:
    """Unpack an archive to the folder `target`. A single folder with the target's name in the archive is left out."""
    try:
        with zipfile.ZipFile(archive) as content, replacing_folder(target) as partial:
            members = [member for member in content.infolist() if not member.is_dir()]
            _check_size(archive, sum(member.file_size for member in members))
            for member in members:
                place = PurePosixPath(member.filename)
                if not place.parts or place.is_absolute() or ".." in place.parts or "\\" in member.filename:
                    raise UserError(f"{archive} names the file {member.filename!r}, which is outside its folder")
                parts = place.parts[1:] if place.parts[0] == target.name else place.parts
                path = partial.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with content.open(member) as source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, IndexError, RuntimeError) as error:  # IndexError: an empty name
        raise UserError(
            f"{archive} is not an intact zip file ({first_line(error)}); delete it and fetch it again"
        ) from error

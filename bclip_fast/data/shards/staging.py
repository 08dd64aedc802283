"""The folder of an unfinished dataset, which appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

from bclip_fast.errors import UserError
from bclip_fast.io import system
from bclip_fast.io.atomic import put_in_place


class Staging:
    """The folder of an unfinished dataset: `.{out.name}.partial`, next to `out`. `publish` renames it to `out`.

    Entering the context locks the folder, and keeps the files of a killed run for a resume.

    Args:
        overwrite: replace a finished dataset in `out`. Any other files in `out` are never replaced.

    Raises:
        UserError: `out` is occupied, or another process writes to it.
    """

    def __init__(self, out: Path | str, overwrite: bool) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out.with_name(f".{self.out.name}.partial")
        self._old = self.out.with_name(f".{self.out.name}.old")
        self._overwrite = overwrite
        self._finish_publishing()  # a process was killed before it did
        self._check_out()

    def _check_out(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out} is a file; give a folder for the dataset")
        if not self.out.exists() or not any(self.out.iterdir()):
            return
        if not (self.out / "dataset.json").is_file():
            raise UserError(f"{self.out} is not empty and not a dataset; give another folder")
        if not self._overwrite:
            raise UserError(
                f"{self.out} already holds a finished dataset; give another folder, or replace it with --overwrite"
            )

    def __enter__(self) -> Staging:
        self.path.mkdir(parents=True, exist_ok=True)
        is_unfinished = (self.path / "lock").exists()
        # The lock ends with its process, so a killed run doesn't block the next one.
        self._lock = (self.path / "lock").open("w")
        try:
            system.lock(self._lock, wait=False)
        except OSError:
            self._lock.close()
            raise UserError(f"{self.out}: another process is writing this dataset; wait for it or end it") from None
        if not is_unfinished:  # a replaced dataset, which a killed process left
            self.clear()
        if self._old.exists():  # a process was killed between the two renames of an overwrite
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)
                self._check_out()
        return self

    def clear(self) -> None:
        """Delete all files in the folder except the lock."""
        for path in self.path.iterdir():
            if path.name != "lock":
                _remove(path)

    def publish(self) -> None:
        """Rename the folder to `out`, in place of an older dataset."""
        put_in_place(self.path, self.out)
        self._finish_publishing()

    def _finish_publishing(self) -> None:
        """Delete the replaced dataset, which has no lock, and then the lock of the new one."""
        if (self.out / "lock").exists() and (self.out / "dataset.json").exists():
            if not (self.path / "lock").exists():
                self._keep_other_files()
                shutil.rmtree(self.path, ignore_errors=True)
            (self.out / "lock").unlink(missing_ok=True)

    def _keep_other_files(self) -> None:
        """Move the files that do not belong to the replaced dataset to the new one."""
        try:
            splits = json.loads((self.path / "dataset.json").read_bytes())["splits"].values()
            names = {shard["name"] for split in splits for shard in split["files"]}
        except (OSError, ValueError, KeyError, TypeError):
            return
        names = {f"{name}{suffix}" for name in names for suffix in (".tar", ".index.json")}
        names |= {"manifest.parquet", "rejects.parquet", "dataset.json"}
        for path in self.path.iterdir():
            if path.name not in names and not (self.out / path.name).exists():
                path.rename(self.out / path.name)

    def discard(self) -> None:
        """Delete the folder."""
        if self.path.exists():
            shutil.rmtree(self.path)

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._finish_publishing()  # a signal came while it did
        self._lock.close()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

"""Small programs that use each function of `bclip_fast.io.atomic` and `bclip_fast.io.jsonl` once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing, replacing_files, replacing_folder, write_bytes
from bclip_fast.io.jsonl import JsonLinesWriter


def ended(function: Callable[[], None]) -> Callable[[], int]:
    """Return 2 if a file cannot be written, and print the error."""

    def call() -> int:
        try:
            function()
        except (OSError, UserError) as error:
            print(error, file=sys.stderr)
            return 2
        return 0

    return call


@ended
def file() -> None:
    with replacing(Path("out/file"), sync=True) as partial:
        partial.write_bytes(b"new" * 9000)


@ended
def small_file() -> None:
    write_bytes(Path("out/folder/file"), b"new")


@ended
def folder() -> None:
    with replacing_folder(Path("out/folder")) as partial:
        (partial / "file").write_text("new")
        (partial / "other").write_text("new")


@ended
def files() -> None:
    with replacing_files(Path("out/folder")) as partial:
        write_bytes(partial / "file", b"new")
        write_bytes(partial / "deep/file", b"new")
        write_bytes(partial / "added", b"new")


@ended
def lines() -> None:
    writer = JsonLinesWriter(Path("out/lines.jsonl"))
    for number in (1, 2, 3):
        writer.write({"new": number})
    writer.close()

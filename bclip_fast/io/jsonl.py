"""Files of JSON objects, one a line: write them, read them, remove the lines of later steps."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from pathlib import Path
from typing import Any

from . import system
from .atomic import write_text

log = logging.getLogger(__name__)


class JsonLinesWriter:
    """Appends JSON objects to a file, one a line. The first line creates the file. Threads may share a writer.

    An incomplete last line, which a killed process left, is removed before the first line is written. Lines that a full
    disk refuses wait in memory for the next write. The first refusal logs a warning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor = -1
        self._waiting = b""

    def write(self, record: dict[str, Any]) -> None:
        """Append a line."""
        with self._lock:
            quiet = bool(self._waiting)
            self._waiting += json.dumps(record).encode() + b"\n"
            if (problem := self._write_waiting()) and not quiet:
                log.warning("%s cannot be written: %s; its lines wait in memory", self._path, problem)

    def _write_waiting(self) -> str:
        """Write the waiting lines. Return the reason if some of them still wait."""
        try:
            if self._descriptor < 0:
                self._descriptor = _open(self._path)
            while self._waiting:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def close(self) -> None:
        """Close the file. The next write opens it again. A warning names the number of lines that are lost."""
        if self._waiting and (problem := self._write_waiting()):
            num_lost = self._waiting.count(b"\n")
            log.warning("%s cannot be written: %s; its last %d lines are lost", self._path, problem, num_lost)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _open(path: Path) -> int:
    """Open a file to append lines, and remove an incomplete last line."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | system.O_BINARY, 0o666)
    try:
        _remove_incomplete_line(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_incomplete_line(descriptor: int) -> None:
    size = end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 65536)
        newline = system.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)


def truncate_after_step(path: Path, last_step: int) -> None:
    """Remove the lines whose "step" is later than `last_step`, and incomplete lines."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    write_text(path, "".join(line + "\n" for line in lines if _step_of(line, path) <= last_step))


def _step_of(line: str, path: Path) -> float:
    """Return the step of a line, or infinity for an incomplete or foreign line."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        step = None
    if isinstance(step, int | float):
        return step
    log.warning("%s: removing an incomplete or foreign line", path)
    return math.inf


def read_lines(path: Path) -> list[Any]:
    """The value of each line. Raises ValueError for a line that is not JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

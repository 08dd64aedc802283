"""The panels of composite figures as a detector finds them: a stage before the extraction (`--panel_model`).

A task is a group of GROUP packages. It reads the figures whose captions name panels, and writes the boxes of all of
them to one file atomically. Its batches are formed in the order of the figures, within the group. So a batch, and with
it each bit of a result, depends neither on workers and engine nor on an interruption.

The key of a figure is the SHA-256 of its image file, by which the extraction looks up its boxes. A figure that cannot
be read has a problem in place of boxes. A worker notes what it reads in a file beside the results. If it dies, the main
process adds this image or package to the group's list of skipped ones, and runs the group again.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bclip_fast.data.image_files import ImageError, open_image
from bclip_fast.data.shards.format import to_json
from bclip_fast.errors import UserError, first_line
from bclip_fast.io.atomic import replacing, write_text
from bclip_fast.io.file_names import printable
from bclip_fast.io.hashing import sha256, sha256_of_file, sha256_of_parts

from . import executors
from .articles import FetchError, Package
from .box_files import boxes_path, read_boxes
from .extract import Options, process, read_versions
from .panels.captions import split_caption
from .sanitize import MAX_PIXELS, MIN_SIDE

log = logging.getLogger(__name__)

GROUP = 32
# Prepared images in memory, in batches: more canvases than this are flushed, the fullest one first.
_MAX_WAITING_BATCHES = 4
# Processes that share a GPU. They decode while others compute.
_PROCESSES_PER_GPU = 4
_BATCH_ON_GPU = 16
# Notes of a worker about what it reads next.
_IMAGE, _PACKAGE = "image ", "package "
_MAX_NOTE = 1000


@dataclass(frozen=True)
class BoxTask:
    """The task to find the panels of a group of packages.

    Attributes:
        folder: folder of the results.
        model: folder of the detector's files.
        batch_size: images in a batch. 0: 16 on a GPU, 1 on a CPU.
    """

    folder: str
    number: int
    packages: tuple[Package, ...]
    options: Options
    model: str
    min_score: float
    batch_size: int


def copy_model(files: dict[str, Path], work: Path) -> Path:
    """Copy a detector's files to a folder that all workers can read, unless they are there. Return the folder."""
    folder = work / "panel_model" / model_identity(files)[:16]
    for name, path in files.items():
        if not (folder / name).exists():
            # copyfile would blame the source for a full disk.
            with replacing(folder / name) as partial, path.open("rb") as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
    return folder


def model_identity(files: dict[str, Path]) -> str:
    """Return a SHA-256 of a detector's files."""
    return sha256_of_parts(sha256_of_file(files[name]).encode() for name in sorted(files))


def find_boxes(engine: str, tasks: Iterable[BoxTask], workers: int) -> Iterator[tuple[BoxTask, str]]:
    """Run tasks. Yield each with an empty string, or with the reason why a source could not be read this time.

    Raises:
        UserError: a process died while the model ran.
    """
    num_gpus = executors.num_gpus(engine)
    if num_gpus:
        workers = min(workers or num_gpus * _PROCESSES_PER_GPU, num_gpus * _PROCESSES_PER_GPU)
    share = 1 / _PROCESSES_PER_GPU if num_gpus else 0.0
    remaining: Iterable[BoxTask] = tasks
    while True:
        crashed = []
        for task, result in executors.run(engine, detect_boxes, remaining, workers, preload=[__name__], gpus=share):
            if isinstance(result, executors.Crash):
                _skip_what_crashed(task)
                crashed.append(task)
            else:
                yield task, result
        if not crashed:
            return
        remaining = crashed


def _skip_what_crashed(task: BoxTask) -> None:
    path = boxes_path(task.folder, task.number)
    current = path.with_suffix(".current")
    note = current.read_text(encoding="utf-8") if current.exists() else ""
    if not note.startswith((_IMAGE, _PACKAGE)):
        raise UserError(
            "the process of the panel detector died (out of memory?); lower panel_batch_size or workers and run it "
            "again: the boxes of finished packages are kept"
        )
    log.warning("reading it crashed a process, so it gets no boxes: %s", note)
    write_text(path.with_suffix(".skip"), to_json([*_skipped(path), note]))


def _skipped(path: Path) -> list[str]:
    skipped = path.with_suffix(".skip")
    return list(json.loads(skipped.read_bytes())) if skipped.exists() else []


def detect_boxes(task: BoxTask) -> str:
    """Write the boxes of a group. Return an empty string, or why a package couldn't be read this time."""
    path = boxes_path(task.folder, task.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    group = _Group(task, path)
    try:
        for package in task.packages:
            name = f"{_PACKAGE}{printable(package.name) or ' '.join(map(printable, package.items))}"[:_MAX_NOTE]
            if group.is_skipped(name):
                continue
            group.note(name)
            for image in process(package, task.options, make=_composites):
                if isinstance(image, Composite):
                    group.add(image)
                    group.note(name)
    except FetchError as error:
        return str(error)
    write_text(path, to_json(group.finish()))
    path.with_suffix(".current").unlink(missing_ok=True)
    return ""


@dataclass(frozen=True)
class Composite:
    """The bytes of the versions of a figure whose caption names panels, the largest first."""

    versions: tuple[bytes, ...]


def _composites(archive: Any, folder: str, candidates: list[str], source: Any, *_: Any) -> Iterator[Any]:
    """Yield the image of a figure if its caption names panels. Takes the place of the extraction of pairs."""
    if split_caption(source.caption):
        versions = read_versions(archive, folder, candidates)
        yield Composite(tuple(data for _, data, problem in versions if not problem))


class _Group:
    """The figures of a group: those that wait for a batch, and the results."""

    def __init__(self, task: BoxTask, path: Path) -> None:
        self._task, self._current = task, path.with_suffix(".current")
        self._skipped = set(_skipped(path))
        self._waiting: dict[tuple[int, int], list[tuple[str, Any]]] = {}
        self._results: dict[str, Any] = {}
        self._started: set[str] = set()
        self.note("")  # a killed run may have left one

    def note(self, text: str) -> None:
        """Note what comes next, for the case that it kills this process."""
        self._current.write_text(text, encoding="utf-8")

    def is_skipped(self, text: str) -> bool:
        """Return whether an earlier process died after this note."""
        return text in self._skipped

    def add(self, composite: Composite) -> None:
        """Decode the first version that can be decoded, and run the detector if a batch is full."""
        for data in composite.versions:
            key = sha256(data)
            if key in self._started:
                if isinstance(self._results.get(key), str):
                    continue
                return
            self._started.add(key)
            if self.is_skipped(_IMAGE + key):
                self._results[key] = "crash while decoding"
                continue
            self.note(_IMAGE + key)
            try:
                image = open_image(data, MAX_PIXELS).rgb()
                if min(image.size) < MIN_SIDE:
                    raise ImageError("image of a single pixel row or column")
                prepared = _detector(self._task.model).prepare(image)
            except (ImageError, MemoryError) as error:
                self._results[key] = first_line(error)[:200] or "out of memory"
                continue
            self._wait(key, prepared)
            return

    def _wait(self, key: str, prepared: Any) -> None:
        size = self._batch_size()
        waiting = self._waiting.setdefault(prepared.canvas, [])
        waiting.append((key, prepared))
        if len(waiting) >= size:
            self._detect(prepared.canvas)
        elif sum(map(len, self._waiting.values())) >= size * _MAX_WAITING_BATCHES:
            self._detect(max(self._waiting, key=lambda canvas: (len(self._waiting[canvas]), canvas)))

    def _batch_size(self) -> int:
        is_on_gpu = _detector(self._task.model).device.type == "cuda"
        return self._task.batch_size or (_BATCH_ON_GPU if is_on_gpu else 1)

    def _detect(self, canvas: tuple[int, int]) -> None:
        import torch

        from .panels.detector import as_lists

        self.note("model")
        keys, images = zip(*self._waiting.pop(canvas), strict=True)
        # With one thread, a result doesn't depend on the number of threads. Other processes use the other cores.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            found = _detector(self._task.model).detect(images, self._task.min_score)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU has no memory for {len(images)} images of {canvas[1]} x {canvas[0]} pixels: lower "
                f"panel_batch_size or workers, and run it again ({first_line(error)[:100]})"
            ) from None
        finally:
            torch.set_num_threads(num_threads)
        self._results.update(zip(keys, map(as_lists, found), strict=True))

    def finish(self) -> dict[str, Any]:
        """Run the detector on the images that wait. Return boxes, or a problem, by the key of the figure."""
        for canvas in sorted(self._waiting):
            self._detect(canvas)
        return self._results


@functools.cache
def _detector(folder: str) -> Any:
    """Return the detector of this process, on a GPU if there is one."""
    import torch

    from .panels.detector import PanelDetector

    if count := torch.cuda.device_count():
        return PanelDetector(Path(folder), f"cuda:{os.getpid() % count}")
    return PanelDetector(Path(folder))


def count_boxes(folder: Path, num_groups: int) -> dict[str, int]:
    """Return the numbers of figures, boxes and figures with a problem. Logs the problems as a warning."""
    counts = {"figures": 0, "boxes": 0, "failed": 0}
    for number in range(num_groups):
        for key, value in read_boxes(boxes_path(folder, number)).items():
            counts["figures"] += 1
            if isinstance(value, str):
                counts["failed"] += 1
                log.debug("no boxes of the image %s: %s", key, value)
            else:
                counts["boxes"] += len(value)
    if counts["failed"]:
        log.warning("the panel detector could not read %s of %s figures", counts["failed"], counts["figures"])
    return counts


def groups(packages: Iterator[Package]) -> Iterator[tuple[int, tuple[Package, ...]]]:
    """Yield (number, packages) of each group."""
    number, group = 0, list[Package]()
    for package in packages:
        group.append(package)
        if len(group) == GROUP:
            yield number, tuple(group)
            number, group = number + 1, []
    if group:
        yield number, tuple(group)

"""The index of a tar file in WebDataset's layout: which samples it has, and where.

Files with the same path up to the first dot of their name, one after another, are a group. Their extensions, in upper
or lower case, are those of an image, a `.txt` or a `.json`. A group with an image and a caption is a sample. In another
group, names with further dots, such as `1.2.jpg` beside `1.2.txt`, can be samples.

A whole pass over the bytes (tar_members.py) gives the checksums of all members and the SHA-256 of the file.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bclip_fast.data.image_files import MAX_BYTES
from bclip_fast.data.storage import Storage
from bclip_fast.io.file_names import printable

from .tar_members import IMAGES, Member, Stream, TarProblem, members

INDEX_VERSION = 1
# An image and its caption are read together, with the files between them.
_MAX_SPAN = MAX_BYTES + (16 << 20)


@dataclass
class TarIndex:
    """The samples of a tar file. The columns of the arrays are image, caption and JSON.

    Attributes:
        key_text: (bytes,) uint8, the keys of the samples in UTF-8, one after another. Each is unique in the file.
        key_ends: (samples + 1,) int64, 0 and where each key ends.
        offsets: (samples, 3) int64, in bytes. sizes: (samples, 3) int64. A sample without JSON has a size of 0.
        checksums: (samples, 3) uint32, CRC-32C.
        caption_bytes: (samples,) int64.
        is_json: (samples,) bool, whether the caption is a value of the JSON.
        reasons: why a sample is damaged, by its position.
        sha256: hash of the file.
        left_out: numbers of groups of files that are not samples, by reason, and the name of the first one.
        json_keys: keys of the JSON of groups without a caption, with their numbers.
        problem: why the file ends early. Empty if it is intact.
    """

    key_text: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    key_ends: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    offsets: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    checksums: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.uint32))
    caption_bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    is_json: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    reasons: dict[int, str] = field(default_factory=dict)
    sha256: str = ""
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    json_keys: dict[str, int] = field(default_factory=dict)
    problem: str = ""

    def __len__(self) -> int:
        return len(self.key_ends) - 1

    def key(self, position: int) -> str:
        """Return the key of a sample."""
        return bytes(self.key_text[self.key_ends[position] : self.key_ends[position + 1]]).decode()


def index_tar(storage: Storage, name: str, size: int, caption_key: str) -> TarIndex:
    """Read a whole tar file and return its index. Raises ReadError if it can't be read.

    caption_key: key of the caption in the JSON. If empty, the caption is the .txt, or without one the key `caption`.
    """
    stream = Stream(storage, name, size)
    index, groups = TarIndex(), _Groups(caption_key)
    try:
        for path, member, kind in members(stream):
            groups.add(path, member, kind)
    except TarProblem as problem:
        index.problem = str(problem)
    groups.finish(index)
    index.sha256 = stream.finish()
    return index


class _Groups:
    """Collects files to samples."""

    def __init__(self, caption_key: str) -> None:
        self._caption_key = caption_key
        self._path = ""
        self._files: dict[str, Member] = {}
        self._rows: list[tuple[str, tuple[Member, Member, Member | None], int, bool, str]] = []
        self._left_out: dict[str, tuple[int, str]] = {}
        self._json_keys: Counter[str] = Counter()

    def add(self, path: str, member: Member, extension: str) -> None:
        """Add a file. Another path, or an extension that the group has already, begins the next group."""
        if path != self._path or extension in self._files:
            self._flush()
            self._path = path
        self._files[extension] = member

    def finish(self, index: TarIndex) -> None:
        """Write all samples into an index."""
        self._flush()
        rows = self._rows
        keys = [key.encode() for key in _unique([printable(row[0]) for row in rows])]
        index.key_text = np.frombuffer(b"".join(keys), np.uint8)
        index.key_ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)
        missing = Member(0, 0)
        files = [[member or missing for member in row[1]] for row in rows]
        shape = (len(rows), 3)
        index.offsets = np.array([[m.offset for m in row] for row in files], np.int64).reshape(shape)
        index.sizes = np.array([[m.size for m in row] for row in files], np.int64).reshape(shape)
        index.checksums = np.array([[m.checksum for m in row] for row in files], np.uint32).reshape(shape)
        index.caption_bytes = np.array([row[2] for row in rows], np.int64)
        index.is_json = np.array([row[3] for row in rows], bool)
        index.reasons = {position: row[4] for position, row in enumerate(rows) if row[4]}
        index.left_out, index.json_keys = self._left_out, dict(self._json_keys.most_common(20))

    def _flush(self) -> None:
        files, self._files = self._files, {}
        if not files:
            return
        if self._add_sample(self._path, {name: member for name, member in files.items() if "." not in name}):
            return
        parts: dict[str, dict[str, Member]] = {}
        for name, member in files.items():
            stem, dot, kind = name.rpartition(".")
            parts.setdefault(f"{dot}{stem}" if dot else "", {})[kind] = member
        num_samples = sum(self._add_sample(self._path + stem, part) for stem, part in parts.items() if stem)
        if not num_samples:
            has_image = any(name.rpartition(".")[2] in IMAGES for name in files)
            reason = "without a caption" if has_image else "without an image"
            count, first = self._left_out.get(reason, (0, printable(self._path)))
            self._left_out[reason] = count + 1, first

    def _add_sample(self, key: str, files: dict[str, Member]) -> bool:
        """Add the sample of a group, and return whether it has an image and a caption."""
        image = next((files[kind] for kind in IMAGES if kind in files), None)
        if image is None:
            return False
        meta, text = files.get("json"), files.get("txt")
        reason, num_bytes, is_json = "", 0, False
        if text is not None and not self._caption_key:
            caption = text
            reason, num_bytes = _text_of(text)
        elif meta is not None:
            caption, is_json = meta, True
            value, reason = caption_in(meta.content, self._caption_key or "caption") if not meta.problem else (None, "")
            if value is None and not reason and not meta.problem:
                self._json_keys.update(list(json.loads(meta.content)))
                return False
            num_bytes = len((value or "").encode())
        else:
            return False
        if not reason and not caption.problem and not num_bytes:
            return False
        for what, member in (("image", image), ("caption", caption)):
            if member.problem:
                reason = f"its {what} {member.problem}"
        if meta is not None and meta.problem:
            meta = None
        bounds = [member for member in (image, caption, meta) if member is not None]
        span = max(m.offset + m.size for m in bounds) - min(m.offset for m in bounds)
        if not reason and span > _MAX_SPAN:
            reason = f"{span >> 20} MiB lie between its files"
        self._rows.append((key, (image, caption, meta), num_bytes, is_json, reason))
        return True


def _text_of(member: Member) -> tuple[str, int]:
    """Return why a .txt is damaged, and the size of its caption. A blank caption has a size of 0."""
    try:
        return "", len(member.content) if member.content.decode().strip() else 0
    except UnicodeDecodeError as error:
        return f"its caption is not UTF-8: {error.reason} at byte {error.start}", 0


def caption_in(content: bytes, key: str) -> tuple[str | None, str]:
    """Return the caption in a JSON file, or why the file is damaged. A file without a caption gives (None, "")."""
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        return None, f"its JSON cannot be parsed: {error}"
    if not isinstance(values, dict):
        return None, "its JSON is not an object"
    value = values.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None, ""
    return (value, "") if isinstance(value, str) else (None, f"the value of {key!r} in its JSON is not text")


def _unique(keys: list[str]) -> list[str]:
    """Return keys of which those that occur again have a number appended."""
    seen: Counter[str] = Counter()
    taken = set(keys)
    unique = []
    for key in keys:
        seen[key] += 1
        name = key
        while seen[key] > 1 and name in taken:
            name = f"{key}#{seen[key]}"
            if name in taken:
                seen[key] += 1
        taken.add(name)
        unique.append(name)
    return unique

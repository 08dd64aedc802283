"""Tar files in WebDataset's layout that have no index of ours, such as those of img2dataset."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence

from bclip_fast.data.image_files import ImageError, open_image
from bclip_fast.data.storage import ReadConfig, RemoteStorage
from bclip_fast.data.storage_cache import CachedStorage
from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256
from bclip_fast.io.progress import track

from .checksum import crc32c
from .format import CAPTION, Index, Sample
from .reader import BadSample, ShardDataset
from .tar_cache import IndexFile, indexes
from .tar_index import TarIndex, caption_in
from .tar_paths import ALL, names_of_split, tar_files

log = logging.getLogger(__name__)


class TarDataset(ShardDataset):
    """Random access to the samples of tar files in WebDataset's layout. `tar_index` says what a sample is.

    The order is that of the names, and of the files in each tar. A key is NAME OF THE TAR/KEY.

    Args:
        path: folder, tar file or pattern, or their URL.
        split: see `names_of_split`.
        caption_key: key of the caption in the JSON. If empty, the caption is the .txt, or without one the JSON's key
            `caption`.

    Raises:
        UserError: a tar file is missing or unreadable, or no sample has an image and a caption.
    """

    has_manifest = False

    def __init__(self, path: str, split: str = "train", read: ReadConfig | None = None, caption_key: str = "") -> None:
        self.root, self.split, self.caption_key = path, split, caption_key
        self.remarks: list[str] = []
        """Lines about tar files that end early, and about files that are not samples."""
        self.storage, names = tar_files(path, read or ReadConfig())
        if not names:
            raise UserError(f"{path} has no .tar files; check the path")
        names = names_of_split(names, split, path)
        opened = indexes(self.storage, names, caption_key)
        self.has_checksums, self.version = True, 1
        self._files: list[IndexFile] = [file for file, _ in opened]
        self._shards = [
            {"name": file.name.removesuffix(".tar"), "samples": len(index), "num_bytes": file.stamp["bytes"]}
            for file, index in opened
        ]
        self.shard_sizes = [len(index) for _, index in opened]
        self.num_bytes = sum(shard["num_bytes"] for shard in self._shards)
        digests = [index.sha256 for _, index in opened]
        # The content decides, not the place, so that moved files keep their fingerprint.
        self.fingerprint = sha256("\n".join(["tar files", caption_key, *digests]))
        self._report([index for _, index in opened])
        if isinstance(self.storage, RemoteStorage) and self.storage.config.cache_dir:
            sizes = {
                file.name: (file.stamp["bytes"], digest) for file, digest in zip(self._files, digests, strict=True)
            }
            self.storage = CachedStorage(self.storage, sizes, self.storage.config)
        self._make_caches()

    def _report(self, opened: Sequence[TarIndex]) -> None:
        """Log the files that are left out. Raises UserError without any sample, or if a file is not a tar file."""
        left_out: dict[str, list[tuple[int, str]]] = {}
        json_keys: dict[str, int] = {}
        for file, index in zip(self._files, opened, strict=True):
            place = self.storage.path(file.name)
            if index.problem and not len(index):
                raise UserError(f"{place}: {index.problem}")
            if index.problem:
                self.remarks.append(f"{place}: {index.problem}; its {len(index)} samples before that are used")
            for reason, (count, first) in index.left_out.items():
                left_out.setdefault(reason, []).append((count, f"{file.name}/{first}"))
            for key, count in index.json_keys.items():
                json_keys[key] = json_keys.get(key, 0) + count
        facts = [
            f"{sum(count for count, _ in found)} groups of files {reason}, the first {found[0][1]}"
            for reason, found in left_out.items()
        ]
        keys = f"; their JSON has the keys {', '.join(sorted(json_keys))}" if json_keys else ""
        if not sum(self.shard_sizes):
            wanted = f"the key {self.caption_key!r}" if self.caption_key else "a .txt or the key 'caption'"
            remedy = "set caption_key to the key of the caption" if keys else f"a caption is {wanted}"
            raise UserError(f"{self.root} has no sample: {'; '.join(facts) or 'it is empty'}{keys}; {remedy}")
        if facts:
            self.remarks.append(f"{self.root}: left out {'; '.join(facts)}{keys}")
        for remark in self.remarks:
            log.warning("%s", remark)

    def _make_caches(self) -> None:
        super()._make_caches()
        self._tar_index = functools.lru_cache(None)(self._read_tar_index)

    def __getstate__(self) -> dict[str, object]:
        state = super().__getstate__()
        del state["_tar_index"]
        return state

    def _read_tar_index(self, number: int) -> TarIndex:
        index = self._files[number].read()
        if index is None:
            raise UserError(f"the index of {self.storage.path(self._name(number))} was removed; start again")
        return index

    def _read_index(self, number: int) -> tuple[list[str], Index]:
        index = self._tar_index(number)
        keys = [self._key(number, position) for position in range(len(index))]
        return keys, Index(index.offsets, index.sizes, index.checksums)

    def _key(self, number: int, position: int) -> str:
        return f"{self._shards[number]['name']}/{self._tar_index(number).key(position)}"

    def name_of(self, i: int) -> tuple[str, str]:
        """Return sample i's key and the file name of its shard. Only reads the index."""
        number, position = self._locate(i)
        return self._key(number, position), self._name(number)

    def _span(self, i: int) -> tuple[int, int, int]:
        number, position = self._locate(i)
        index = self._tar_index(number)
        if position in index.reasons:
            return number, 0, 1
        offsets, sizes = index.offsets[position], index.sizes[position]
        present = sizes > 0
        return number, int(offsets[present].min()), int((offsets + sizes)[present].max())

    def _parse_once(self, i: int, data: bytes) -> Sample:
        number, position = self._locate(i)
        index = self._tar_index(number)
        place = f"{self.storage.path(self._name(number))}: sample {index.key(position)}"
        if reason := index.reasons.get(position):
            raise BadSample(f"{place}: {reason}")
        start = self._span(i)[1]
        contents = []
        for offset, size, checksum in zip(
            index.offsets[position].tolist(),
            index.sizes[position].tolist(),
            index.checksums[position].tolist(),
            strict=True,
        ):
            content = data[offset - start : offset - start + size] if size else b""
            if size and (actual := crc32c(content)) != checksum:
                raise BadSample(
                    f"{place} is damaged, or the tar file was changed: its CRC-32C is {actual:08x}, but the index has "
                    f"{checksum:08x}; copy the tar file again"
                )
            contents.append(content)
        image, caption, meta = contents
        return Sample(self._key(number, position), image, self._caption_of(number, position, caption), _object(meta))

    def _caption_of(self, number: int, position: int, content: bytes) -> str:
        if not self._tar_index(number).is_json[position]:
            return content.decode()
        caption, _ = caption_in(content, self.caption_key or "caption")
        assert caption is not None
        return caption

    def text_bytes(self, i: int) -> dict[str, list[int]]:
        """Return the size of the caption of sample i. Only reads the index."""
        return {CAPTION: [self.caption_bytes(i)]}

    def captions_of(self, indices: Sequence[int]) -> list[str | None]:
        """Return the captions of samples, and None for damaged ones. From a URL, several reads run at a time."""

        def read(i: int) -> str | None:
            try:
                return self.caption(i)
            except BadSample:
                return None

        if not self.storage.remote:
            return [read(i) for i in indices]
        reads = [self._pool().submit(read, i) for i in indices]
        return [each.result() for each in reads]

    def caption_bytes(self, i: int) -> int:
        """Return the size of sample i's caption. Only reads the index."""
        number, position = self._locate(i)
        return int(self._tar_index(number).caption_bytes[position])

    def caption(self, i: int) -> str:
        """Return the caption of sample i without reading its image. Raises BadSample."""
        number, position = self._locate(i)
        index = self._tar_index(number)
        offset, size = int(index.offsets[position, 1]), int(index.sizes[position, 1])
        if position not in index.reasons:
            content = self.storage.read(self._name(number), offset, offset + size)
            if crc32c(content) == index.checksums[position, 1]:
                return self._caption_of(number, position, content)
        return self[i].caption  # raises BadSample, which names the reason, unless a second read is intact


def verify_tars(path: str, caption_key: str = "", *, progress: bool = False) -> list[str]:
    """Read tar files of others again, with every image.

    progress: show the progress, in samples.

    Returns:
        The problems, one line each: tar files that end early, groups of files that are left out, and damaged samples.

    Raises:
        UserError: as for `TarDataset`.
    """
    dataset = TarDataset(path, ALL, caption_key=caption_key)
    problems = list(dataset.remarks)
    with track("samples", len(dataset), show=progress, transient=True) as advance:
        for i in range(len(dataset)):
            try:
                open_image(dataset[i].image).rgb()
            except BadSample as error:
                problems.append(str(error))
            except ImageError as error:
                key, shard = dataset.name_of(i)
                problems.append(f"{shard}: sample {key}: its image cannot be decoded: {error}")
            advance()
    return problems


def _object(content: bytes) -> dict[str, object]:
    """Return the JSON object of a sample. Its caption may be intact although this is not an object."""
    try:
        value = json.loads(content) if content else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

"""Damaged and hostile tar files: bad samples and messages, and neither crashes nor escapes nor much memory."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from foreign_tars import encoded, pixels, write_tar, write_tars
from loaders import loader, take

from bclip_fast.data.shards.reader import BadSample
from bclip_fast.data.shards.tar_dataset import TarDataset, verify_tars
from bclip_fast.errors import UserError

JPEG = encoded(pixels(0))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCLIP_CACHE", str(tmp_path / "cache"))


def test_wrong_captions_are_bad_samples(tmp_path: Path):
    files = {"0.jpg": JPEG, "0.txt": b"\xff\xfe", "1.jpg": JPEG, "1.json": b"{", "2.jpg": JPEG, "2.json": b"[1]",
             "3.jpg": JPEG, "3.json": b'{"caption": ["a"]}', "4.jpg": b"", "4.txt": b"x", "5.jpg": JPEG,
             "5.txt": b"good", "6.jpg": JPEG, "6.txt": b"x" * (5 << 20), "7.jpg": JPEG, "7.txt": b" \n",
             "8.jpg": JPEG, "8.json": b"[" * 100_000}  # fmt: skip
    dataset = TarDataset(str(write_tar(tmp_path / "a.tar", files)))
    reasons = []
    for i in range(len(dataset)):
        try:
            reasons.append(dataset[i].caption)
        except BadSample as error:
            reasons.append(str(error).partition("a.tar: sample ")[2])
    for reason, pattern in zip(
        reasons,
        ["0: its caption is not UTF-8: invalid start byte at byte 0", "1: its JSON cannot be parsed",
         "2: its JSON is not an object", "3: the value of 'caption' in its JSON is not text", "4: its image is empty",
         "good", "6: its caption has 5242880 bytes, more than 4 MiB", "8: its JSON cannot be parsed"],
        strict=True,
    ):  # fmt: skip
        assert reason.startswith(pattern)
    assert [line for line in dataset.remarks if "1 groups of files without a caption, the first a.tar/7" in line]
    assert len(verify_tars(str(tmp_path / "a.tar"))) == 8


def raw_header(name: str, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_links_and_devices_are_no_samples(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_bytes(JPEG)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("0.jpg", tarfile.SYMTYPE), ("1.jpg", tarfile.LNKTYPE), ("2.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
            text = tarfile.TarInfo(name.replace("jpg", "txt"))
            text.size = 4
            tar.addfile(text, io.BytesIO(b"text"))
    with pytest.raises(UserError, match="has no sample: 3 groups of files without an image, the first a.tar/0"):
        TarDataset(str(path))


HOSTILE = {
    "huge size": (raw_header("2.jpg", 1 << 60), "2: its image has 1152921504606846976 bytes, more than 256 MiB"),
    "cut short": (raw_header("2.jpg", 5000) + bytes(100), "2: its image is cut short by the end of the tar file"),
}
PROBLEMS = {
    "negative size": raw_header("2.jpg", 0)[:124] + b"\xff" * 12 + raw_header("2.jpg", 0)[136:],
    "pax bomb": raw_header("x", 2 << 20, tarfile.XHDTYPE) + b"9 a=bcde\n" * (2 << 20 // 9),
    "long name bomb": raw_header("x", 1 << 40, tarfile.GNUTYPE_LONGNAME) + b"a" * 4096,
    "damaged header": b"garbage!" * 64,
    "zero run and garbage": raw_header("2.jpg", 100)[:100] + b"\x01" * 412,
    "chain of headers": (raw_header("x", 512, tarfile.XHDTYPE) + b"512 a=" + b"b" * 505 + b"\n") * 1500,
}


def start_of_tar() -> bytes:
    data = b""
    for key in "01":
        for kind, content in (("jpg", JPEG), ("txt", f"caption {key}".encode())):
            data += raw_header(f"{key}.{kind}", len(content)) + content + bytes(-len(content) % 512)
    return data


def checksummed(block: bytes) -> bytes:
    """Correct the checksum of a header."""
    total = sum(block[:148]) + 32 * 8 + sum(block[156:512])
    return block[:148] + f"{total:06o}\0 ".encode() + block[156:]


@pytest.mark.parametrize("kind", HOSTILE)
def test_member_that_cannot_be_read_is_a_bad_sample(tmp_path: Path, kind: str):
    """The caption comes first, so that the sample has one."""
    extra, reason = HOSTILE[kind]
    text = raw_header("2.txt", 4) + b"text" + bytes(508)
    path = tmp_path / "a.tar"
    path.write_bytes(start_of_tar() + text + extra)
    dataset = TarDataset(str(path))
    assert [dataset[i].caption for i in (0, 1)] == ["caption 0", "caption 1"]
    with pytest.raises(BadSample, match=reason):
        dataset[2]
    with pytest.raises(BadSample, match=reason):
        dataset.caption(2)
    assert isinstance(dataset.fetch([2])()[0], BadSample)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_hostile_header_ends_the_index(tmp_path: Path, kind: str):
    block = PROBLEMS[kind]
    path = tmp_path / "a.tar"
    path.write_bytes(start_of_tar() + (checksummed(block) if kind == "negative size" else block) + start_of_tar())
    tracemalloc.start()
    dataset = TarDataset(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 << 20
    assert [sample.caption for sample in dataset] == ["caption 0", "caption 1"]
    assert len(dataset.remarks) == 1
    assert str(path) in dataset.remarks[0]
    assert dataset.remarks[0].endswith("its 2 samples before that are used")
    assert len(verify_tars(str(path))) == 1


def test_sparse_file_is_a_bad_sample(tmp_path: Path):
    """A sparse file can declare any size, so its bytes are not those in the tar file."""
    header = bytearray(raw_header("2.jpg", 512, tarfile.GNUTYPE_SPARSE))
    header[386:410] = b"00000000000\0" + b"00000001000\0"
    header[483:495] = b"77777777777\0"
    text = raw_header("2.txt", 4) + b"text" + bytes(508)
    path = tmp_path / "a.tar"
    path.write_bytes(start_of_tar() + text + checksummed(bytes(header)) + bytes(512) + bytes(1024))
    dataset = TarDataset(str(path))
    assert len(dataset) == 3
    with pytest.raises(BadSample, match="its image is stored as a sparse file|more than 256 MiB"):
        dataset[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x1f\x8b" + bytes(600), r"is compressed \(gzip\)"),
        (b"nothing that tar knows" * 100, "is not an intact tar file"),
    ],
)
def test_file_that_is_no_tar_is_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.tar: {message}"):
        TarDataset(str(path))


def test_changed_bytes_are_a_bad_sample(tmp_path: Path):
    folder = write_tars(tmp_path / "data", 16)
    dataset = TarDataset(str(folder))
    path = folder / "00001.tar"
    content = bytearray(path.read_bytes())
    content[content.index(b"000010002.jpg") + 512 + 300] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadSample, match="00001.tar: sample 000010002 is damaged, or the tar file was changed"):
        dataset[10]
    with loader(dataset, num_threads=1) as source:
        batches = take(source, 2)
    (bad,) = [record for batch in batches for record in batch.bad]
    assert (bad.key, bad.shard) == ("00001/000010002", "00001.tar")

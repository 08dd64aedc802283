"""`bclip eval fetch`: what it shows, downloads that continue, checksums, archives, over a loopback server."""

from __future__ import annotations

import errno
import gzip
import hashlib
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_data import write_ham10000, write_medmnist, write_pcam
from range_server import Server

from bclip_fast.errors import UserError
from bclip_fast.eval import EvalConfig, Evaluation, download, fetch, suites, tasks
from bclip_fast.eval.fetch import FetchCommand, RemoteFile, run


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    with Server(folder) as made:
        made.version = '"v1"'
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)


def serve_pcam(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve a small PatchCamelyon, with its own checksums in place of the published ones."""
    write_pcam(tmp_path / "made")
    for path in (tmp_path / "made").iterdir():
        (server.folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    with_checksums(server, monkeypatch)


def with_checksums(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    original = fetch.sources()

    def changed() -> dict[str, Any]:
        result = {}
        for name, source in original.items():
            files = []
            for file in source.files:
                path = server.folder / file.name
                md5 = hashlib.md5(path.read_bytes()).hexdigest() if file.md5 and path.is_file() else file.md5
                files.append(RemoteFile(file.url, file.path, file.unpack, md5))
            result[name] = fetch.DataSource(source.title, source.page, source.licence, tuple(files), source.by_hand)
        return result

    monkeypatch.setattr(fetch, "sources", changed)


def command(server: Server, tmp_path: Path, *names: str, yes: bool = True) -> FetchCommand:
    return FetchCommand(tasks=names, data=str(tmp_path / "data"), yes=yes, mirror=server.url)


def rest(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "data").rglob("*") if path.is_file())


def test_fetch_every_task_of_the_suite_has_a_source_with_page_and_licence() -> None:
    sources = fetch.sources()
    for task in suites.load("medpmc").tasks:
        source = sources[task.download]
        assert source.title and source.licence and source.page.startswith("https://")
        assert bool(source.files) != bool(source.by_hand)
        assert all(file.path.startswith(f"{task.folder}/") for file in source.files)
        assert all(file.url.startswith("https://") and file.unpack in ("", "gzip", "zip") for file in source.files)


def test_fetch_shows_everything_first_and_leaves_data_that_the_task_reads(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_pcam(server, tmp_path, monkeypatch)
    questions: list[str] = []

    def decline(question: str) -> str:
        questions.append(question)
        return "no"

    assert run(command(server, tmp_path, "medpmc_pcam", yes=False), ask=decline) == 1
    shown = capsys.readouterr().out
    size = (server.folder / "camelyonpatch_level_2_split_test_x.h5.gz").stat().st_size
    assert questions and not (tmp_path / "data").exists() and server.counts == {}
    for text in (
        "CC0 1.0",
        "https://zenodo.org/records/2546921",
        f"{server.url}/camelyonpatch",
        f"{size:,} bytes",
        "MD5 ",
    ):
        assert text in shown
    assert run(command(server, tmp_path, "medpmc_pcam", yes=False), ask=lambda _: "yes") == 0
    assert rest(tmp_path) == [f"camelyonpatch_level_2_split_test_{part}.h5" for part in "xy"]
    evaluation = Evaluation(EvalConfig(task=("medpmc_pcam",), data=str(tmp_path / "data"), progress=False))
    assert len(evaluation.tasks[0][1]) == 6
    capsys.readouterr()
    counts = dict(server.counts)
    assert run(command(server, tmp_path, "medpmc_pcam")) == 0
    assert "there " in capsys.readouterr().out and server.counts == counts


def test_fetch_without_a_terminal_needs_yes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_pcam(server, tmp_path, monkeypatch)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert run(command(server, tmp_path, "medpmc_pcam", yes=False)) == 1
    assert not (tmp_path / "data").exists()


def test_fetch_continues_after_lost_connections_and_after_an_end(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_medmnist(server.folder, side=64)
    with_checksums(server, monkeypatch)
    name = "breastmnist_224.npz"
    content = (server.folder / name).read_bytes()
    server.fault = lambda name, count: "drop" if count <= 2 else ""
    assert run(command(server, tmp_path, "medpmc_breastmnist")) == 0
    target = tmp_path / "data" / "medmnist" / name
    assert target.read_bytes() == content and rest(tmp_path) == [name]
    assert [size for _, size in server.ranges][:2] == [len(content), len(content) - len(content) // 2]
    # A command that ended in the middle: the part is continued, and only its rest is asked for.
    target.unlink()
    server.ranges.clear()
    server.fault = lambda name, count: "500" if len(server.ranges) else "drop"
    with pytest.raises(UserError, match="the connection was lost 5 times .* the same command continues"):
        run(command(server, tmp_path, "medpmc_breastmnist"))
    half = len(content) // 2
    assert download.part_of(target).stat().st_size == half and not target.exists()
    server.fault = lambda name, count: ""
    server.ranges.clear()
    assert run(command(server, tmp_path, "medpmc_breastmnist")) == 0
    assert server.ranges == [(name, len(content) - half)] and target.read_bytes() == content


@pytest.mark.parametrize("version", ['"v2"', ""])
def test_fetch_does_not_continue_another_version_of_a_file(
    version: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_medmnist(server.folder, side=64)
    with_checksums(server, monkeypatch)
    server.fault = lambda name, count: "500" if count > 1 else "drop"
    with pytest.raises(UserError, match="the connection was lost"):
        run(command(server, tmp_path, "medpmc_breastmnist"))
    server.version, server.fault = version, lambda name, count: ""
    server.ranges.clear()
    content = (server.folder / "breastmnist_224.npz").read_bytes()
    assert run(command(server, tmp_path, "medpmc_breastmnist")) == 0
    assert server.ranges == [("breastmnist_224.npz", len(content))]


def test_fetch_wrong_checksum_or_page_keeps_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_medmnist(server.folder, side=64)
    with pytest.raises(UserError, match="has the MD5 .* but must have b56378a6"):
        run(command(server, tmp_path, "medpmc_breastmnist"))
    path.write_bytes(b"<!DOCTYPE html><html>log in</html>")
    with pytest.raises(UserError, match="is a web page, not the file"):
        run(command(server, tmp_path, "medpmc_breastmnist"))
    assert [name for name in rest(tmp_path) if not name.endswith(".json")] == []
    path.unlink()
    with pytest.raises(UserError, match="cannot be reached: the server answers 404"):
        run(command(server, tmp_path, "medpmc_breastmnist"))


def test_fetch_server_without_ranges_begins_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_medmnist(server.folder, side=64)
    with_checksums(server, monkeypatch)
    server.fault = lambda name, count: "drop" if count == 1 else "no range"
    assert run(command(server, tmp_path, "medpmc_breastmnist")) == 0
    assert (tmp_path / "data" / "medmnist" / path.name).read_bytes() == path.read_bytes()


def zipped(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_fetch_unpacks_isics_archives_to_the_layout_of_the_task(server: Server, tmp_path: Path) -> None:
    labels = write_ham10000(tmp_path / "made", 3)
    images = "ISIC2018_Task3_Test_Input"
    members = {f"{images}/{path.name}": path.read_bytes() for path in (tmp_path / "made" / images).iterdir()}
    zipped(server.folder / f"{images}.zip", members | {f"{images}/LICENSE.txt": b"CC BY-NC"})
    zipped(server.folder / f"{labels.stem}.zip", {f"{labels.stem}/{labels.name}": labels.read_bytes()})
    assert run(command(server, tmp_path, "medpmc_ham10000")) == 0
    evaluation = Evaluation(EvalConfig(task=("medpmc_ham10000",), data=str(tmp_path / "data"), progress=False))
    assert len(evaluation.tasks[0][1]) == 3
    assert not [name for name in rest(tmp_path) if name.endswith((".zip", ".part"))]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../evil.txt": b"x"}, "names the file '../evil.txt', which is outside its folder"),
        ({"/tmp/evil.txt": b"x"}, "which is outside its folder"),
        ({"bomb.jpg": bytes(5000)}, "unpacks to 5,000 bytes or more, far more than images do"),
    ],
)
def test_fetch_hostile_archive_is_refused(
    members: dict[str, bytes], message: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_MIN_BOMB", 1000)
    monkeypatch.setattr(fetch, "_MAX_RATIO", 2)
    for name in ("Input", "GroundTruth"):
        zipped(server.folder / f"ISIC2018_Task3_Test_{name}.zip", members)
    with pytest.raises(UserError, match=message):
        run(command(server, tmp_path, "medpmc_ham10000"))
    assert not list(tmp_path.rglob("evil.txt")) and not list(tmp_path.rglob("bomb.jpg"))


def test_fetch_damaged_or_huge_compressed_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "a.gz"
    archive.write_bytes(gzip.compress(bytes(5000) + b"text" * 100))
    content = archive.read_bytes()
    archive.write_bytes(content[:10] + b"\xff" + content[11:])
    with pytest.raises(UserError, match="a.gz is not an intact gzip file .* delete it and fetch it again"):
        fetch._gunzip(archive, tmp_path / "a")
    archive.write_bytes(content)
    monkeypatch.setattr(fetch, "_MIN_BOMB", 1000)
    monkeypatch.setattr(fetch, "_MAX_RATIO", 2)
    with pytest.raises(UserError, match="a.gz unpacks to .* or more, far more than images do"):
        fetch._gunzip(archive, tmp_path / "a")
    for name, start, message in ((".", 0, "outside its folder"), ("a", 31, "not an intact"), ("", 0, "not an intact")):
        with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
            file.writestr(zipfile.ZipInfo(name), b"text" * 100, compress_type=zipfile.ZIP_DEFLATED)
        content = (tmp_path / "b.zip").read_bytes()
        damaged = content[:start] + b"\xff" + content[start + 1 :] if start else content
        (tmp_path / "b.zip").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            fetch._unzip(tmp_path / "b.zip", tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_download_to_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> Iterator[int]:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield 0

    monkeypatch.setattr(download, "_stream", full)
    with pytest.raises(OSError, match="No space left") as error:
        download.download(download.Remote("http://x/a", 5, "v"), tmp_path / "a")
    assert error.value.filename == str(tmp_path / "a.part")


def test_fetch_names_what_has_to_be_had_by_hand(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(server, tmp_path, "medpmc_rsna_pneumonia", "medpmc_dad", "medpmc_deepdrid")) == 1
    shown = capsys.readouterr().out
    for text in ("kaggle.com", "springernature.figshare.com", f"{tmp_path}/data/deepdrid", "was not published"):
        assert text in shown
    with pytest.raises(UserError, match="unknown task 'medpmc_pcan'.*medpmc_pcam"):
        run(command(server, tmp_path, "medpmc_pcan"))
    with pytest.raises(UserError, match="task slake has no data to fetch; get them from"):
        run(command(server, tmp_path, "slake"))
    assert tasks.load("medpmc_kather_et_al_2016").download == "ubench"

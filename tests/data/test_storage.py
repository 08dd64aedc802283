"""Shards at a URL: the same samples as from the folder, or an error that names the shard."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loaders import by_key, loader, take
from range_server import Server
from run_results import loss_curve
from synthetic import tiny_run

from bclip_fast.data import storage
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.reader import BadSample, ShardDataset, merge_ranges
from bclip_fast.data.storage import ReadConfig, ReadError
from bclip_fast.errors import UserError
from bclip_fast.eval.datasets import open_dataset
from bclip_fast.train.config import DataConfig
from bclip_fast.train.trainer import train

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "_FIRST_DELAY_S", 0.01)


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// by aiohttp, which is not installed")
    with Server(shards) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, daemon=True)
        thread.start()
        yield http_server
        http_server.shutdown()


@pytest.fixture
def memory(shards: Path) -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for path in shards.iterdir():
        system.pipe_file(f"/bclip/{path.name}", path.read_bytes())
    yield "memory://bclip"
    system.rm("/bclip", recursive=True)


def assert_same_batches(shards: Path, dataset: ShardDataset, count: int = 6) -> None:
    with loader(ShardDataset(shards)) as local, loader(dataset) as remote:
        expected, batches = take(local, count), take(remote, count)
    assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
    assert by_key(batches) == by_key(expected)


def test_memory_and_file_urls_give_the_folders_samples(shards: Path, memory: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bclip_fast.data.shards.reader._CHUNK", 40)
    for url in (memory, f"file://{shards}", f"file://{shards}/"):
        dataset = ShardDataset(url)
        assert dataset.fingerprint == ShardDataset(shards).fingerprint
        assert_same_batches(shards, dataset)
        assert list(dataset.captions()) == list(ShardDataset(shards).captions())
        assert list(dataset) == list(ShardDataset(shards))
        assert dataset.caption(3) == ShardDataset(shards).caption(3)
        assert list(pickle.loads(pickle.dumps(dataset)))[:2] == list(dataset)[:2]
    assert open_dataset(memory, "val").captions() == open_dataset(str(shards), "val").captions()


def test_training_from_url_equals_training_from_folder(shards: Path, memory: str, tmp_path: Path):
    local = train(tiny_run(tmp_path / "local", shards))
    remote = train(tiny_run(tmp_path / "remote", shards, data=DataConfig(shards=memory, shuffle_block=32)))
    assert loss_curve(remote) == loss_curve(local)


def test_missing_url_or_file_is_named(memory: str):
    for url, words in [
        ("memory://nowhere", "memory://nowhere/dataset.json is missing"),
        ("nonsense://x/y", "nonsense://x/y: Protocol not known"),
    ]:
        with pytest.raises(UserError, match=words):
            ShardDataset(url)
    dataset = ShardDataset(memory)
    fsspec.filesystem("memory").rm("/bclip/train-000000.tar")
    with pytest.raises(ReadError, match=r"memory://bclip/train-000000\.tar: cannot be read, bytes \d+ to \d+"):
        dataset.fetch([0])()
    fsspec.filesystem("memory").rm("/bclip/train-000001.index.json")
    with pytest.raises(UserError, match=r"train-000001\.index\.json is missing"):
        dataset.fetch([dataset.shard_sizes[0]])


def test_fetch_damaged_sample_returns_bad_sample(shards: Path, memory: str):
    system = fsspec.filesystem("memory")
    data = bytearray(system.cat_file("/bclip/train-000000.tar"))
    data[:100] = b"\xff" * 100
    system.pipe_file("/bclip/train-000000.tar", bytes(data))
    first, second = ShardDataset(memory).fetch([0, 1])()
    assert isinstance(first, BadSample)
    assert isinstance(second, Sample)


def test_merge_ranges_respects_gap_and_span():
    spans = [(0, 10, 20), (1, 0, 5), (0, 25, 30), (0, 40, 50), (0, 10, 20), (0, 50, 59)]
    assert merge_ranges(spans, 5, 100) == [(0, 10, 30), (0, 40, 59), (1, 0, 5)]
    assert merge_ranges(spans, 10, 100) == [(0, 10, 59), (1, 0, 5)]
    assert merge_ranges(spans, 10, 20) == [(0, 10, 30), (0, 40, 59), (1, 0, 5)]
    assert merge_ranges(spans, 0, 1) == [(0, 10, 20), (0, 10, 20), (0, 25, 30), (0, 40, 50), (0, 50, 59), (1, 0, 5)]


@pytest.mark.parametrize("max_gap_kib", [0, 1, 256])
def test_fetch_gap_does_not_change_samples(shards: Path, memory: str, max_gap_kib: int):
    local, remote = ShardDataset(shards), ShardDataset(memory, read=ReadConfig(max_gap_kib=max_gap_kib))
    for indices in ([5, 2, 5, 90, 1, 89], list(range(96)), [7]):
        assert remote.fetch(indices)() == local.fetch(indices)()


def test_fetch_over_http_merges_ranges(shards: Path, server: Server):
    dataset = ShardDataset(server.url)
    dataset.fetch(range(96))()
    tars = [size for name, size in server.ranges if name.endswith(".tar")]
    assert len(tars) == len(dataset.shard_sizes) < 20
    assert_same_batches(shards, dataset)


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "short", "trickle"])
def test_read_transient_faults_are_repeated(shards: Path, server: Server, fault: str):
    server.fault = lambda name, count: fault if count % 2 and name.startswith("train") else ""
    dataset = ShardDataset(server.url, read=ReadConfig(attempts=8, timeout_s=0.5 if fault == "trickle" else 30))
    assert_same_batches(shards, dataset)
    assert sum(server.counts.values()) > 12


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", r"500.*\(3 attempts\)"),
        ("404", "cannot be read"),
        ("403", "403"),
        ("drop", r"\(3 attempts\)"),
        ("short", r"received \d+ of \d+ bytes \(truncated\?\) \(3 attempts\)"),
        ("trickle", r"FSTimeoutError \(3 attempts\)"),
        ("no range", "ignores Range requests"),
    ],
)
def test_read_permanent_fault_is_an_error_with_the_shard(server: Server, fault: str, words: str):
    server.fault = lambda name, count: fault if name == "train-000001.tar" else ""
    source = loader(ShardDataset(server.url, read=ReadConfig(attempts=3, timeout_s=0.3)))
    with pytest.raises(ReadError, match=rf"{server.url}/train-000001\.tar: .*{words}"):
        take(source, 12)
    if fault in ("404", "403", "no range"):
        reads = server.counts["train-000001.tar"]
        time.sleep(0.3)
        assert server.counts["train-000001.tar"] == reads, "a final error must not be repeated"


def test_loader_silent_server_is_an_error_after_the_timeout(server: Server):
    """The server answers only at the end of the test."""
    end_of_test = threading.Event()
    server.fault = lambda name, count: (end_of_test.wait(600) and "") or "" if name == "train-000001.tar" else ""
    source = loader(ShardDataset(server.url), timeout_s=0.7)
    try:
        with pytest.raises(UserError, match=r"no batch within timeout_s=0\.7: reading .*/train-000001\.tar, bytes"):
            take(source, 12)
    finally:
        end_of_test.set()


def test_loader_reads_batches_ahead(server: Server):
    """While the first batch is in use, the loader requests the samples of the next four."""
    dataset = ShardDataset(server.url, read=ReadConfig(max_gap_kib=0))

    def num_requests() -> int:
        return sum(server.counts.values())

    first_count = num_requests()
    with loader(dataset, prefetch_batches=1) as source:
        take(source, 12)
    # The first loader requested 12 to 14 batches.
    num_for_batches, second_count = num_requests() - first_count, num_requests()
    with loader(dataset, prefetch_batches=4) as source:
        next(source)
        deadline = time.monotonic() + 60
        while num_requests() - second_count < num_for_batches / 4:
            assert time.monotonic() < deadline, "the loader reads no batches ahead"
            time.sleep(0.01)


def num_downloads(server: Server) -> int:
    return sum(name.endswith(".tar") for name, _ in server.ranges)


def test_cache_downloads_each_shard_once(shards: Path, server: Server, tmp_path: Path):
    read = ReadConfig(cache_dir=str(tmp_path / "cache"))
    assert_same_batches(shards, ShardDataset(server.url, read=read), 12)
    assert (
        num_downloads(server) == len(list(shards.glob("train-*.tar"))) == len(list((tmp_path / "cache").glob("*.tar")))
    )
    dataset = ShardDataset(server.url, read=read)
    assert list(pickle.loads(pickle.dumps(dataset))) == list(ShardDataset(shards))
    assert num_downloads(server) == len(list(shards.glob("train-*.tar")))


def test_cache_is_bounded_and_downloads_removed_shards_again(shards: Path, server: Server, tmp_path: Path):
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    read = ReadConfig(cache_dir=str(tmp_path), cache_gib=2.5 * largest / (1 << 30))
    assert_same_batches(shards, ShardDataset(server.url, read=read), 12)
    for _ in range(2):
        assert list(ShardDataset(server.url, read=read)) == list(ShardDataset(shards))
        assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 2.5 * largest
    assert num_downloads(server) > len(list(shards.glob("train-*.tar")))
    with pytest.raises(UserError, match=r"cache_gib=1e-09 is too small: a shard of http"):
        ShardDataset(server.url, read=ReadConfig(cache_dir=str(tmp_path), cache_gib=1e-9))


def test_cache_rejects_copy_with_wrong_hash(shards: Path, server: Server, tmp_path: Path):
    server.folder = tmp_path / "data"
    server.folder.mkdir()
    for path in shards.iterdir():
        (server.folder / path.name).write_bytes(path.read_bytes())
    data = bytearray((server.folder / "train-000000.tar").read_bytes())
    data[-1] ^= 1
    (server.folder / "train-000000.tar").write_bytes(data)
    dataset = ShardDataset(server.url, read=ReadConfig(cache_dir=str(tmp_path / "cache")))
    with pytest.raises(ReadError, match=r"train-000000\.tar: its SHA-256 differs from dataset\.json"):
        dataset[0]
    assert not list((tmp_path / "cache").glob("*.tar"))
    assert not list((tmp_path / "cache").glob("*.partial"))


def _read_all(url: str, folder: str, results: Any) -> None:
    results.put([sample.key for sample in ShardDataset(url, read=ReadConfig(cache_dir=folder))])


def test_cache_is_shared_by_processes(shards: Path, server: Server, tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_read_all, args=(server.url, str(tmp_path), results)) for _ in range(2)]
    for process in processes:
        process.start()
    keys = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert keys == [[sample.key for sample in ShardDataset(shards)]] * 2
    assert num_downloads(server) == len(list(shards.glob("train-*.tar")))


def test_s3_url_gives_the_folders_samples(shards: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    for name, value in [
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ]:
        monkeypatch.setenv(name, value)
    service = moto.ThreadedMotoServer(port=0)
    service.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{service._server.server_port}")
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("figures")
        for path in shards.iterdir():
            system.pipe_file(f"figures/sets/{path.name}", path.read_bytes())
        dataset = ShardDataset("s3://figures/sets")
        assert_same_batches(shards, dataset)
        system.rm_file("figures/sets/train-000000.tar")
        with pytest.raises(ReadError, match=r"s3://figures/sets/train-000000\.tar: cannot be read"):
            dataset.fetch([0])()
    finally:
        service.stop()


def test_forked_process_reads_from_url(shards: Path, server: Server):
    dataset = ShardDataset(server.url)
    expected = dataset[0].key
    receive, send = os.pipe()
    if not (child := os.fork()):
        os.write(send, dataset[0].key.encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as file:
        assert file.read() == expected
    os.waitpid(child, 0)

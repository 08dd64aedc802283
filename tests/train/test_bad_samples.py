"""Damage while training: samples are replaced alike on any ranks, storage that fails stops every rank by name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import KINDS, REASONS, spoil
from loaders import loader, take
from ranks import on_ranks
from synthetic import tiny_run, weights, write_shards

from bclip_fast import distributed
from bclip_fast.data.loader import Batch
from bclip_fast.data.sampler import NUM_FALLBACKS, ShardSampler
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.storage import ReadConfig, ReadError
from bclip_fast.errors import UserError
from bclip_fast.io.runs import read_metrics
from bclip_fast.train.config import DataConfig
from bclip_fast.train.engine.deepspeed import EngineConfig
from bclip_fast.train.trainer import train

QUICK = ReadConfig(attempts=2)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("sound") / "shards", num_samples=40, num_val=1)


@pytest.fixture(scope="module")
def spoilt(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """40 samples with one of each damage and a pair of which one is the other's first reserve; kind by key."""
    folder = shutil.copytree(sound, tmp_path_factory.mktemp("spoilt") / "shards")
    dataset = ShardDataset(folder)
    stream = ShardSampler(dataset.shard_sizes, dataset.fingerprint, batch_size=8, seed=1)
    first = stream.sample(0, 11)
    chain = [first, next(stream.fallbacks(0, 11))]
    others = [i for i in range(0, 40, 7) if i not in chain][: len(KINDS)]
    found = {spoil(folder, index, kind): kind for index, kind in zip(others, KINDS, strict=True)}
    return folder, {**found, **{spoil(folder, index): "pixels" for index in chain}}


def by_key(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """A global batch as a set: with shares of equal cost, which rank has a sample depends on their number."""
    rows = [
        (key, image.numpy().tobytes(), tuple(ids.tolist()))
        for batch in batches
        for key, image, ids in zip(batch.keys, batch.images, batch.ids.split(batch.lengths), strict=True)
    ]
    return sorted(rows)


def test_damaged_samples_are_replaced_and_listed(spoilt: tuple[Path, dict[str, str]], sound: Path):
    folder, kinds = spoilt
    before = threading.active_count()
    with loader(ShardDataset(folder)) as source, loader(ShardDataset(sound)) as clean:
        found, whole = take(source, 5), take(clean, 5)
    assert threading.active_count() == before
    assert {bad.key for batch in found for bad in batch.bad} == set(kinds)
    dataset, stream = ShardDataset(folder), source.sampler
    for number, (batch, other) in enumerate(zip(found, whole, strict=True)):
        assert len(batch.keys) == len(batch.images) == len(batch.lengths) == 8 and not other.bad
        assert not set(batch.keys) & set(kinds)
        replaced = {bad.position for bad in batch.bad}
        for row, key in enumerate(batch.keys):
            position = 8 * number + row
            tried = [bad.index for bad in batch.bad if bad.position == position]
            if position not in replaced:
                assert key == other.keys[row] and torch.equal(batch.images[row], other.images[row])
                continue
            wanted = [stream.sample(0, position), *stream.fallbacks(0, position)]
            assert tried == wanted[: len(tried)] and dataset.name_of(wanted[len(tried)])[0] == key
        for bad in batch.bad:
            assert bad.epoch == 0 and REASONS[kinds[bad.key]] in bad.reason
            assert (bad.key, bad.shard) == dataset.name_of(bad.index)
    assert any(len([bad for bad in batch.bad if bad.position == 11]) == 2 for batch in found)
    # A tokenizer is learned from the captions that can be read.
    spoilt_caption = next(key for key, kind in kinds.items() if kind == "caption")
    sample = next(sample for sample in ShardDataset(sound) if sample.key == spoilt_caption)
    expected = list(ShardDataset(sound).captions())
    expected.remove(sample.caption)
    assert sorted(dataset.captions()) == sorted(expected)


@pytest.mark.parametrize("cost", [False, True])
def test_resume_at_every_batch_and_world_size(spoilt: tuple[Path, dict[str, str]], cost: bool):
    """Keys, pixels and replacements are those of one uninterrupted rank, stopped anywhere, continued on 1, 2, 4."""
    dataset = ShardDataset(spoilt[0])
    costs = {"cost": dataset.caption_bytes} if cost else {}
    with loader(dataset, stream=costs) as source:
        states, whole = [source.state_dict()], []
        for _ in range(7):
            whole.append(next(source))
            states.append(source.state_dict())
    assert sum(len(batch.bad) for batch in whole[:5]) >= 7
    for world_size in (1, 2, 4):
        for stop, state in enumerate(states[:-1]):
            ranks = []
            for rank in range(world_size):
                with loader(dataset, rank, world_size, stream=costs) as source:
                    source.load_state_dict(state)
                    ranks.append(take(source, min(2, 7 - stop)))
                    # So that it may be stopped here again and go on at yet another number of ranks.
                    assert source.state_dict() == states[stop + len(ranks[-1])]
            for batch, parts in zip(whole[stop:], zip(*ranks, strict=True), strict=False):
                assert {len(part.keys) for part in parts} == {8 // world_size}
                assert by_key(list(parts)) == by_key([batch])
                bad = sorted((bad for part in parts for bad in part.bad), key=lambda bad: bad.position)
                assert bad == batch.bad
                if not cost:
                    assert [key for part in parts for key in part.keys] == batch.keys


def test_only_so_many_reserves_are_tried(sound: Path, tmp_path: Path):
    folder = shutil.copytree(sound, tmp_path / "shards")
    for index in range(40):
        spoil(folder, index)
    with (
        loader(ShardDataset(folder)) as source,
        pytest.raises(
            UserError, match=rf"sample \w+ of train-\d+.tar and {NUM_FALLBACKS} before it are damaged: cannot"
        ),
    ):
        next(source)


def test_a_read_that_fails_once_is_tried_again(sound: Path, monkeypatch: pytest.MonkeyPatch):
    with loader(ShardDataset(sound)) as source:
        expected = take(source, 3)
    real, failed = os.pread, set()

    def pread(number: int, size: int, offset: int) -> bytes:
        if offset % 7 == 0 and offset not in failed:
            failed.add(offset)
            raise OSError(5, "Input/output error")
        return real(number, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    with loader(ShardDataset(sound, read=QUICK)) as source:
        found = take(source, 3)
    assert failed and by_key(found) == by_key(expected) and not any(batch.bad for batch in found)


def cut(path: Path) -> None:
    os.truncate(path, 2000)


@pytest.mark.parametrize(
    "fault, words",
    [(cut, r"ends before byte \d+ \(truncated\?\)"), (Path.unlink, "cannot be read, bytes .*No such file")],
)
def test_a_shard_that_is_cut_or_gone_stops_the_loader_by_name(sound: Path, tmp_path: Path, fault, words: str):
    dataset = ShardDataset(shutil.copytree(sound, tmp_path / "shards"), read=QUICK)
    path = tmp_path / "shards" / "train-000001.tar"
    fault(path)
    before = threading.active_count()
    source = loader(dataset)
    with pytest.raises(ReadError, match=rf"{path}: {words}"):
        take(source, 6)
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(source)


@pytest.mark.parametrize("where", ["sample", "index"])
def test_a_stuck_read_is_an_error_in_time_and_closing_does_not_hang(
    sound: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    release = threading.Event()
    dataset = ShardDataset(sound)
    name = "_read" if where == "sample" else "_read_all"
    real = getattr(dataset.storage, name)

    def stuck(file: str, *bounds: int) -> bytes:
        if "train-000001" in file:
            release.wait(600)
        return real(file, *bounds)

    monkeypatch.setattr(dataset.storage, name, stuck)
    before = threading.active_count()
    source = loader(dataset, timeout_s=0.5, prefetch_batches=6)
    words = r"no batch within timeout_s=0\.5: reading .*train-000001\.(tar, bytes \d+|index\.json, the whole)"
    with pytest.raises(UserError, match=words):
        take(source, 6)
    source.close()
    # Neither the error nor close() waited for the read, which goes on. Its thread ends as soon as the read does.
    release.set()
    for _ in range(1200):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before


def test_a_slow_thread_that_reads_nothing_is_named_so(sound: Path):
    release = threading.Event()

    def slow(captions: list[str]) -> list[list[int]]:
        release.wait(600)
        return [[1]] * len(captions)

    with loader(ShardDataset(sound), tokenize=slow, timeout_s=0.3) as source:
        with pytest.raises(UserError, match="decoding or tokenising"):
            next(source)
        release.set()


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "bad_samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def without_rank(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "rank"} for record in records]


def curve(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def data(shards: Path, **changes: Any) -> DataConfig:
    return DataConfig(str(shards), shuffle_block=32, read=QUICK, **changes)


# Of 96 samples: the batch of 16 of each of 6 steps is an epoch.
SPOILT = (5, 40, 41, 77)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with shards that have 4 damaged samples and a run of one rank on them, 9 steps of an epoch of 6."""
    root = tmp_path_factory.mktemp("trained")
    write_shards(root / "shards")
    shutil.copytree(root / "shards", root / "sound")
    for index, kind in zip(SPOILT, KINDS, strict=False):
        spoil(root / "shards", index, kind)
    train(tiny_run(root / "one", root / "shards", max_steps=9, data=data(root / "shards")))
    return root


def test_a_run_survives_lists_them_and_resumes_to_the_same(trained: Path, tmp_path: Path):
    run = trained / "one"
    records = lines(run)
    assert {record["index"] for record in records} == set(SPOILT)
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    assert {record["epoch"] for record in records} == {0, 1} and {record["rank"] for record in records} == {0}
    assert records[0].keys() == {"step", "rank", "epoch", "position", "index", "key", "shard", "reason"}
    counts = [record["bad_samples"] for record in read_metrics(run / "metrics.jsonl")]
    assert counts == sorted(counts) and counts[5] == counts[-1] == len(SPOILT)
    assert counts == [len({r["index"] for r in records if r["step"] <= step}) for step in range(1, 10)]
    part = shutil.copytree(run, tmp_path / "part")
    for step in (6, 9):
        shutil.rmtree(part / "checkpoints" / f"step-{step:08d}")
    train(tiny_run(part, trained / "shards", max_steps=9, data=data(trained / "shards"), resume=True))
    assert curve(part) == curve(run) and lines(part) == records
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(part).items())


def _on_two_ranks(rank: int, folder: str) -> dict[str, Any]:
    root = Path(folder)
    engine = EngineConfig(name="ddp", precision="fp32")
    config = tiny_run(root / "two", root / "shards", max_steps=9, data=data(root / "shards"), engine=engine)
    train(config)
    found: dict[str, Any] = {}
    # Rank 1's copy alone is damaged.
    own = root / ("shards" if rank == 1 else "sound")
    train(dataclasses.replace(config, run=str(root / "uneven"), data=data(own)))

    def refusal(name: str, shards: Path, **changes: Any) -> None:
        try:
            train(dataclasses.replace(config, run=str(root / name), data=data(shards, **changes)))
        except UserError as error:
            found[name] = str(error)
        distributed.barrier()

    refusal("limited", root / "shards", max_bad_samples=2)
    if rank == 1:
        shutil.copytree(root / "sound", root / "short")
        real = ShardDataset.fetch

        def cutting(self: ShardDataset, indices: Any) -> Any:
            os.truncate(root / "short" / "train-000002.tar", 1024)
            return real(self, indices)

        ShardDataset.fetch = cutting  # type: ignore[method-assign]
    refusal("cut", root / ("short" if rank == 1 else "sound"))
    if rank == 1:
        ShardDataset.fetch = lambda self, indices: lambda: time.sleep(5)  # type: ignore
    refusal("stuck", root / "sound", timeout_s=1.0)
    return found


def test_two_ranks_stay_in_step(trained: Path):
    found = on_ranks(2, _on_two_ranks, str(trained))
    one, two = lines(trained / "one"), lines(trained / "two")
    assert without_rank(two) == without_rank(one) and {record["rank"] for record in two} == {0, 1}
    # What differs is the order of fp32 sums: the measured bound of test_engine_ranks.
    torch.testing.assert_close(curve(trained / "two"), curve(trained / "one"), rtol=0, atol=2e-5)
    uneven = lines(trained / "uneven")
    assert uneven == [record for record in two if record["rank"] == 1] and 0 < len(uneven) < len(two)
    assert len(curve(trained / "uneven")) == 9
    for part in found:
        assert "3 samples are damaged, data.max_bad_samples is 2: sample sample" in part["limited"]
        assert str(trained / "limited" / "bad_samples.jsonl") in part["limited"]
        assert f"rank 1: {trained / 'short' / 'train-000002.tar'}: ends before byte" in part["cut"]
        assert "rank 1: no batch within timeout_s=1" in part["stuck"]
    assert len(curve(trained / "limited")) < 6

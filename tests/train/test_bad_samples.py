"""Damage during training: all ranks replace samples alike, and a storage failure stops every rank with its name."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import KINDS, REASONS, spoil
from loaders import by_key, loader, take
from ranks import on_ranks
from run_results import bad_sample_lines, loss_curve
from synthetic import tiny_run, weights, write_shards

from bclip_fast import distributed
from bclip_fast.data.sampler import NUM_FALLBACKS, ShardSampler
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.storage import ReadConfig, ReadError
from bclip_fast.errors import UserError
from bclip_fast.io.runs import read_metrics
from bclip_fast.train.config import DataConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.trainer import train

QUICK = ReadConfig(attempts=2)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("sound") / "shards", num_samples=40, num_val=1)


@pytest.fixture(scope="module")
def spoilt(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """40 samples with one damage of each kind, and two more damaged ones, of which one is the other's first fallback.

    Returns the folder, and the kind of damage by key.
    """
    folder = shutil.copytree(sound, tmp_path_factory.mktemp("spoilt") / "shards")
    dataset = ShardDataset(folder)
    stream = ShardSampler(dataset.shard_sizes, dataset.fingerprint, batch_size=8, seed=1)
    first = stream.sample(0, 11)
    chain = [first, next(stream.fallbacks(0, 11))]
    others = [i for i in range(0, 40, 5) if i not in chain][: len(KINDS)]
    kinds = {spoil(folder, index, kind): kind for index, kind in zip(others, KINDS, strict=True)}
    return folder, {**kinds, **{spoil(folder, index): "pixels" for index in chain}}


def test_damaged_samples_are_replaced_and_listed(spoilt: tuple[Path, dict[str, str]], sound: Path):
    folder, kinds = spoilt
    before = threading.active_count()
    with loader(ShardDataset(folder)) as source, loader(ShardDataset(sound)) as clean:
        batches, clean_batches = take(source, 5), take(clean, 5)
    assert threading.active_count() == before
    assert {bad.key for batch in batches for bad in batch.bad} == set(kinds)
    dataset, stream = ShardDataset(folder), source.sampler
    for number, (batch, other) in enumerate(zip(batches, clean_batches, strict=True)):
        assert len(batch.keys) == len(batch.images) == len(batch.lengths) == 8
        assert not other.bad
        assert not set(batch.keys) & set(kinds)
        replaced = {bad.position for bad in batch.bad}
        for row, key in enumerate(batch.keys):
            position = 8 * number + row
            tried = [bad.index for bad in batch.bad if bad.position == position]
            if position not in replaced:
                assert key == other.keys[row]
                assert torch.equal(batch.images[row], other.images[row])
                continue
            candidates = [stream.sample(0, position), *stream.fallbacks(0, position)]
            assert tried == candidates[: len(tried)]
            assert dataset.name_of(candidates[len(tried)])[0] == key
        for bad in batch.bad:
            assert bad.epoch == 0
            assert REASONS[kinds[bad.key]] in bad.reason
            assert (bad.key, bad.shard) == dataset.name_of(bad.index)
    assert any(len([bad for bad in batch.bad if bad.position == 11]) == 2 for batch in batches)
    # A tokenizer is trained on the readable captions.
    spoilt_caption = next(key for key, kind in kinds.items() if kind == "caption")
    sample = next(sample for sample in ShardDataset(sound) if sample.key == spoilt_caption)
    expected = list(ShardDataset(sound).captions())
    expected.remove(sample.caption)
    assert sorted(dataset.captions()) == sorted(expected)


@pytest.mark.parametrize("cost", [False, True])
def test_resume_at_every_batch_and_world_size_gives_same_samples(spoilt: tuple[Path, dict[str, str]], cost: bool):
    """After a stop at any batch, 1, 2 and 4 ranks continue with the samples of an uninterrupted rank."""
    dataset = ShardDataset(spoilt[0])
    costs = {"cost": lambda _, i: dataset.caption_bytes(i)} if cost else {}
    with loader(dataset, stream=costs) as source:
        states, batches = [source.state_dict()], []
        for _ in range(7):
            batches.append(next(source))
            states.append(source.state_dict())
    assert sum(len(batch.bad) for batch in batches[:5]) >= 7
    for world_size in (1, 2, 4):
        for stop, state in enumerate(states[:-1]):
            ranks = []
            for rank in range(world_size):
                with loader(dataset, rank, world_size, stream=costs) as source:
                    source.load_state_dict(state)
                    ranks.append(take(source, min(2, 7 - stop)))
                    # So the run can stop again here, and continue on another number of ranks.
                    assert source.state_dict() == states[stop + len(ranks[-1])]
            for batch, parts in zip(batches[stop:], zip(*ranks, strict=True), strict=False):
                assert {len(part.keys) for part in parts} == {8 // world_size}
                assert by_key(list(parts)) == by_key([batch])
                bad = sorted((bad for part in parts for bad in part.bad), key=lambda bad: bad.position)
                assert bad == batch.bad
                if not cost:
                    assert [key for part in parts for key in part.keys] == batch.keys


def test_too_many_damaged_fallbacks_are_an_error(sound: Path, tmp_path: Path):
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


def test_failed_read_is_retried(sound: Path, monkeypatch: pytest.MonkeyPatch):
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
        batches = take(source, 3)
    assert failed
    assert by_key(batches) == by_key(expected)
    assert not any(batch.bad for batch in batches)


def cut(path: Path) -> None:
    os.truncate(path, 2000)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(cut, r"ends before byte \d+ \(truncated\?\)"), (Path.unlink, "cannot be read, bytes .*No such file")],
)
def test_truncated_or_missing_shard_is_an_error(sound: Path, tmp_path: Path, fault, words: str):
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
def test_stuck_read_times_out_and_loader_closes(sound: Path, monkeypatch: pytest.MonkeyPatch, where: str):
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
    words = r"no batch within timeout_s=0\.5: reading .*train-000001\.(tar, bytes \d+|index\.json, the whole file)"
    with pytest.raises(UserError, match=words):
        take(source, 6)
    source.close()
    # Neither the error nor close() waited for the read. Its thread ends as soon as the read ends.
    release.set()
    for _ in range(1200):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before


def test_slow_tokenizer_is_named_in_timeout(sound: Path):
    release = threading.Event()

    def slow(captions: list[str]) -> list[list[int]]:
        release.wait(600)
        return [[1]] * len(captions)

    with loader(ShardDataset(sound), tokenize=slow, timeout_s=0.3) as source:
        with pytest.raises(UserError, match="decoding or tokenising"):
            next(source)
        release.set()


def without_rank(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "rank"} for record in records]


def data(shards: Path, **changes: Any) -> DataConfig:
    return DataConfig(str(shards), shuffle_block=32, read=QUICK, **changes)


# Indices of the damaged samples among 96. An epoch has 6 steps of 16 samples.
SPOILT = (5, 40, 41, 77)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards that have 4 damaged samples, and with a run of 9 steps of one rank on them."""
    root = tmp_path_factory.mktemp("trained")
    write_shards(root / "shards")
    shutil.copytree(root / "shards", root / "sound")
    for index, kind in zip(SPOILT, KINDS, strict=False):
        spoil(root / "shards", index, kind)
    train(tiny_run(root / "one", root / "shards", max_steps=9, data=data(root / "shards")))
    return root


@pytest.mark.slow
def test_run_with_damaged_samples_lists_them_and_resumes_bitwise(trained: Path, tmp_path: Path):
    run = trained / "one"
    records = bad_sample_lines(run)
    assert {record["index"] for record in records} == set(SPOILT)
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    assert {record["epoch"] for record in records} == {0, 1}
    assert {record["rank"] for record in records} == {0}
    assert records[0].keys() == {"step", "rank", "epoch", "position", "index", "key", "shard", "reason"}
    counts = [record["bad_samples"] for record in read_metrics(run / "metrics.jsonl")]
    assert counts == sorted(counts)
    assert counts[5] == counts[-1] == len(SPOILT)
    assert counts == [len({r["index"] for r in records if r["step"] <= step}) for step in range(1, 10)]
    part = shutil.copytree(run, tmp_path / "part")
    for step in (6, 9):
        shutil.rmtree(part / "checkpoints" / f"step-{step:08d}")
    train(tiny_run(part, trained / "shards", max_steps=9, data=data(trained / "shards"), resume=True))
    assert loss_curve(part) == loss_curve(run)
    assert bad_sample_lines(part) == records
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(part).items())


def _on_two_ranks(rank: int, folder: str) -> dict[str, Any]:
    root = Path(folder)
    engine = EngineConfig(name="ddp", precision="fp32")
    config = tiny_run(root / "two", root / "shards", max_steps=9, data=data(root / "shards"), engine=engine)
    train(config)
    errors: dict[str, Any] = {}
    # Only rank 1's copy is damaged.
    local_shards = root / ("shards" if rank == 1 else "sound")
    train(dataclasses.replace(config, run=str(root / "uneven"), data=data(local_shards)))

    def refusal(name: str, shards: Path, **changes: Any) -> None:
        try:
            train(dataclasses.replace(config, run=str(root / name), data=data(shards, **changes)))
        except UserError as error:
            errors[name] = str(error)
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
    return errors


def test_two_ranks_agree_on_damaged_samples(trained: Path):
    errors_of_ranks = on_ranks(2, _on_two_ranks, str(trained))
    one, two = bad_sample_lines(trained / "one"), bad_sample_lines(trained / "two")
    assert without_rank(two) == without_rank(one)
    assert {record["rank"] for record in two} == {0, 1}
    # The order of fp32 sums differs. The tolerance is that of test_engine_ranks.py.
    torch.testing.assert_close(loss_curve(trained / "two"), loss_curve(trained / "one"), rtol=0, atol=2e-5)
    uneven = bad_sample_lines(trained / "uneven")
    assert uneven == [record for record in two if record["rank"] == 1]
    assert 0 < len(uneven) < len(two)
    assert len(loss_curve(trained / "uneven")) == 9
    for errors in errors_of_ranks:
        assert "3 samples are damaged, more than data.max_bad_samples=2: sample sample" in errors["limited"]
        assert str(trained / "limited" / "bad_samples.jsonl") in errors["limited"]
        assert f"rank 1: {trained / 'short' / 'train-000002.tar'}: ends before byte" in errors["cut"]
        assert "rank 1: no batch within timeout_s=1" in errors["stuck"]
    assert len(loss_curve(trained / "limited")) < 6

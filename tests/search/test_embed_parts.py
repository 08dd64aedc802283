"""Parts of `bclip embed`: kills, ranks, damaged parts, and parts of another model."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from colours import ColourModel, colour_model, preprocess, tokenizer
from processes import wait_for
from ranks import fork_server, on_ranks
from torch import Tensor

from bclip_fast import distributed
from bclip_fast.errors import UserError
from bclip_fast.search.index import EmbedConfig, embed
from bclip_fast.search.parts import FOLDER, Parts


class Control(io.BytesIO):
    """Counts of a model, and when it sleeps and fails. The key of a model leaves such streams out."""

    num_images, num_batches, pause, limit = 0, 0, 0.0, 1 << 30


class Counting(ColourModel):
    """Counts the images in `num_images`, sleeps `pause` seconds per batch, and fails after `limit` batches."""

    def __init__(self, pause: float = 0.0, limit: int = 1 << 30) -> None:
        super().__init__()
        self.control = Control()
        self.control.pause, self.control.limit = pause, limit

    @property
    def num_images(self) -> int:
        return self.control.num_images

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        if image.shape[0] > 1:  # the probes come one by one
            time.sleep(self.control.pause)
            self.control.num_images += len(image)
            self.control.num_batches += 1
            if self.control.num_batches > self.control.limit:
                raise KeyboardInterrupt
        return super().encode_image(image, normalize)


def config_of(shards: Path, out: Path, **options: Any) -> EmbedConfig:
    settings: dict[str, Any] = {"part_size": 4, "batch_size": 2, "progress": False, **options}
    return EmbedConfig(model="colours", data=str(shards), out=str(out), **settings)


def digest(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def run_killed(config: EmbedConfig, pause: float, started: Path) -> None:
    torch.set_num_threads(1)
    import faiss  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    started.touch()
    embed(config, (Counting(pause), preprocess, tokenizer))


@pytest.mark.parametrize("num_kills", [2, pytest.param(10, marks=pytest.mark.long)])
def test_embed_killed_at_random_writes_the_bytes_of_an_uninterrupted_run(
    num_kills: int, shards: Path, tmp_path: Path
) -> None:
    """No complete part is written again, and each kill ends a living process."""
    expected = digest(embed(config_of(shards, tmp_path / "whole"), (Counting(), preprocess, tokenizer)))
    config, generator = config_of(shards, tmp_path / "killed"), random.Random(num_kills)
    parts: dict[str, tuple[int, int]] = {}
    kills = 0
    while kills < num_kills:
        started = tmp_path / "started"
        process = fork_server().Process(target=run_killed, args=(config, 0.03, started))
        process.start()
        wait_for(started.exists)
        started.unlink()
        time.sleep(generator.uniform(0, 0.4))
        process.kill()
        process.join()
        kills += process.exitcode == -9
        if process.exitcode == 0:
            parts = {}
            continue
        files = {path.name: path.stat() for path in (tmp_path / "killed" / FOLDER).glob("*.safetensors")}
        states = {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in files.items()}
        assert {name: states[name] for name in parts if states} == (parts if states else {})
        parts = states
    counted = Counting()
    assert digest(embed(config, (counted, preprocess, tokenizer))) == expected
    assert counted.num_images == 40 - 4 * len(parts)


def embed_on_rank(rank: int, shards: Path, out: Path) -> int:
    model = Counting(0.01)
    embed(config_of(shards, out), (model, preprocess, tokenizer))
    return model.num_images


def turns_on_rank(rank: int) -> list[int]:
    return [*distributed.turns(7), *(10 + turn for turn in distributed.turns(5))]


def test_embed_on_two_ranks_equals_one_rank(shards: Path, tmp_path: Path) -> None:
    expected = digest(embed(config_of(shards, tmp_path / "one"), (Counting(), preprocess, tokenizer)))
    assert sum(on_ranks(2, embed_on_rank, shards, tmp_path / "two")) == 40
    assert digest(tmp_path / "two") == expected
    assert sorted(itertools.chain(*on_ranks(2, turns_on_rank))) == [*range(7), *range(10, 15)]


def model_of_rank(rank: int, shards: Path, out: Path) -> str:
    model = Counting()
    model.logit_scale.data += rank
    try:
        embed(config_of(shards, out), (model, preprocess, tokenizer))
    except UserError as error:
        return str(error)
    return ""


def test_embed_on_ranks_with_unequal_models_raises(shards: Path, tmp_path: Path) -> None:
    assert [m[:32] for m in on_ranks(2, model_of_rank, shards, tmp_path / "i")] == [
        "ranks 1 have another model, othe"
    ] * 2


def interrupted(shards: Path, out: Path) -> Path:
    """Leave 3 of 10 complete parts."""
    with pytest.raises(KeyboardInterrupt):
        embed(config_of(shards, out), (Counting(limit=6), preprocess, tokenizer))
    assert len(list((out / FOLDER).glob("*.safetensors"))) == 3
    return out


def damage_part(out: Path) -> None:
    path = sorted((out / FOLDER).iterdir())[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_part(out: Path) -> None:
    os.truncate(sorted((out / FOLDER).iterdir())[1], 30)


@pytest.mark.parametrize(
    ("change", "options", "num_again", "message"),
    [
        (lambda out: None, {}, 28, "3 of 10 parts are complete"),
        (damage_part, {}, 32, "its checksum is wrong"),
        (cut_part, {}, 32, "is damaged"),
        (lambda out: None, {"part_size": 8}, 40, "deleted 3 parts of another model, data or setting"),
        (lambda out: None, {"on_bad_image": "stop"}, 40, "deleted 3 parts of another model, data or setting"),
        (lambda out: None, {"index": "ivf"}, 28, "3 of 10 parts are complete"),
    ],
)
def test_interrupted_embed_repeats_only_parts_that_do_not_count(
    change: Callable[[Path], object], options: dict[str, Any], num_again: int, message: str, shards: Path,
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out = interrupted(shards, tmp_path / "index")
    change(out)
    model = Counting()
    with caplog.at_level("INFO"):
        embed(config_of(shards, out, **options), (model, preprocess, tokenizer))
    assert model.num_images == num_again
    assert message in caplog.text
    expected = embed(config_of(shards, tmp_path / "new", **options), (Counting(), preprocess, tokenizer))
    assert digest(out) == digest(expected)


def test_embed_parts_of_another_model_do_not_count(shards: Path, tmp_path: Path) -> None:
    out = interrupted(shards, tmp_path / "index")
    model = Counting()
    model.logit_scale.data += 1
    embed(config_of(shards, out), (model, preprocess, tokenizer))
    assert model.num_images == 40


def test_embed_of_an_index_that_another_process_writes_raises(shards: Path, tmp_path: Path) -> None:
    other = Parts(tmp_path / "index", "x", 40, 4)
    other.open()
    with pytest.raises(UserError, match=r"another bclip embed writes .*index; wait for it, or choose another --out"):
        embed(config_of(shards, tmp_path / "index"), colour_model())
    other.close(delete=False)
    embed(config_of(shards, tmp_path / "index"), colour_model())

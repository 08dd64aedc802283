"""The measured process of `bclip bench busy`: training, the loader or a kernel, counted in turns."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bclip_fast import ops
from bclip_fast.data.loader import Loader
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.train.config import CheckpointConfig, DataConfig, TrainConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.engine.malloc import set_malloc_trim
from bclip_fast.train.trainer import train

from .cases import with_gradients


class Turns:
    """Counts the units of work in each turn, and holds the work up between turns.

    The work calls `done(units)` after each piece. The connection leads to the measuring process.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.running = threading.Event()
        self._units, self._seconds, self._settled = 0.0, 0.0, 0.0
        self._counted_since: float | None = None

    def done(self, units: float) -> None:
        """Count finished units. At the end of a turn, send (units, seconds) and wait for the next turn."""
        now = time.perf_counter()
        if self.running.is_set():
            if self._counted_since is None:
                if now >= self._settled:
                    self._counted_since = now
                return
            self._units += units
            if now < self._counted_since + self._seconds:
                return
            self.running.clear()
            self._connection.send((self._units, now - self._counted_since))
        else:
            self._connection.send(None)
        settle_seconds, self._seconds = self._connection.recv()
        self._settled = time.perf_counter() + settle_seconds
        self._units, self._counted_since = 0.0, None
        self.running.set()


def work(task: str, batch_size: int, preset: str, shards: str, folder: str, connection: Connection) -> None:
    """Work at the task until the parent ends the process. folder: place for the files of a run."""
    turns = Turns(connection)
    if task == "probe":
        probe(turns)
    elif task == "train":
        run_training(preset, batch_size, shards, Path(folder), turns)
    elif task == "loader":
        load(shards, batch_size, turns)
    else:
        call = make_kernel_call(task, batch_size)
        while True:
            call()
            turns.done(1)


def probe(turns: Turns) -> None:
    """Hash on as many threads as torch has. They never wait for each other, so they get all that is fairly theirs."""
    num_threads = torch.get_num_threads()
    counts, buffer = [0] * num_threads, bytes(1 << 22)  # a hash takes milliseconds, without the interpreter's lock

    def hash_repeatedly(thread: int) -> None:
        while True:
            turns.running.wait()
            hashlib.sha256(buffer).digest()
            counts[thread] += 1

    for thread in range(1, num_threads):
        threading.Thread(target=hash_repeatedly, args=(thread,), daemon=True).start()
    before = 0
    while True:
        hashlib.sha256(buffer).digest()
        counts[0] += 1
        units, before = sum(counts) - before, sum(counts)
        turns.done(units)


def run_training(preset: str, batch_size: int, shards: str, folder: Path, turns: Turns) -> None:
    """Train on one rank. A unit is a sample."""
    settings = TrainConfig(
        run=str(folder / f"run-{os.getpid()}"),
        preset=preset,
        batch_size=batch_size,
        max_steps=1 << 30,
        data=DataConfig(shards=shards, num_threads=min(2, torch.get_num_threads())),
        engine=EngineConfig(name="ddp", precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    train(settings, on_step=lambda record: turns.done(batch_size))


def load(shards: str, batch_size: int, turns: Turns) -> None:
    """Load batches. A unit is a sample."""
    dataset = ShardDataset(shards)
    stream = ShardSampler(dataset.shard_sizes, dataset.fingerprint, batch_size=batch_size)
    tokenizer = Tokenizer.train(dataset.captions(), 4000, 256)
    options: dict[str, Any] = dict(num_threads=torch.get_num_threads(), prefetch_batches=1)
    with Loader(dataset, tokenizer.encode, stream, Preprocess(PreprocessConfig()), **options) as batches:
        for batch in batches:
            turns.done(len(batch.images))


def make_kernel_call(task: str, batch: int) -> Callable[[], Any]:
    """Return a function that runs forward and backward in fp32 with the backend of `auto`."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(scale).requires_grad_()

    set_malloc_trim()
    function: Callable[..., torch.Tensor]
    if task == "attention":
        function, inputs = ops.fused_attention, [leaf(max(1, batch // 8), 197, 3, 12, 64)]
    elif task == "linear":
        function, inputs = ops.linear, [leaf(batch * 16, 768), leaf(3072, 768, scale=0.02), leaf(3072)]
    elif task == "pointwise":
        function, inputs = ops.gelu, [leaf(batch * 16, 3072)]
    else:
        features = [torch.nn.functional.normalize(leaf(batch * 16, 512).detach()).requires_grad_() for _ in range(2)]
        function, inputs = ops.clip_loss, [*features, torch.tensor(14.3, requires_grad=True)]
    run = with_gradients(function)
    return lambda: run(*inputs)

"""`bclip bench busy`: what training, the loader and the kernels keep of their speed beside other processes."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from bclip_fast import ops
from bclip_fast.data.loader import Loader
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.threads import VARIABLES
from bclip_fast.train.config import CheckpointConfig, DataConfig, TrainConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.engine.malloc import set_malloc_trim
from bclip_fast.train.trainer import train

from .cases import with_gradients
from .loader import LoaderConfig, figures_to_shards

Task = Literal["train", "loader", "attention", "loss", "linear", "pointwise"]
TASKS: tuple[Task, ...] = ("train", "loader", "attention", "loss", "linear", "pointwise")
Company = Literal["idle", "one", "short"]
COMPANY: tuple[Company, ...] = ("idle", "one", "short")
# `torch` names the runtime's own default: bclip_fast leaves alone what is set.
POLICIES = {"torch": {"GOMP_SPINCOUNT": "300000"}, "bclip": {}, "passive": {"OMP_WAIT_POLICY": "passive"}}
# Ours keep this share of what fair scheduling leaves them, and of torch's rate on an idle machine.
LEAST_OF_LEFT, LEAST_IDLE = 0.6, 0.97


@dataclass(frozen=True)
class BusyConfig:
    """Training, the loader and kernels on an idle machine and beside other processes, under each wait policy."""

    tasks: tuple[Task, ...] = TASKS
    """What is measured: steps of training, batches of the loader (samples), kernels' forward and backward (calls)."""
    company: tuple[Company, ...] = COMPANY
    """`one`: a process that uses a core; `short`: chains of short processes, as many as cores and one more, like a
    compilation."""
    policies: tuple[str, ...] = ("torch", "bclip", "passive")
    """How OpenMP's threads wait: `torch`: as without us; `bclip`: as the package has it; `passive`: asleep at once; or
    a variable, such as GOMP_SPINCOUNT=5000. Each has a process of its own; the processes take turns."""
    preset: str = "quickstart"
    """The model that is trained, in fp32 by DDP on one rank."""
    shards: str = ""
    """Folder of shards; empty: as `bclip bench loader`."""
    batch_size: int = 64
    """Of training and the loader; kernels' inputs grow with it."""
    seconds: float = 2.0
    """Of a turn."""
    settle_seconds: float = 1.5
    """Of each turn before what counts: `bclip` takes so long to see that other processes came or went."""
    rounds: int = 3
    """Turns of each policy in each company; rates are medians over them."""

    def __post_init__(self) -> None:
        if self.batch_size < 2 or self.rounds < 1 or self.seconds <= 0 or self.settle_seconds < 0:
            raise UserError(
                f"busy.batch_size={self.batch_size}, rounds={self.rounds}, seconds={self.seconds}, "
                f"settle_seconds={self.settle_seconds}: need at least 2, at least 1, more than 0 and at least 0"
            )
        for name, chosen in (("tasks", self.tasks), ("company", self.company), ("policies", self.policies)):
            if not chosen:
                raise UserError(f"busy.{name} is empty: name at least one")
        if "idle" not in self.company:
            raise UserError(f"busy.company={' '.join(self.company)}: needs idle, to which the others are compared")
        for policy in self.policies:
            _variables(policy)


def _variables(policy: str) -> dict[str, str]:
    name, equals, value = policy.partition("=")
    if policy in POLICIES:
        return POLICIES[policy]
    if name in VARIABLES and equals:
        return {name: value}
    raise UserError(
        f"busy.policies: {policy!r} is neither one of {', '.join(POLICIES)} nor VARIABLE=VALUE with one of "
        f"{', '.join(VARIABLES)}"
    )


# --- in the process that is measured ---


class Turns:
    """Work calls `done(units)` after each piece of itself; it is counted during turns and held up between them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.running = threading.Event()
        self._units, self._seconds, self._settled = 0.0, 0.0, 0.0
        self._counted_since: float | None = None

    def done(self, units: float) -> None:
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


def _work(task: str, config: BusyConfig, folder: str, connection: Connection) -> None:
    """Works without end: the parent ends the process."""
    turns = Turns(connection)
    if task == "probe":
        _probe(turns)
    elif task == "train":
        _train(config, Path(folder), turns)
    elif task == "loader":
        _load(config, turns)
    else:
        call = _kernel(task, config.batch_size)
        while True:
            call()
            turns.done(1)


def _probe(turns: Turns) -> None:
    """As many threads as torch's, which never wait for each other: what fair scheduling leaves a process."""
    num_threads = torch.get_num_threads()
    counts, buffer = [0] * num_threads, bytes(1 << 22)  # milliseconds without the interpreter's lock

    def work(number: int) -> None:
        while True:
            turns.running.wait()
            hashlib.sha256(buffer).digest()
            counts[number] += 1

    for number in range(1, num_threads):
        threading.Thread(target=work, args=(number,), daemon=True).start()
    before = 0
    while True:
        hashlib.sha256(buffer).digest()
        counts[0] += 1
        units, before = sum(counts) - before, sum(counts)
        turns.done(units)


def _train(config: BusyConfig, folder: Path, turns: Turns) -> None:
    settings = TrainConfig(
        run=str(folder / f"run-{os.getpid()}"),
        preset=config.preset,
        batch_size=config.batch_size,
        max_steps=1 << 30,
        data=DataConfig(shards=config.shards, num_threads=min(2, torch.get_num_threads())),
        engine=EngineConfig(name="ddp", precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    train(settings, on_step=lambda record: turns.done(config.batch_size))


def _load(config: BusyConfig, turns: Turns) -> None:
    dataset = ShardDataset(config.shards)
    stream = ShardSampler(dataset.shard_sizes, dataset.fingerprint, batch_size=config.batch_size)
    tokenizer = Tokenizer.train(dataset.captions(), 4000, 256)
    options: dict[str, Any] = dict(num_threads=torch.get_num_threads(), prefetch_batches=1)
    with Loader(dataset, tokenizer.encode, stream, Preprocess(PreprocessConfig()), **options) as batches:
        for batch in batches:
            turns.done(len(batch.images))


def _kernel(task: str, batch: int) -> Callable[[], Any]:
    """One forward and backward in fp32, by the backend that `auto` takes."""
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


# --- in the process that measures ---


class _Worker:
    """A process that works at a task under a policy, in turns."""

    def __init__(self, task: str, policy: str, config: BusyConfig, folder: str) -> None:
        self._name = f"{task} under the wait policy {policy}"
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(task, config, folder, theirs), daemon=True)
        with _environment(_variables(policy)):
            self._process.start()
        theirs.close()

    def wait(self) -> None:
        self._receive()

    def turn(self, settle_seconds: float, seconds: float) -> float:
        """Units a second."""
        self._connection.send((settle_seconds, seconds))
        units, taken = self._receive()
        return units / taken

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self._name}: its process ended with status {self._process.exitcode}") from None

    def close(self) -> None:
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Of the processes that are started here: the policy's variables in place of those there are."""
    before = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)


# They end with the process that measures, however that one ends. Each kind is a session of its own, as a compilation in
# another terminal is: Linux may share the cores among sessions first.
_ONE = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"
_SHORT = """
import os, subprocess, sys, threading
parent = os.getppid()
def chain():
    while os.getppid() == parent:
        subprocess.run([sys.executable, "-S", "-c", "sum(range(3_000_000))"])
for _ in range(len(os.sched_getaffinity(0)) + 1):
    threading.Thread(target=chain).start()
"""


@contextlib.contextmanager
def company(kind: Company) -> Iterator[None]:
    """Other processes on the machine: see `BusyConfig.company`."""
    if kind == "idle":
        yield
        return
    code = _ONE if kind == "one" else _SHORT
    other = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)
    try:
        yield
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.wait()


def measure_busy(config: BusyConfig) -> list[dict[str, Any]]:
    """A row for each task, company and policy."""
    with tempfile.TemporaryDirectory() as folder:
        if not config.shards and {"train", "loader"} & set(config.tasks):
            config = replace(config, shards=str(figures_to_shards(LoaderConfig(), Path(folder) / "shards")))
        return [row for task in config.tasks for row in _measure(task, config, folder)]


def _measure(task: Task, config: BusyConfig, folder: str) -> list[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        workers: dict[str, _Worker] = {}
        for policy in config.policies:
            workers[policy] = _Worker(task, policy, config, folder)
            stack.callback(workers[policy].close)
        workers["probe"] = _Worker("probe", config.policies[0], config, folder)
        stack.callback(workers["probe"].close)
        for worker in workers.values():
            worker.wait()
        rates: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind in config.company for name in workers}
        for number in range(config.rounds):
            # Each policy is first by turns.
            names = list(workers)
            names = names[number % len(names) :] + names[: number % len(names)]
            for kind in config.company:
                with company(kind):
                    for name in names:
                        rates[kind, name].append(workers[name].turn(config.settle_seconds, config.seconds))
    median = {key: statistics.median(values) for key, values in rates.items()}
    rows = []
    for kind in config.company:
        left = median[kind, "probe"] / median["idle", "probe"]
        for policy in config.policies:
            of_idle = median[kind, policy] / median["idle", policy]
            rows.append(
                dict(
                    operator="busy",
                    case=f"{task}-{kind}",
                    contender=policy,
                    unit="call" if task not in ("train", "loader") else "sample",
                    units_per_second=median[kind, policy],
                    of_torch=_of_torch(rates, kind, policy),
                    of_idle=of_idle,
                    left=left,
                    of_left=of_idle / left,
                    batch=config.batch_size,
                    rounds=config.rounds,
                )
            )
    return rows


def _of_torch(rates: dict[tuple[str, str], list[float]], kind: str, policy: str) -> float | None:
    """The median ratio of turns in the same round: a machine's speed drifts."""
    if (kind, "torch") not in rates:
        return None
    return statistics.median(
        ours / theirs for ours, theirs in zip(rates[kind, policy], rates[kind, "torch"], strict=True)
    )


def show_busy(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{rows[0]['device']}, {rows[0]['threads']} threads, fp32", title_justify="left")
    for heading in ("work", "company", "wait policy", "rate", "x torch", "of idle", "left by others", "of left"):
        table.add_column(heading, justify="left" if heading in ("work", "company", "wait policy") else "right")
    before = ""
    for row in rows:
        task, kind = row["case"].rsplit("-", 1)
        if before not in ("", row["case"]):
            table.add_section()
        before = row["case"]
        of_torch = "" if row["of_torch"] is None else f"{row['of_torch']:.2f}"
        rate = f"{row['units_per_second']:.4g} {row['unit']}s/s"
        shares = (f"{row[name]:.0%}" for name in ("of_idle", "left", "of_left"))
        table.add_row(task, kind, row["contender"], rate, of_torch, *shares)
    (Console() if sys.stdout.isatty() else Console(width=120)).print(table)
    print(
        "left by others: what threads that never wait for each other keep of their idle rate. Wanted of bclip: "
        f"{LEAST_OF_LEFT:.0%} of it, and {LEAST_IDLE:.2f} x torch on an idle machine."
    )

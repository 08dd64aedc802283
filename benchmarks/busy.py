"""`bclip bench busy`: the speed of training, the loader and the kernels beside other processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bclip_fast.errors import UserError
from bclip_fast.threads import VARIABLES

from .busy_work import work
from .loader import LoaderConfig, figures_to_shards
from .table import print_table

Task = Literal["train", "loader", "attention", "loss", "linear", "pointwise"]
TASKS: tuple[Task, ...] = ("train", "loader", "attention", "loss", "linear", "pointwise")
Company = Literal["idle", "one", "short"]
COMPANY: tuple[Company, ...] = ("idle", "one", "short")
# `torch` sets the OpenMP runtime's own default, because bclip_fast does not change a variable that is set.
POLICIES = {"torch": {"GOMP_SPINCOUNT": "300000"}, "bclip": {}, "passive": {"OMP_WAIT_POLICY": "passive"}}
# Goals of the policy `bclip`: shares of the rate that fair scheduling leaves, and of torch's rate on an idle machine.
MIN_SHARE_OF_LEFT, MIN_IDLE_RATIO = 0.6, 0.97


@dataclass(frozen=True)
class BusyConfig:
    """Training, the loader and kernels on an idle machine and beside other processes, under each wait policy."""

    tasks: tuple[Task, ...] = TASKS
    """Work to measure: training and `loader` in samples, kernels in calls of forward and backward."""
    company: tuple[Company, ...] = COMPANY
    """Other processes on the machine. `one` keeps a core busy. `short` runs chains of short processes, one chain more
    than there are cores, like a compilation."""
    policies: tuple[str, ...] = ("torch", "bclip", "passive")
    """How OpenMP's threads wait: `torch` as without bclip_fast, `bclip` as with it, `passive` asleep at once, or a
    variable such as GOMP_SPINCOUNT=5000. Each policy has a process, and the processes take turns."""
    preset: str = "quickstart"
    """Model to train, in fp32 by DDP on one rank."""
    shards: str = ""
    """Folder of shards. Empty: the shards of `bclip bench loader`."""
    batch_size: int = 64
    """Batch size of training and of the loader. The inputs of kernels grow with it."""
    seconds: float = 2.0
    """Length of a turn in seconds."""
    settle_seconds: float = 1.5
    """Seconds at the start of each turn that do not count. `bclip` needs them to notice other processes."""
    rounds: int = 3
    """Number of turns of each policy in each company. A rate is the median over them."""

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
            raise UserError(f"busy.company={' '.join(self.company)}: add idle, the baseline of the others")
        for policy in self.policies:
            policy_variables(policy)


def policy_variables(policy: str) -> dict[str, str]:
    """Return the environment variables of a wait policy."""
    name, equals, value = policy.partition("=")
    if policy in POLICIES:
        return POLICIES[policy]
    if name in VARIABLES and equals:
        return {name: value}
    raise UserError(
        f"busy.policies: {policy!r} is neither one of {', '.join(POLICIES)} nor VARIABLE=VALUE with one of "
        f"{', '.join(VARIABLES)}"
    )


class _Worker:
    """A process that works at a task under a wait policy, in turns."""

    def __init__(self, task: str, policy: str, config: BusyConfig, folder: str) -> None:
        self._name = f"{task} under the wait policy {policy}"
        context = multiprocessing.get_context("spawn")
        self._connection, workers_end = context.Pipe()
        args = (task, config.batch_size, config.preset, config.shards, folder, workers_end)
        self._process = context.Process(target=work, args=args, daemon=True)
        with only_variables(policy_variables(policy)):
            self._process.start()
        workers_end.close()

    def wait(self) -> None:
        """Wait until the work is ready for its first turn."""
        self._receive()

    def turn(self, settle_seconds: float, seconds: float) -> float:
        """Run a turn. Returns the units per second."""
        self._connection.send((settle_seconds, seconds))
        units, elapsed = self._receive()
        return units / elapsed

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self._name}: its process ended with status {self._process.exitcode}") from None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def only_variables(variables: dict[str, str]) -> Iterator[None]:
    """Give the processes that start inside the block these OpenMP variables in place of the user's."""
    before = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)


# Both programs end when the measuring process ends, even if it is killed. Each runs in a new session, like a
# compilation in another terminal, because Linux may divide the cores among sessions first.
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
    """Run the other processes of `BusyConfig.company` during the block."""
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
    """Return a row for each task, company and policy."""
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
            # Another policy goes first in each round.
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
    """Return the median ratio to torch's rate in the same round, because the machine's speed drifts."""
    if (kind, "torch") not in rates:
        return None
    return statistics.median(
        ours / theirs for ours, theirs in zip(rates[kind, policy], rates[kind, "torch"], strict=True)
    )


def show_busy(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    headings = ["work", "company", "wait policy", "rate", "x torch", "of idle", "left by others", "of left"]
    lines: list[list[str] | None] = []
    before = ""
    for row in rows:
        task, kind = row["case"].rsplit("-", 1)
        if before not in ("", row["case"]):
            lines.append(None)
        before = row["case"]
        of_torch = "" if row["of_torch"] is None else f"{row['of_torch']:.2f}"
        rate = f"{row['units_per_second']:.4g} {row['unit']}s/s"
        shares = (f"{row[name]:.0%}" for name in ("of_idle", "left", "of_left"))
        lines.append([task, kind, row["contender"], rate, of_torch, *shares])
    print_table(f"{rows[0]['device']}, {rows[0]['threads']} threads, fp32", headings, lines, num_left_aligned=3)
    print(
        "left by others: share of its idle rate that a process keeps if its threads never wait for each other. "
        f"Goals of bclip: {MIN_SHARE_OF_LEFT:.0%} of that rate, and {MIN_IDLE_RATIO:.2f} x torch on an idle machine."
    )

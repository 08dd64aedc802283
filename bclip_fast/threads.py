"""How the threads of torch's operators wait for each other, which determines the speed of training on a busy machine.

torch's wheels contain GCC's OpenMP. There a thread that waits at a barrier spins for 300,000 turns, some milliseconds,
before it sleeps. That is best on an idle machine. If other processes need the cores, the spinning thread occupies a
core that the awaited thread could use. The runtime reads its settings once, while torch is imported, so one setting
would have to serve both cases. But while the process has more OpenMP threads than processors, the runtime spins only
100 turns, and it checks that at each barrier. So `Watch` adds idle OpenMP threads while other processes need the cores.
This works whether or not torch was imported first.

LLVM's and Intel's runtimes yield the core while they spin, so they don't need this.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Any of these means that the user has chosen how threads wait.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_PERIOD_S = 0.5
# Minimum competition, in cores. Less is noise: /proc/stat counts hundredths of a second, and every machine has daemons.
_NOTABLE = 0.25
# Number of samples without competition after which threads may spin again.
_CALM_LOOKS = 2
# Limit of idle threads. If torch uses few of many processors, too many would be needed.
_MOST_IDLE_THREADS = 16


@dataclass(frozen=True)
class Sample:
    """Times in seconds since the start.

    clock: a monotonic clock.
    process_time: processor time of this process.
    idle: idle time of the processors on which this process may run.
    counted: number of these processors that the system reports.
    """

    clock: float
    process_time: float
    idle: float
    counted: int


def sample(cpus: frozenset[int], stat: Path = Path("/proc/stat")) -> Sample:
    """Sample the processor times of this process and of the given processors."""
    ticks = 0
    counted = 0
    for line in stat.read_text().splitlines():
        name, *fields = line.split()
        number = name.removeprefix("cpu")
        if number.isdigit() and int(number) in cpus and any(map(int, fields)):
            ticks += int(fields[3]) + int(fields[4])  # idle, and idle while waiting for a disk
            counted += 1
    return Sample(time.monotonic(), time.process_time(), ticks / os.sysconf("SC_CLK_TCK"), counted)


def cores_of_others(before: Sample, now: Sample) -> float:
    """Number of our processors that other processes, or a virtual machine's host, used between two samples."""
    return now.counted - (now.idle - before.idle + now.process_time - before.process_time) / (now.clock - before.clock)


class IdleThreads:
    """Adds `count` sleeping threads to the OpenMP runtime, from `start` to `stop`."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._ready, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, name="bclip-idle", daemon=True)

    def start(self) -> None:
        """Start the threads and wait until they exist."""
        self._thread.start()
        self._ready.wait()

    def _hold(self) -> None:
        # A team exists as long as the thread that created it. Each member calls free(NULL), which does nothing.
        library = ctypes.CDLL(None)
        library.GOMP_parallel(ctypes.cast(library.free, ctypes.c_void_p), None, self._count + 1, 0)
        self._ready.set()
        self._end.wait()

    def stop(self) -> None:
        """End the threads."""
        self._end.set()
        self._thread.join()


class Watch:
    """Makes this process's OpenMP threads sleep early while other processes need the cores that they use."""

    def __init__(self) -> None:
        self._before: Sample | None = None
        self._calm_looks = 0
        self._idle_threads: IdleThreads | None = None

    @property
    def yielding(self) -> bool:
        """Whether waiting threads currently sleep early."""
        return self._idle_threads is not None

    def run(self) -> None:
        """Sample and adapt, until the process ends or the runtime turns out not to be GCC's."""
        while True:
            time.sleep(_PERIOD_S)
            num_threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
            if num_threads is None:
                continue  # torch isn't loaded yet, and neither is OpenMP
            if _runtime() != "gcc":
                return
            cpus = frozenset(os.sched_getaffinity(0))
            try:
                now = sample(cpus)
            except OSError:
                return  # a sandbox without /proc
            self.look(now, num_threads(), len(cpus))

    def look(self, now: Sample, num_threads: int, num_cpus: int) -> None:
        """Adapt to the competition since the previous sample."""
        before, self._before = self._before, now
        if before is None:
            return
        # Other processes don't slow us down on processors that we leave free.
        contended = cores_of_others(before, now) > num_cpus - num_threads + _NOTABLE
        self._calm_looks = 0 if contended else self._calm_looks + 1
        count = num_cpus - num_threads + 1
        if contended and not self.yielding and num_threads > 1 and count <= _MOST_IDLE_THREADS:
            self._idle_threads = IdleThreads(max(1, count))
            self._idle_threads.start()
        elif self._idle_threads is not None and self._calm_looks >= _CALM_LOOKS:
            self._idle_threads.stop()
            self._idle_threads = None


def start_watch() -> None:
    """Start a thread with a `Watch` on Linux, unless the user has set one of `VARIABLES`."""
    if sys.platform == "linux" and not any(name in os.environ for name in VARIABLES):
        threading.Thread(target=Watch().run, name="bclip-watch", daemon=True).start()


def describe(environment: Mapping[str, str] = os.environ) -> str:
    """Describe how threads wait in this process, with advice if that is slow on a shared machine."""
    chosen = " ".join(f"{name}={environment[name]}" for name in VARIABLES if name in environment)
    runtime = _runtime()
    if runtime == "none":
        return "no OpenMP runtime is loaded"
    if runtime == "llvm":
        return "LLVM's or Intel's OpenMP, whose waiting threads yield their cores"
    if chosen:
        return f"GCC's OpenMP with {chosen}; without it bclip_fast adapts to other processes on the machine"
    if sys.platform != "linux":
        return "GCC's OpenMP spins while it waits; set GOMP_SPINCOUNT=1000 if other processes need the cores"
    return "GCC's OpenMP spins while it waits, and sleeps early while other processes need the cores"


def _runtime() -> str:
    """The OpenMP runtime that torch loaded into the process: gcc, llvm (also Intel's) or none."""
    if sys.platform == "win32":
        return "none"
    library: Any = ctypes.CDLL(None)
    if hasattr(library, "kmp_set_blocktime"):
        return "llvm"
    return "gcc" if hasattr(library, "GOMP_parallel") else "none"

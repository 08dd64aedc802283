"""How the threads of torch's operators wait for each other, which decides what training costs on a busy machine.

GCC's OpenMP, which torch's wheels contain, lets a thread that waits at a barrier spin for 300,000 turns, which takes
milliseconds, before it sleeps. That is best on an idle machine. Where other processes want the cores, the spinning
thread holds a core that the thread it waits for could use. The runtime reads its settings once, while torch is
imported, so one setting would have to serve both cases. But it spins only 100 turns while the process has more OpenMP
threads than processors, and checks that at each barrier. So `Watch` adds idle OpenMP threads while others want the
cores. This works whether or not torch was imported first.

LLVM's and Intel's runtimes give the core away while they spin and need none of this.
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
# In cores. Less is noise: /proc/stat counts hundredths of a second, and every machine has daemons.
_NOTABLE = 0.25
# Looks without competition until threads may spin again.
_CALM_LOOKS = 2
# Where torch uses few of many processors, too many idle threads would be needed.
_MOST_IDLE_THREADS = 16


@dataclass(frozen=True)
class Sample:
    """What was used until now. All in seconds.

    clock: a monotonic clock. own: processor time of this process. idle: idle time of the processors it may run on.
    counted: how many of these processors the system reports.
    """

    clock: float
    own: float
    idle: float
    counted: int


def sample(cpus: frozenset[int], stat: Path = Path("/proc/stat")) -> Sample:
    ticks = 0
    counted = 0
    for line in stat.read_text().splitlines():
        name, *fields = line.split()
        number = name.removeprefix("cpu")
        if number.isdigit() and int(number) in cpus and any(map(int, fields)):
            ticks += int(fields[3]) + int(fields[4])  # idle, and idle while a disk works
            counted += 1
    return Sample(time.monotonic(), time.process_time(), ticks / os.sysconf("SC_CLK_TCK"), counted)


def cores_of_others(before: Sample, now: Sample) -> float:
    """How many of our processors other processes, or the host of a virtual machine, used between two samples."""
    return now.counted - (now.idle - before.idle + now.own - before.own) / (now.clock - before.clock)


class IdleThreads:
    """From `start` to `stop` the OpenMP runtime has `count` more threads, all asleep."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._ready, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, name="bclip-idle", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def _hold(self) -> None:
        # A team lives as long as the thread that made it. Each member calls free(NULL), which does nothing.
        library = ctypes.CDLL(None)
        library.GOMP_parallel(ctypes.cast(library.free, ctypes.c_void_p), None, self._count + 1, 0)
        self._ready.set()
        self._end.wait()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


class Watch:
    """Has this process's OpenMP threads sleep early while other processes want the cores that they use."""

    def __init__(self) -> None:
        self._before: Sample | None = None
        self._calm_looks = 0
        self._idle_threads: IdleThreads | None = None

    @property
    def yielding(self) -> bool:
        return self._idle_threads is not None

    def run(self) -> None:
        while True:
            time.sleep(_PERIOD_S)
            num_threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
            if num_threads is None:
                continue  # torch, and OpenMP with it, isn't loaded yet
            if _runtime() != "gcc":
                return
            cpus = frozenset(os.sched_getaffinity(0))
            try:
                now = sample(cpus)
            except OSError:
                return  # a sandbox without /proc
            self.look(now, num_threads(), len(cpus))

    def look(self, now: Sample, num_threads: int, num_cpus: int) -> None:
        before, self._before = self._before, now
        if before is None:
            return
        # What others use of processors that we leave free doesn't hold us up.
        wanted = cores_of_others(before, now) > num_cpus - num_threads + _NOTABLE
        self._calm_looks = 0 if wanted else self._calm_looks + 1
        count = num_cpus - num_threads + 1
        if wanted and not self.yielding and num_threads > 1 and count <= _MOST_IDLE_THREADS:
            self._idle_threads = IdleThreads(max(1, count))
            self._idle_threads.start()
        elif self._idle_threads is not None and self._calm_looks >= _CALM_LOOKS:
            self._idle_threads.stop()
            self._idle_threads = None


def start_watch() -> None:
    """Starts a thread with a `Watch`, unless the user has set one of `VARIABLES`. Does nothing but on Linux."""
    if sys.platform == "linux" and not any(name in os.environ for name in VARIABLES):
        threading.Thread(target=Watch().run, name="bclip-watch", daemon=True).start()


def describe(environment: Mapping[str, str] = os.environ) -> str:
    """How threads wait in this process, and advice where that suits no shared machine."""
    chosen = " ".join(f"{name}={environment[name]}" for name in VARIABLES if name in environment)
    runtime = _runtime()
    if runtime == "none":
        return "no OpenMP runtime is loaded"
    if runtime == "llvm":
        return "LLVM's or Intel's OpenMP, whose waiting threads give their cores away"
    if chosen:
        return f"GCC's OpenMP with {chosen}; without it bclip_fast adapts to other processes on the machine"
    if sys.platform != "linux":
        return "GCC's OpenMP spins while it waits; set GOMP_SPINCOUNT=1000 where other processes want the cores"
    return "GCC's OpenMP spins while it waits, and sleeps early while other processes want the cores"


def _runtime() -> str:
    """The OpenMP runtime that torch has loaded for the whole process: gcc, llvm (Intel's too) or none."""
    library: Any = ctypes.CDLL(None)
    if hasattr(library, "kmp_set_blocktime"):
        return "llvm"
    return "gcc" if hasattr(library, "GOMP_parallel") else "none"

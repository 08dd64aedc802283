"""Tests of the threads that the C++ kernels share with torch, which sleep early while others need the cores."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from bclip_fast import threads

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux do the kernels use torch's threads")

FORK = """
import os, torch
from bclip_fast import ops

torch.set_num_threads(2)
x = torch.randn(300_000)
expected = ops.gelu(x, backend="cpu").numpy().tobytes()
child = os.fork()
if child == 0:
    # The OpenMP runtime believes that its second thread still exists.
    os._exit(0 if ops.gelu(x, backend="cpu").numpy().tobytes() == expected else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@linux_only
def test_torch_import_loads_openmp_for_all():
    import torch  # noqa: F401

    assert ctypes.CDLL(None).GOMP_parallel, "our threads would compete with torch's"


@linux_only
def test_forked_child_kernels_still_run():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n"


def samples(seconds: float, process: float, idle: float, num_cpus: int = 2) -> list[threads.Sample]:
    """Return two samples. process, idle: seconds of this process, and of idle processors, between them."""
    first = threads.Sample(10.0, 5.0, 7.0, num_cpus)
    return [first, threads.Sample(10.0 + seconds, 5.0 + process, 7.0 + idle, num_cpus)]


@pytest.mark.parametrize(
    ("seconds", "process", "idle", "expected"),
    [(1.0, 2.0, 0.0, 0.0), (1.0, 0.5, 1.5, 0.0), (0.5, 0.5, 0.0, 1.0), (2.0, 1.0, 1.0, 1.0)],
)
def test_cores_of_others_excludes_ours_and_idle(seconds, process, idle, expected):
    assert threads.cores_of_others(*samples(seconds, process, idle)) == pytest.approx(expected)


def test_sample_counts_idle_and_iowait_of_our_cpus_only(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9 9 9 999 9 9 9 9 0 0\ncpu0 1 1 1 300 20 1 1 1 0 0\ncpu1 1 1 1 500 0 1 1 1 0 0\n"
        "cpu10 1 1 1 70 10 1 1 1 0 0\nintr 5 0\nctxt 7\n"
    )
    sample = threads.sample(frozenset({0, 10}), stat)
    assert sample.counted == 2 and sample.idle * os.sysconf("SC_CLK_TCK") == pytest.approx(400)


def test_cores_of_others_counters_are_zero_gives_none(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu 0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\n")
    before = threads.sample(frozenset({0, 1}), stat)
    assert before.counted == 0
    now = threads.Sample(before.clock + 1, before.process_time + 1, before.idle, before.counted)
    assert threads.cores_of_others(before, now) <= 0


@pytest.fixture
def requests(monkeypatch) -> list[int]:
    """The numbers of idle threads that the watch started, in order. 0 stands for a stop."""
    counts: list[int] = []

    class Recorded:
        def __init__(self, count: int) -> None:
            self.count = count

        def start(self) -> None:
            counts.append(self.count)

        def stop(self) -> None:
            counts.append(0)

    monkeypatch.setattr(threads, "IdleThreads", Recorded)
    return counts


def looks(watch: threads.Watch, others: list[float], num_threads: int, num_cpus: int) -> None:
    """Let the watch sample once a second. others: cores that other processes use in each second."""
    clock = idle = 0.0
    watch.look(threads.Sample(clock, 0.0, idle, num_cpus), num_threads, num_cpus)
    for cores in others:
        clock, idle = clock + 1, idle + num_cpus - cores
        watch.look(threads.Sample(clock, 0.0, idle, num_cpus), num_threads, num_cpus)


def test_watch_yields_to_others_and_stops_after_calm(requests):
    watch = threads.Watch()
    looks(watch, [0.0, 0.1, 1.0, 1.0, 0.0, 1.0, 0.0], 2, 2)
    assert requests == [1] and watch.yielding
    looks(watch, [0.0, 0.0], 2, 2)
    assert requests == [1, 0] and not watch.yielding


@pytest.mark.parametrize(
    ("others", "num_threads", "num_cpus", "expected"),
    [
        (1.0, 1, 2, []),  # a single thread never waits
        (4.0, 4, 8, []),  # they use the cores that we do not need
        (5.0, 4, 8, [5]),  # 4 + 5 threads exceed 8 processors
        (95.9, 2, 96, []),  # 95 idle threads would be needed
        (1.5, 4, 2, [1]),  # more threads than processors
    ],
)
def test_watch_starts_threads_beyond_processors(requests, others, num_threads, num_cpus, expected):
    looks(threads.Watch(), [others, others], num_threads, num_cpus)
    assert requests == expected


SWITCHES = """
import os, resource, time
import torch
from bclip_fast import threads

x = torch.randn(300_000)
expected = x.exp()
idle = threads.IdleThreads(max(1, len(os.sched_getaffinity(0)) - 1))
before = len(os.listdir("/proc/self/task"))
idle.start()
assert len(os.listdir("/proc/self/task")) >= before + 2
start = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
for _ in range(400):
    assert torch.equal(x.exp(), expected)
    sum(range(2000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - start)
idle.stop()
assert torch.equal(x.exp(), expected)
while len(os.listdir("/proc/self/task")) > before:
    time.sleep(0.01)
"""


@linux_only
def test_idle_threads_make_openmp_sleep_at_each_barrier():
    # This is the runtime's default. Setting it keeps the watch, which a busy machine would wake, from starting.
    variables = {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "300000"}
    done = subprocess.run(
        [sys.executable, "-c", SWITCHES],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=without_choice() | variables,
    )
    assert int(done.stdout) >= 400


def without_choice() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in threads.VARIABLES}


@linux_only
@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "5"}], ids=str)
def test_import_starts_watch_unless_user_chose(chosen):
    code = "import bclip_fast, threading; print('bclip-watch' in [thread.name for thread in threading.enumerate()])"
    output = subprocess.check_output([sys.executable, "-c", code], env=without_choice() | chosen, text=True)
    assert output == f"{not chosen}\n"


@linux_only
@pytest.mark.parametrize(
    ("runtime", "chosen", "expected"),
    [
        ("gcc", {}, "sleeps early while other processes need the cores"),
        ("gcc", {"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY=active; without it"),
        ("llvm", {"OMP_WAIT_POLICY": "active"}, "waiting threads yield their cores"),
        ("none", {}, "no OpenMP runtime"),
    ],
)
def test_describe_names_runtime_and_users_choice(runtime, chosen, expected, monkeypatch):
    monkeypatch.setattr(threads, "_runtime", lambda: runtime)
    assert expected in threads.describe(chosen)

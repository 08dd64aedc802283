"""Functions of the operating system that differ between Linux, macOS and Windows.

The other modules import nothing that one of these systems lacks, so that the package can be imported on all of them.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

# Windows changes line ends in files that are opened without this flag.
O_BINARY: int = getattr(os, "O_BINARY", 0)

# Windows can't open folders, neither to lock them nor to flush them, and keeps the names of open files.
HAS_FOLDER_DESCRIPTORS = os.name != "nt"

_LOCK_DELAY_S = 0.1
_position_lock = threading.Lock()


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pread(descriptor: int, num_bytes: int, offset: int) -> bytes:
    """Read from a position of a file. Threads may share the descriptor, if all of them call this function."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, num_bytes, offset)
    with _position_lock:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, num_bytes)


def lock(file: IO[Any] | int, *, wait: bool = True) -> None:
    """Lock a file, or on Linux and macOS the descriptor of a folder, until it is closed or its process ends.

    Raises:
        BlockingIOError: another descriptor holds the lock, and `wait` is False.
        OSError: the file system has no locks.
    """
    descriptor = file if isinstance(file, int) else file.fileno()
    try:
        fcntl = importlib.import_module("fcntl")
    except ModuleNotFoundError:
        _lock_on_windows(descriptor, wait)
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _lock_on_windows(descriptor: int, wait: bool) -> None:
    # A byte beyond the contents, because other processes couldn't read a locked byte.
    msvcrt: Any = importlib.import_module("msvcrt")
    while True:
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            return
        except PermissionError:  # another descriptor holds it
            if not wait:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        time.sleep(_LOCK_DELAY_S)


def c_library() -> Any:
    """Return the process's own symbols, or an object without attributes on Windows, which has no such library."""
    return object() if sys.platform == "win32" else ctypes.CDLL(None, use_errno=True)


def host_memory() -> float:
    """Return the machine's memory in bytes."""
    if hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    # MEMORYSTATUSEX (Windows API): its size, a percentage, and seven sizes of which the first is the total.
    status = (ctypes.c_uint64 * 8)(64)
    windows: Any = ctypes
    if not windows.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return float(status[1])


def peak_memory() -> int:
    """Return the peak of this process's resident memory in bytes."""
    if sys.platform == "win32":
        # PROCESS_MEMORY_COUNTERS (Windows API): two 32-bit numbers, then sizes. The first size is the peak.
        counters = (ctypes.c_size_t * 9)(ctypes.sizeof(ctypes.c_size_t) * 9)
        windows: Any = ctypes
        kernel = windows.windll.kernel32
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        process = ctypes.c_void_p(kernel.GetCurrentProcess())
        if not kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), ctypes.sizeof(counters)):
            raise OSError("K32GetProcessMemoryInfo failed")
        return int(counters[1])
    if sys.platform == "linux":
        # ru_maxrss would include the memory of the parent at the fork.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    resource = importlib.import_module("resource")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS

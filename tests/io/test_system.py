"""Files and imports on systems that lack functions of Linux, as macOS and Windows do.

No such system runs these tests. Here the functions are hidden, and Windows's locks are replaced by a stand-in.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from bclip_fast.data.shards.writer import Staging
from bclip_fast.data.storage import LocalStorage, ReadConfig
from bclip_fast.errors import UserError
from bclip_fast.io import atomic, system
from bclip_fast.io.jsonl import JsonLinesWriter

# Imports every module after these parts of Unix are gone. Windows lacks all of them, and macOS some.
IMPORTS = """
import asyncio, importlib, multiprocessing.connection, multiprocessing.pool, os, pkgutil, signal, sys, tempfile
# Other packages have their own ways.
import h5py, jinja2, lxml.etree, numpy, PIL.Image, pyarrow.parquet, rich.console, tyro, torch, torch.distributed
import faiss, pydicom, safetensors.torch, sklearn.linear_model, werkzeug.serving

for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "curses", "readline"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "pread", "preadv", "sched_getaffinity", "sysconf", "uname", "getuid", "geteuid",
             "statvfs", "O_NONBLOCK", "killpg", "setsid", "mkfifo", "wait4", "getpgid", "nice"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "alarm", "setitimer", "pthread_sigmask"):
    delattr(signal, name)

import bclip_fast

count = 0
for module in pkgutil.walk_packages(bclip_fast.__path__, "bclip_fast."):
    # Compiled modules aren't there, and these need packages for Linux.
    if module.name.rpartition(".")[2] in ("_cpu", "_cuda", "triton", "triton_kernels", "triton_tma_kernels",
                                          "triton_tma_gradients", "deepspeed", "dali_loader"):
        continue
    if module.name.startswith("bclip_fast.benchmarks") or module.name.endswith(".cpu"):
        continue
    importlib.import_module(module.name)
    count += 1
print(count)
"""


def test_modules_import_without_unix():
    out = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout.split()[-1]) > 150


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], int]:
    """Hide what Windows lacks. Returns the locks: the descriptor of each locked file."""
    locks: dict[tuple[int, int], int] = {}

    def locking(descriptor: int, mode: int, num_bytes: int) -> None:
        assert (mode, num_bytes) == (2, 1)
        status = os.fstat(descriptor)
        key = status.st_dev, status.st_ino
        holder = locks.get(key, descriptor)
        if holder != descriptor and is_open(holder, key):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        locks[key] = descriptor

    def is_open(descriptor: int, key: tuple[int, int]) -> bool:
        try:
            status = os.fstat(descriptor)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == key

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))  # type: ignore[arg-type]
    monkeypatch.delattr(os, "pread")
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # as on Windows
    monkeypatch.setattr(system, "HAS_FOLDER_DESCRIPTORS", False)
    monkeypatch.setattr(system, "c_library", object)

    folder_refused = os.open

    def open_file(path: os.PathLike[str] | str, *arguments: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return folder_refused(path, *arguments)

    monkeypatch.setattr(os, "open", open_file)
    return locks


def test_files_and_folders_are_replaced_without_descriptors_of_folders(
    windows: dict[tuple[int, int], int], tmp_path: Path
):
    atomic.write_text(tmp_path / "file", "old", sync=True)
    atomic.write_text(tmp_path / "file", "new", sync=True)
    for content in ("old", "new"):
        with atomic.replacing_folder(tmp_path / "folder") as partial:
            (partial / "part").write_text(content)
        with atomic.replacing_files(tmp_path / "files") as partial:
            (partial / "part").write_text(content)
    with contextlib.suppress(KeyError), atomic.replacing_folder(tmp_path / "folder") as partial:
        (partial / "part").write_text("failed")
        raise KeyError
    names = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))]
    assert names == ["file", "files", "files/part", "folder", "folder/part"]
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"new"}


def test_dataset_is_written_by_one_process_with_the_locks_of_windows(
    windows: dict[tuple[int, int], int], tmp_path: Path
):
    with Staging(tmp_path / "out", overwrite=False):
        assert len(windows) == 1
        with pytest.raises(UserError, match="another process is writing this dataset"):
            Staging(tmp_path / "out", overwrite=False).__enter__()
    with Staging(tmp_path / "out", overwrite=False):
        pass


def test_lock_of_windows_waits_for_its_holder(windows: dict[tuple[int, int], int], tmp_path: Path):
    path = tmp_path / "lock"
    first, second, has_lock = path.open("w"), path.open("w"), threading.Event()
    system.lock(first)
    with pytest.raises(BlockingIOError):
        system.lock(second, wait=False)
    thread = threading.Thread(target=lambda: (system.lock(second), has_lock.set()))
    thread.start()
    assert not has_lock.wait(0.3)
    first.close()
    assert has_lock.wait(30)
    thread.join()
    second.close()


def test_reads_and_lines_need_no_pread(windows: dict[tuple[int, int], int], tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    writer = JsonLinesWriter(path)
    writer.write({"step": 2})
    writer.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    storage = LocalStorage(tmp_path, ReadConfig())
    assert [storage.read(path.name, start, start + 4) for start in (2, 14, 2)] == [b"step", b"step", b"step"]

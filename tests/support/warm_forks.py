"""Processes that start with torch already imported: commands of Python modules run in forks of one server.

`python warm_forks.py` is the server. It reads requests from its standard input, a line of JSON each, and writes the
number of each process that it starts. It does not wait for them, so a number stays valid until the server ends.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

# Modules that no variable of a command changes, except OPENBLAS_CORETYPE, which NumPy reads: the server needs it.
# BCLIP_CUDA_HOST and TRITON_INTERPRET change the package and Triton.
PRELOADED = ("torch", "torch.distributed", "numpy", "PIL.Image", "pytest")


class Server:
    """The server, with `popen` in place of subprocess.Popen. `variables`: its environment beside this process's."""

    def __init__(self, **variables: str) -> None:
        self.folder, self.lock = tempfile.TemporaryDirectory(), threading.Lock()
        command = [sys.executable, "-u", __file__]
        self.process = subprocess.Popen(
            command, env={**os.environ, **variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        self.process.communicate()
        self.folder.cleanup()

    def popen(self, command: list[str], *, env: Mapping[str, str], cwd: Path, stdout: Any, **options: Any) -> Any:
        """Start a command in a new session. `python -m MODULE` runs in a fork of the server, except for pip."""
        if command[:2] != [sys.executable, "-m"] or command[2] == "pip":
            return subprocess.Popen(command, env=env, cwd=cwd, stdout=stdout, **options)
        status = tempfile.mktemp(dir=self.folder.name)
        request = {"arguments": command[2:], "env": dict(env), "cwd": str(cwd), "log": stdout.name, "status": status}
        assert self.process.stdin and self.process.stdout
        with self.lock:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return Fork(int(self.process.stdout.readline()), Path(status))


class Fork:
    """A process of the server, with the attributes of subprocess.Popen that the runner of `make gpu` uses."""

    def __init__(self, pid: int, status: Path) -> None:
        self.pid, self.status, self.file = pid, status, os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> int:
        if not select.select([self.file], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return int(self.status.read_text()) if self.status.exists() else -signal.SIGKILL


def serve(requests: TextIO) -> None:
    for name in PRELOADED:
        __import__(name)
    assert not {"triton", "bclip_fast"} & set(sys.modules)
    for line in requests:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            run(request)
        print(pid)


def run(request: dict[str, Any]) -> None:
    """Run a module as `python -m` does, and write its exit status."""
    status = 1
    try:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        # `python -m` puts the working directory first.
        sys.path[0] = request["cwd"]
        sys.argv = request["arguments"]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0) if not isinstance(end.code, str) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        Path(request["status"]).write_text(str(status))
        os._exit(status)


if __name__ == "__main__":
    serve(sys.stdin)

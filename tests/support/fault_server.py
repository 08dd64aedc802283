"""A process that imports everything once, then forks a child for each command. support/faults.py starts it.

Its arguments are the modules. It reads one JSON object a line: `argv` of `bclip`, or `call` and "module:function";
`folder`, `output` (a path), and the arguments of `fault_arm` (faults/injector.c). It answers with the exit status of
the child, negative for a signal.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

LIMIT_S = 120.0


def run_child(request: dict[str, Any]) -> None:
    """Run the command of a request. It never returns."""
    status = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(request["folder"])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if request["argv"][0] == "call":
            module, name = request["argv"][1].split(":")
            function = getattr(importlib.import_module(module), name)
        else:
            from bclip_fast import cli

            function = functools.partial(cli.main, request["argv"])
        library = ctypes.CDLL(None)
        texts = (request[name].encode(errors="surrogateescape") for name in ("watched", "log", "call", "path"))
        library.fault_arm(*texts, request["number"], request["action"])
        try:
            status = function()
            atexit._run_exitfuncs()
        except SystemExit as error:
            atexit._run_exitfuncs()
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Wait for a child, and kill it after LIMIT_S. Return its exit status, negative for a signal."""
    end = time.monotonic() + LIMIT_S
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -1000
        time.sleep(0.002)


def main() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    num_threads = threading.active_count()
    print(json.dumps({"threads": num_threads}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            run_child(request)
        print(json.dumps({"status": wait(child)}), file=answers, flush=True)


if __name__ == "__main__":
    main()

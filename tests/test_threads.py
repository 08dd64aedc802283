"""csrc/cpu/parallel.cpp: the C++ kernels run on the threads of torch's own operators."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernels start threads of their own")

FORK = """
import os, torch
from bclip_fast import ops

torch.set_num_threads(2)
x = torch.randn(300_000)
expected = ops.gelu(x, backend="cpu").numpy().tobytes()
child = os.fork()
if child == 0:
    # The OpenMP runtime thinks that its second thread is still there.
    os._exit(0 if ops.gelu(x, backend="cpu").numpy().tobytes() == expected else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@linux_only
def test_torch_has_loaded_the_runtime_for_all():
    import torch  # noqa: F401

    assert ctypes.CDLL(None).GOMP_parallel, "our threads would compete with those of torch"


@linux_only
def test_a_forked_child_has_threads_too():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n"

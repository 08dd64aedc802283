"""The CUDA kernels as a module that runs on the host (csrc/cuda/device.cuh), built when a test first wants it."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11
from ninja import BIN_DIR, ninja_syntax

ROOT = Path(__file__).parents[1]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"


@cache
def path(sanitized: bool = False) -> Path:
    """The module's file, compiled anew where a source is newer; under AddressSanitizer and UndefinedBehaviorSanitizer."""
    folder = ROOT / "build" / ("cuda_host_sanitized" if sanitized else "cuda_host")
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    options = f"-std=c++17 -fPIC -fvisibility=hidden -DBCLIP_ON_HOST -Wall -Wno-unknown-pragmas {includes} "
    options += f"-O1 -g1 {SANITIZERS}" if sanitized else "-O2"
    # One build at a time, whichever of xdist's workers comes first.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / "build.ninja", "w") as file:
            ninja = ninja_syntax.Writer(file)
            compiler = os.environ.get("CXX", "g++")
            ninja.rule("cxx", f"{compiler} {options} -MMD -MF $out.d -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
            ninja.rule("link", f"{compiler} -shared {SANITIZERS if sanitized else ''} $in -o $out")
            device = [ROOT / "csrc/cuda/bindings.cpp", ROOT / "csrc/cuda/device.cu"]
            sources = sorted(set((ROOT / "csrc/cuda").rglob("*.c[pu]*")) - set(device))
            sources = [source for source in sources if source.suffix != ".cuh"]
            ninja.build(str(output), "link", [ninja.build(f"{source.name}.o", "cxx", str(source))[0] for source in sources])
        program = shutil.which("ninja", path=f"{BIN_DIR}{os.pathsep}{os.environ['PATH']}")
        done = subprocess.run([program or "ninja", "-j", "2"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return output


@cache
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda_host", path())
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def run_sanitized(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python *command` with the runtime that a sanitized module needs, and BCLIP_CUDA_HOST naming it."""
    libraries = [
        subprocess.check_output([os.environ.get("CXX", "g++"), f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment |= {"LD_PRELOAD": " ".join(libraries), "BCLIP_CUDA_HOST": str(path(sanitized=True))}
    # Python and torch keep what they allocated.
    environment |= {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
    )

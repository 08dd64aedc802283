"""Builds the CUDA kernels for the emulator (csrc/cuda/emulator/emulator.h) when a test first needs them."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
from ninja import BIN_DIR, ninja_syntax
from oracle import collected_if

from bclip_fast.ops.cuda_device import CUDA_HOST

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc/cuda"
ON_GPU = os.environ.get("BCLIP_TEST_DEVICE") == "cuda"
# Tests of kernels run on a GPU, or on the emulator in a process whose BCLIP_CUDA_HOST is the path of its module.
hosted = collected_if(CUDA_HOST is not None or ON_GPU)
outside = collected_if(CUDA_HOST is None and not ON_GPU)
DEVICE_ALONE = ("bindings.cpp", "device.cu", "stream.cu")
# The emulator itself. Both variants share it, because the sanitizers are to check the kernels.
RUNTIME = ("emulator.cpp", "counters.cpp", "matrices.cpp")
# Code with large headers, which runs for microseconds. One file includes all of it, so it takes half the time.
UNOPTIMISED = ("bindings.cpp", "register.cpp", "kernel_name.cpp")
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
# Optimising sanitized code would take longer than the tests gain by it.
VARIANTS = {"plain": ("-O2", ""), "sanitized": (f"-O0 -g1 {SANITIZERS}", SANITIZERS)}


@cache
def path(sanitized: bool = False) -> Path:
    """The path of the module, rebuilt if a source is newer. `sanitized`: with AddressSanitizer and UBSan."""
    if platform.machine() != "x86_64":
        pytest.skip("the CUDA emulator runs only on x86-64")
    folder = ROOT / "build/cuda_emulator"
    folder.mkdir(parents=True, exist_ok=True)
    target = f"{'sanitized' if sanitized else 'plain'}/_cuda_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    options = (
        f"-std=c++17 -fPIC -fvisibility=hidden -DBCLIP_CUDA_EMULATOR -I{ROOT} -Wall -Wno-unknown-pragmas {includes} "
    )
    compiler = os.environ.get("CXX", "g++")
    # One build at a time: workers of xdist wait for the first one.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / "build.ninja", "w") as file:
            ninja = ninja_syntax.Writer(file)

            def compiled(rule: str, optimised: str, place: str, sources: list[Path]) -> list[str]:
                command = f"{compiler} {options} {optimised} -MMD -MF $out.d -x c++ -c $in -o $out"
                ninja.rule(rule, command, depfile="$out.d", deps="gcc")
                names = [one.relative_to(CUDA) if one.is_relative_to(CUDA) else one.name for one in sources]
                objects = {one: f"{place}/{name}.o" for one, name in zip(sources, names, strict=True)}
                return [path for one, target in objects.items() for path in ninja.build(target, rule, str(one))]

            sources = [path for path in sorted(CUDA.rglob("*.c[pu]*")) if path.suffix != ".cuh"]
            sources = [one for one in sources if one.relative_to(CUDA).as_posix() not in DEVICE_ALONE]
            bindings = [one for one in sources if one.name in UNOPTIMISED]
            runtime = [one for one in sources if one.name in RUNTIME]
            kernels = [one for one in sources if one not in bindings + runtime]
            shared = compiled("runtime", "-O3 -fno-omit-frame-pointer", "runtime", runtime)
            # Optimising pybind11's templates would take longer than compiling all kernels.
            included = including(folder / "bindings.cpp", bindings)
            shared += compiled("bindings", "-O0", "bindings", [included])
            for name, (optimised, linked) in VARIANTS.items():
                ninja.rule(f"link_{name}", f"{compiler} -shared {linked} $in -o $out")
                objects = shared + compiled(f"kernels_{name}", optimised, name, kernels)
                ninja.build(f"{name}/{Path(target).name}", f"link_{name}", objects)
        program = shutil.which("ninja", path=f"{BIN_DIR}{os.pathsep}{os.environ['PATH']}")
        done = subprocess.run([program or "ninja", "-j", "2", target], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    output = folder / target
    return output


def including(path: Path, sources: list[Path]) -> Path:
    """Write a file that includes `sources`, unless it is up to date."""
    text = "".join(f'#include "{one.relative_to(ROOT)}"\n' for one in sources)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
    return path


@cache
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda_emulator", path())
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def environment(sanitized: bool = False) -> dict[str, str]:
    """The environment of a process whose CUDA backend is the emulator. `sanitized`: with the sanitizers' runtime."""
    variables = {"BCLIP_CUDA_HOST": str(path(sanitized))}
    if sanitized:
        compiler, names = os.environ.get("CXX", "g++"), ("libasan.so", "libstdc++.so")
        libraries = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True) for name in names]
        # Python and torch never free some of their memory, so leaks aren't reported.
        variables |= {"LD_PRELOAD": " ".join(map(str.strip, libraries)), "ASAN_OPTIONS": "detect_leaks=0"}
        variables |= {"UBSAN_OPTIONS": "print_stacktrace=1"}
    return variables

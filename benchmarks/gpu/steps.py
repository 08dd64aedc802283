"""The steps of `make gpu`, the most valuable ones first: measurements, then tests, then sanitizers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-p", "no:randomly"]
TASK = [sys.executable, "-m", "bclip_fast.benchmarks.gpu.tasks"]
KERNELS = [f"tests/ops/test_{name}_cuda.py" for name in ("attention", "contrastive", "image", "hopper")]
OPERATORS = [
    f"tests/ops/test_{name}.py"
    for name in (
        "attention",
        "attention_triton",
        "contrastive",
        "contrastive_modes",
        "contrastive_targets",
        "pointwise",
        "pointwise_triton",
        "sdpa_gpu",
        "single_query_attention",
        "triton",
    )
]
GRAPHS = ["tests/ops/test_cuda_graphs.py"]
# The contenders that are measured. Tests assert what these expressions collect (tests/benchmarks/test_gpu.py).
HALF = "(bfloat16 or float16) and not reference and not compiled"
LOSSES = f"contrastive and {HALF}"
LAYERS = f"((attention and {HALF}) or affine or pointwise) and not reference and not compiled"
# A sanitizer makes kernels a hundred times slower. These tests have few sequences, chunks of keys and tiles.
SANITIZED = "(hosted_ragged and 64) or rectangle"
# Processes that compile Triton's kernels, and that run tests, at a time.
PROCESSES = 8


@dataclass(frozen=True)
class Step:
    """A command.

    seconds: its time limit. Time that earlier steps leave over is added to it.
    what: its description in the table.
    needs: names of requirements (needs.py). A step that misses one does not run, and the table says so.
    environment: variables beside those of `environment`.
    beside: whether the next step runs at the same time. Both end before the step after that.
    """

    name: str
    command: list[str]
    seconds: int
    what: str
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    beside: bool = False


@dataclass(frozen=True)
class Setting:
    """How to run the steps.

    out: folder of logs and results.
    rehearsal: whether to run them without a GPU.
    parallel: whether pytest-xdist can be imported.
    """

    out: Path
    rehearsal: bool = False
    parallel: bool = True

    @property
    def device(self) -> str:
        """The device of all tensors."""
        return "cpu" if self.rehearsal else "cuda"

    @property
    def folders(self) -> list[str]:
        """The folders that get each row of results.

        A rehearsal doesn't write to benchmarks/results, nor does a run without the permission.
        """
        if self.rehearsal or not os.access(RESULTS, os.W_OK):
            return [str(self.out)]
        return [str(self.out), str(RESULTS)]

    def pytest(self, files: list[str], selected: str, sample: int = 1, parallel: bool = True) -> list[str]:
        """Return the command of a step of tests.

        selected: expression for pytest's -k.
        sample: how many of the selected tests of each file a rehearsal runs.
        """
        command = [*PYTEST, "-p", "bclip_fast.benchmarks.gpu.plugin", *files, "-k", selected]
        if parallel and self.parallel:
            command += ["-n", "0" if self.rehearsal else str(PROCESSES)]
        return command + (["--sample", str(sample)] if self.rehearsal else [])

    def warm_up(self) -> list[str]:
        """Return the command of the warm-up, which does not need the package."""
        return [sys.executable, "-m", "benchmarks.gpu.warm", "--device", self.device]

    def task(self, name: str, *arguments: str) -> list[str]:
        """Return the command of a step of tasks.py."""
        return [*TASK, name, *arguments, "--device", self.device]


def steps(setting: Setting) -> list[Step]:
    """Return the steps in the order in which they run. Their limits add up to less than 9 minutes."""
    emulated = setting.rehearsal
    to = [argument for folder in setting.folders for argument in ("--to", folder)]
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Other kernels of OpenBLAS round an element by its place in a tile (tests/support/interpreter.py).
    interpreted = {"TRITON_INTERPRET": "1", "OPENBLAS_CORETYPE": "Nehalem"} if emulated else {}

    def sanitizer(tool: str) -> Step:
        check = (
            [sys.executable, str(ROOT / "tests/support/fake_sanitizer.py")]
            if emulated
            else [program("compute-sanitizer")]
        )
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all", "--kernel-name", "kns=bclip"]
        tests = setting.pytest(KERNELS[:2], SANITIZED, parallel=False)
        needs = ("gpu", "torch", "compute-sanitizer", "pytest")
        return Step(tool, [*check, *options, *tests], 30, f"CUDA kernels under {tool}", needs, uncached)

    gpu = ("gpu", "torch")
    rows = (*gpu, "nvcc", "pytest", "pytest_benchmark")
    tests = (*gpu, "nvcc", "triton", "pytest", "numpy", "PIL")
    every = [
        Step("warm-up", setting.warm_up(), 100, "imports and the GPU's start, while the build runs", gpu, beside=True),
        Step(
            "build",
            [*install, *(["--dry-run"] if emulated else []), "-e", "."],
            100,
            "both C++ modules",
            ("nvcc", "c++", "pip", "setuptools", "pybind11", "ninja"),
        ),
        *([Step("emulator", setting.task("emulator"), 0, "CUDA kernels for the emulator")] if emulated else []),
        Step(
            "backends",
            setting.pytest(["tests/ops/test_dispatch.py"], "required", parallel=False),
            15,
            "both backends take tensors",
            tests,
        ),
        Step(
            "compile",
            setting.task("compile", "--processes", str(2 if emulated else PROCESSES)),
            45,
            "Triton's kernels of the figures, in parallel",
            (*gpu, "triton"),
            interpreted,
        ),
        Step(
            "losses", setting.task("operators", "--only", LOSSES, *to), 55, "figures of the losses", rows, interpreted
        ),
        Step("layers", setting.task("operators", "--only", LAYERS, *to), 45, "figures of layers", rows, interpreted),
        Step("step", setting.task("step", *to), 35, "figures of a training step", (*gpu, "triton", "rich")),
        Step("tune", setting.task("tune", "--out", str(setting.out)), 35, "the tuning record", (*gpu, "rich")),
        Step("training", setting.task("training"), 25, "ten steps, bf16, DDP, one rank of NCCL", (*gpu, "triton")),
        Step("kernels", setting.pytest(KERNELS, "cuda"), 30, "tests of the CUDA kernels and nvJPEG", tests),
        Step(
            "operators",
            setting.pytest(OPERATORS, "cuda or triton or sdpa"),
            50,
            "tests of all backends",
            tests,
            interpreted,
        ),
        Step("graphs", setting.pytest(GRAPHS, "", parallel=False), 15, "captured graphs", tests, interpreted),
        Step(
            "trainer",
            setting.task("trainer"),
            15,
            "`train` from shards",
            (*gpu, "tyro", "ftfy", "tokenizers", "tomli_w", "safetensors"),
        ),
        Step(
            "dali",
            setting.pytest(["tests/data/test_dali_loader.py"], "gpu", parallel=False),
            10,
            "DALI's pipeline on the GPU",
            (*gpu, "nvidia.dali", "tyro", "ftfy", "tokenizers"),
            {"BCLIP_TEST_DEVICE": "cpu"},  # the loader's tensors are on the host
        ),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
    ]
    return every


def environment(setting: Setting) -> dict[str, str]:
    """Return the variables of all steps."""
    variables = {"PYTHONUNBUFFERED": "1", "BCLIP_REQUIRE_BACKENDS": "cuda" if setting.rehearsal else "cuda,triton"}
    if setting.rehearsal:
        variables |= {"BCLIP_CUDA": "0", "BCLIP_BENCHMARKS": "tiny", "OMP_NUM_THREADS": "1"}
        variables |= {"BCLIP_CUDA_HOST": str(emulator_path())}
    else:
        variables |= {"BCLIP_CUDA": "1", "BCLIP_TEST_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        variables |= {"BCLIP_CUDA_ARCHS": architecture()}
    if not has_jpeg_headers():
        variables["BCLIP_JPEG"] = "0"
    # A caller's own choice wins.
    return {name: os.environ.get(name, value) for name, value in variables.items()}


def emulator_path() -> Path:
    """Return the path of the module with which the emulator runs the CUDA kernels."""
    return ROOT / "build/cuda_emulator/plain" / f"_cuda_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"


def architecture() -> str:
    """Return the architecture of the first GPU for BCLIP_CUDA_ARCHS, or those of all GPUs if it is unknown.

    Building for one architecture halves the time.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "80;90a"
    capability = done.stdout.split("\n")[0].strip().replace(".", "")
    if not capability.isdigit():
        return "80;90a"
    return "90a" if capability == "90" else capability


def has_jpeg_headers() -> bool:
    """Return whether the C++ compiler finds the headers of libjpeg-turbo. Without them, the build leaves it out."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return False
    source = "#include <cstdio>\n#include <jpeglib.h>\nint main() { jpeg_crop_scanline; }"
    check = subprocess.run([compiler, "-xc++", "-fsyntax-only", "-"], input=source, text=True, capture_output=True)
    return check.returncode == 0


def program(name: str) -> str:
    """Return the path of a program on the PATH or in CUDA's folder. Without one, return the name."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin") or name


def can_import(module: str) -> bool:
    """Return whether Python can import a module. An installed package may lack its dependencies."""
    try:
        importlib.import_module(module)
    except Exception:  # a broken package may raise anything
        return False
    return True


def is_installed(module: str) -> bool:
    """Return whether Python finds a module, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False

"""Build the two pybind11 modules with ninja: `_cpu` always, `_cuda` if nvcc is installed (BCLIP_CUDA=0|1 overrides)."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from ninja import BIN_DIR, ninja_syntax
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
ARCHS = os.environ.get("BCLIP_CUDA_ARCHS", "80;90a").split(";")
# PTX for later devices, which compile it themselves. The PTX of an architecture with a letter runs only there.
PTX = next((arch for arch in ARCHS if arch.isdigit()), ARCHS[0])
CXX = os.environ.get("CXX", "g++")
# Each source *_isa.cpp is compiled for all of these. The object is empty if the compiler lacks the instruction set.
ISAS = "avx512", "avx2", "portable"
JPEG = os.environ.get("BCLIP_JPEG", "1") != "0"
JPEG_HELP = """jpeglib.h of libjpeg-turbo is missing: bclip_fast decodes images with it.
  Debian, Ubuntu: apt-get install libjpeg-dev    Fedora: dnf install libjpeg-turbo-devel    conda: libjpeg-turbo
Or build without the fast image decoder: BCLIP_JPEG=0."""


def nvcc() -> str | None:
    """Return the path of nvcc. None: build no CUDA module."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    program = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    requested = os.environ.get("BCLIP_CUDA")
    if requested == "1" and not program:
        sys.exit("BCLIP_CUDA=1, but nvcc is neither on the PATH nor in CUDA_HOME/bin")
    return None if requested == "0" else program


def has_jpeg_headers() -> bool:
    """Return whether the compiler finds the headers of libjpeg-turbo."""
    source = "#include <cstdio>\n#include <jpeglib.h>\nint main() { jpeg_crop_scanline; }"
    check = subprocess.run([CXX, "-xc++", "-fsyntax-only", "-"], input=source, text=True, capture_output=True)
    return check.returncode == 0


class BuildWithNinja(build_ext):
    """Build all modules in one run of ninja. Objects stay in build/, because pip's own folders are new each time."""

    def build_extensions(self) -> None:
        """Write build.ninja, run ninja, and copy the modules to their places."""
        objects = Path("build", sys.implementation.cache_tag).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        # The slowest files come first, so that no core waits for them at the end.
        extensions = sorted(self.extensions, key=lambda extension: extension.name, reverse=True)
        with open(objects / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Under build isolation the headers have a new path each time, which would rebuild everything, so the build
            # uses a link. Its name contains the version, because ninja ignores the age of system headers.
            headers = objects / f"pybind11-{pybind11.__version__}"
            headers.unlink(missing_ok=True)
            headers.symlink_to(pybind11.get_include())
            with open(objects / "build.ninja", "w") as file:
                ninja = ninja_syntax.Writer(file)
                for extension in extensions:
                    self._write(ninja, extension, f"-isystem {headers}")
            # BIN_DIR is empty under pip's build isolation, where the program is on the PATH.
            program = shutil.which("ninja", path=f"{BIN_DIR}{os.pathsep}{os.environ['PATH']}")
            # Ninja would try to join make's jobserver, whose pipe Python has closed.
            environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
            subprocess.run([program or "ninja", "-C", str(objects)], check=True, env=environment)
            for extension in extensions:
                output = Path(self.get_ext_fullpath(extension.name))
                output.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(objects / f"{extension.name}.so", output)

    def _write(self, ninja: ninja_syntax.Writer, extension: Extension, includes: str) -> None:
        kind = extension.name.rpartition(".")[2]
        depends = "-MMD -MF $out.d $isa -c $in -o $out"
        includes += f" -I{ROOT}" + "".join(f" -I{path}" for path in self.include_dirs)
        options = f"-O3 -std=c++17 -fPIC -pthread -fvisibility=hidden -Wall -Wno-psabi {includes}"
        if kind == "_cuda":
            codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
            codes.append(f"-gencode=arch=compute_{PTX},code=compute_{PTX}")
            options += f" -DBCLIP_CUDA_ARCHS='\"{';'.join(ARCHS)}\"'"
            device = f"-O3 -std=c++17 -I{ROOT} -Xcompiler -fPIC,-fvisibility=hidden {' '.join(codes)}"
            ninja.rule("nvcc", f"{nvcc()} {device} {depends}", depfile="$out.d", deps="gcc")
            ninja.rule(f"link{kind}", f"{nvcc()} -shared -cudart static $in -o $out")
        else:
            options += " -DBCLIP_JPEG" * JPEG
            ninja.rule(f"link{kind}", f"{CXX} -shared -pthread $in {'-ljpeg' * JPEG} -ldl -o $out")
        ninja.rule(f"cxx{kind}", f"{CXX} {options} {depends}", depfile="$out.d", deps="gcc")
        built = []
        for source in sorted(map(Path, extension.sources), key=lambda path: path.suffix != ".cu"):
            rule = "nvcc" if source.suffix == ".cu" else f"cxx{kind}"
            name = f"{kind}/{source.relative_to('csrc').with_suffix('')}"
            for isa in ISAS if source.stem.endswith("_isa") else [""]:
                variables = {"isa": f"-DBCLIP_ISA={isa}"} if isa else None
                built += ninja.build(
                    f"{name}{'.' * bool(isa)}{isa}.o", rule, str(source.resolve()), variables=variables
                )
        ninja.build(f"{extension.name}.so", f"link{kind}", built)


if JPEG and not has_jpeg_headers():
    sys.exit(JPEG_HELP)
sources = sorted(path for path in map(str, Path("csrc/cpu").rglob("*.cpp")) if JPEG or "/image/" not in path)
headers = sorted(str(path) for path in Path("csrc").rglob("*.*h"))
modules = [Extension("bclip_fast._cpu", sources, depends=headers)]
if nvcc():
    # Only tests on x86-64 build the emulator.
    paths = [path for path in Path("csrc/cuda").rglob("*.c[pu]*") if path.suffix != ".cuh"]
    cuda_sources = sorted(str(path) for path in paths if "emulator" not in path.parts)
    modules.append(Extension("bclip_fast._cuda", cuda_sources, depends=headers))
# The benchmarks are beside the package in the source tree, and inside it after the installation, for `bclip bench`.
setup(
    packages=[
        *find_packages(include=["bclip_fast*"]),
        "bclip_fast.benchmarks",
        *(f"bclip_fast.benchmarks.{name}" for name in find_packages("benchmarks")),
    ],
    package_dir={"bclip_fast.benchmarks": "benchmarks"},
    ext_modules=modules,
    cmdclass={"build_ext": BuildWithNinja},
)

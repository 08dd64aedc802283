"""Build the two pybind11 modules with ninja: `_cpu`, and `_cuda` if nvcc is installed (BCLIP_CUDA=0|1 overrides).

Without a C++ compiler, and on macOS and Windows, the package is built without these modules. `why_pure` decides, and
BCLIP_COMPILED=0|1 overrides it. The build prints the decision in one line and writes it to bclip_fast/build_info.json,
where `bclip doctor` finds it, because pip shows the output of a build only with -v.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
ARCHS = os.environ.get("BCLIP_CUDA_ARCHS", "80;90a").split(";")
# PTX for later devices, which compile it themselves. The PTX of an architecture with a letter runs only there.
PTX = next((arch for arch in ARCHS if arch.isdigit()), ARCHS[0])
# A command, such as "ccache g++".
CXX = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, ("g++", "c++", "clang++")), "g++")]
# Each source *_isa.cpp is compiled for all of these. The object is empty if the compiler lacks the instruction set.
ISAS = "avx512", "avx2", "portable"
OLDEST_CUTLASS = 4, 2, 0
CUTLASS_HELP = """The headers of CUTLASS are the package nvidia-cutlass, which without dependencies has 6 MB:
  pip install --no-deps "nvidia-cutlass>=4.2"
Or set BCLIP_CUTLASS to a folder with CUTLASS's sources, or to 0 to build without the kernels for Hopper."""
JPEG = os.environ.get("BCLIP_JPEG", "1") != "0"
# Folder with include/jpeglib.h and lib/libjpeg.a, whose code becomes part of the module. Empty: the system's library.
JPEG_ROOT = os.environ.get("BCLIP_JPEG_ROOT", "")
JPEG_INCLUDE = [f"-I{JPEG_ROOT}/include"] if JPEG_ROOT else []
# Hidden symbols: other libraries of the process, such as Pillow's, have their own libjpeg.
JPEG_LINK = f"{JPEG_ROOT}/lib/libjpeg.a -Wl,--exclude-libs,ALL" if JPEG_ROOT else "-ljpeg"
# A failed compilation isn't replaced by a build without compiled modules: that package is several times slower, and
# nobody would see why.
REMEDY = "Or install without compiled modules, which is several times slower on a CPU: BCLIP_COMPILED=0."
JPEG_HELP = f"""jpeglib.h of libjpeg-turbo is missing: bclip_fast decodes images with it.
  Debian, Ubuntu: apt-get install libjpeg-dev    Fedora: dnf install libjpeg-turbo-devel    conda: libjpeg-turbo
Or build without the fast image decoder: BCLIP_JPEG=0.
{REMEDY}"""
PYTHON_HELP = f"""Python.h is missing in {sysconfig.get_path("include")}: the compiled modules need it.
  Debian, Ubuntu: apt-get install python3-dev    Fedora: dnf install python3-devel
{REMEDY}"""


def why_pure() -> str | None:
    """Return the reason to build without compiled modules, or None."""
    requested = os.environ.get("BCLIP_COMPILED", "auto")
    if requested not in ("auto", "0", "1"):
        sys.exit(f"BCLIP_COMPILED={requested!r} is unknown; set it to 0, 1 or auto")
    if requested == "0":
        return "BCLIP_COMPILED=0"
    reason = None
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        reason = f"they are for Linux on x86-64 and arm64, and this is {platform.system()} on {platform.machine()}"
    elif not shutil.which(CXX[0]):
        reason = f"there is no C++ compiler ({CXX[0]} is not on the PATH)"
    if reason and requested == "1":
        sys.exit(f"BCLIP_COMPILED=1, but compiled modules cannot be built: {reason}")
    return reason


def nvcc() -> str | None:
    """Return the path of nvcc. None: build no CUDA module."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    program = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    requested = os.environ.get("BCLIP_CUDA")
    if requested == "1" and not program:
        sys.exit("BCLIP_CUDA=1, but nvcc is neither on the PATH nor in CUDA_HOME/bin")
    return None if requested == "0" else program


class Cutlass(NamedTuple):
    """The headers of CUTLASS: their folder, their version, and the file of their licence."""

    include: Path
    version: str
    licence: Path


def cutlass() -> "Cutlass | str":
    """Return CUTLASS, or the reason to build the CUDA module without it, and so without the kernels for Hopper."""
    requested = os.environ.get("BCLIP_CUTLASS") or "auto"
    if requested == "0":
        return "BCLIP_CUTLASS=0"
    found: Cutlass | str
    if PURE or not nvcc():
        found = PURE or ("BCLIP_CUDA=0" if os.environ.get("BCLIP_CUDA") == "0" else "nvcc is missing")
    elif "90a" not in ARCHS:
        found = f"BCLIP_CUDA_ARCHS={';'.join(ARCHS)} lacks 90a"
    else:
        found = find_cutlass("" if requested in ("auto", "1") else requested)
    if isinstance(found, str) and requested != "auto":
        sys.exit(f"BCLIP_CUTLASS={requested}, but the kernels for Hopper cannot be built: {found}\n{CUTLASS_HELP}")
    return found


def find_cutlass(folder: str) -> "Cutlass | str":
    """Return the CUTLASS in a folder, which "" leaves to Python's path, or the reason why it can't be used."""
    # pip's build isolation removes the environment's folder from the path.
    places = [folder] if folder else list(dict.fromkeys([*sys.path, sysconfig.get_path("purelib")]))
    # The package nvidia-cutlass, and a clone.
    candidates = [Path(place).resolve() / "cutlass_library/source/include" for place in places]
    candidates += [Path(folder).resolve() / "include"] * bool(folder)
    include = next((path for path in candidates if (path / "cutlass/version.h").is_file()), None)
    if include is None:
        return f"{folder} has no include/cutlass/version.h" if folder else "CUTLASS is not installed"
    numbers = re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", (include / "cutlass/version.h").read_text())
    version = ".".join(numbers)
    if tuple(map(int, numbers)) < OLDEST_CUTLASS:
        return f"CUTLASS {version} in {include} is older than {'.'.join(map(str, OLDEST_CUTLASS))}"
    # The module contains compiled parts of CUTLASS, so its licence has to come along.
    licences = [include.parent / "LICENSE.txt", *include.parents[2].glob("nvidia_cutlass-*.dist-info/**/LICENSE.txt")]
    licence = next(filter(Path.is_file, licences), None)
    return Cutlass(include, version, licence) if licence else f"{include.parent} lacks CUTLASS's LICENSE.txt"


def compiler_error(source: str) -> str:
    """Return the compiler's message about a program, or an empty string if it compiles."""
    command = [*CXX, "-xc++", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", *JPEG_INCLUDE, "-"]
    check = subprocess.run(command, input=source, text=True, capture_output=True)
    return (check.stderr or f"exit status {check.returncode}") if check.returncode else ""


def check_compiler() -> None:
    """Exit with a remedy if the compiler doesn't work or lacks headers."""
    if message := compiler_error("#include <vector>\nint main() {}"):
        sys.exit(f"The compiler {shlex.join(CXX)} cannot compile an empty program.\n{message.rstrip()}\n{REMEDY}")
    if compiler_error("#include <Python.h>"):
        sys.exit(PYTHON_HELP)
    if JPEG and compiler_error("#include <cstdio>\n#include <jpeglib.h>\nint main() { jpeg_crop_scanline; }"):
        sys.exit(JPEG_HELP)


class BuildPython(build_py):
    """Copy the Python files, and write how the package was built."""

    def run(self) -> None:
        """Print the decision about compiled modules and write it to build_info.json, beside the compiled modules."""
        super().run()
        names = [extension.name for extension in modules]
        what = f"with {' and '.join(names)}" if names else f"without compiled modules: {PURE}"
        licences, no_hopper = {}, ""
        if "bclip_fast._cuda" in names and isinstance(HOPPER, Cutlass):
            what += f", with kernels for Hopper from CUTLASS {HOPPER.version}"
            licences["CUTLASS-LICENSE.txt"] = HOPPER.licence
        elif "bclip_fast._cuda" in names:
            no_hopper = HOPPER
            what += f", without kernels for Hopper: {HOPPER}"
        print(f"bclip_fast: built {what}", flush=True)
        folder = Path("bclip_fast") if self.editable_mode else Path(self.build_lib, "bclip_fast")
        folder.mkdir(parents=True, exist_ok=True)
        info = {"modules": names, "reason": PURE or "", "no_hopper": no_hopper}
        (folder / "build_info.json").write_text(json.dumps(info) + "\n", encoding="utf-8")
        # A module that contains libjpeg-turbo or CUTLASS comes with its licence.
        if names and JPEG and JPEG_ROOT:
            jpeg = Path(JPEG_ROOT, "share/doc/libjpeg-turbo")
            licences |= {name: jpeg / name for name in ("LICENSE.md", "README.ijg")}
        for name, path in licences.items():
            (folder / "licenses").mkdir(exist_ok=True)
            shutil.copyfile(path, folder / "licenses" / name)


def link(path: Path, target: str) -> Path:
    """Make a link, in place of an earlier one, and return its path."""
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return path


def is_hopper(source: Path) -> bool:
    """Return whether a source includes CUTLASS. Without its headers, it compiles to functions that raise an error."""
    return source.suffix == ".cu" and source.name.startswith("hopper")


def build_order(source: Path) -> tuple[bool, bool]:
    """Return the key that puts the slowest files first."""
    return not is_hopper(source), source.suffix != ".cu"


class BuildWithNinja(build_ext):
    """Build all modules in one run of ninja. Objects stay in build/, because pip's own folders are new each time."""

    def build_extensions(self) -> None:
        """Write build.ninja, run ninja, and copy the modules to their places."""
        import fcntl

        import pybind11
        from ninja import BIN_DIR, ninja_syntax

        check_compiler()
        objects = Path("build", sys.implementation.cache_tag).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        # The slowest files come first, so that no core waits for them at the end.
        extensions = sorted(self.extensions, key=lambda extension: extension.name, reverse=True)
        with open(objects / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Under build isolation the headers have a new path each time, which would rebuild everything, so the build
            # uses a link. Its name contains the version, because ninja ignores the age of system headers.
            headers = link(objects / f"pybind11-{pybind11.__version__}", pybind11.get_include())
            if isinstance(HOPPER, Cutlass):
                link(objects / f"cutlass-{HOPPER.version}", str(HOPPER.include))
            with open(objects / "build.ninja", "w") as file:
                ninja = ninja_syntax.Writer(file)
                for extension in extensions:
                    self._write(ninja, extension, f"-isystem {headers}")
            # BIN_DIR is empty under pip's build isolation, where the program is on the PATH.
            program = shutil.which("ninja", path=f"{BIN_DIR}{os.pathsep}{os.environ['PATH']}")
            # Ninja would try to join make's jobserver, whose pipe Python has closed.
            environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
            build = subprocess.run([program or "ninja", "-C", str(objects)], env=environment)
            if build.returncode:
                sys.exit(f"The compilation failed; the compiler's message is above.\n{REMEDY}")
            for extension in extensions:
                output = Path(self.get_ext_fullpath(extension.name))
                output.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(objects / f"{extension.name}.so", output)

    def _write(self, ninja: "ninja_syntax.Writer", extension: Extension, includes: str) -> None:  # noqa: F821
        kind, compiler = extension.name.rpartition(".")[2], shlex.join(CXX)
        depends = "-MMD -MF $out.d $isa -c $in -o $out"
        includes += f" -I{ROOT}" + "".join(f" -I{path}" for path in self.include_dirs)
        options = f"-O3 -std=c++17 -fPIC -pthread -fvisibility=hidden -Wall -Wno-psabi {includes}"
        if kind == "_cuda":
            codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
            codes.append(f"-gencode=arch=compute_{PTX},code=compute_{PTX}")
            options += f" -DBCLIP_CUDA_ARCHS='\"{';'.join(ARCHS)}\"'"
            device = f"{nvcc()} -O3 -std=c++17 -I{ROOT} -Xcompiler -fPIC,-fvisibility=hidden"
            commands = {"nvcc": f"{device} {' '.join(codes)} {depends}"}
            if isinstance(HOPPER, Cutlass):
                define = f" -DBCLIP_CUTLASS='\"{HOPPER.version}\"'"
                options += define
                # These kernels run only on Hopper. Without NDEBUG, CUTLASS's assertions serialise its matrix products.
                headers = f"--expt-relaxed-constexpr -DNDEBUG -isystem cutlass-{HOPPER.version} {define}"
                commands["nvcc_hopper"] = f"{device} -gencode=arch=compute_90a,code=sm_90a {headers} {depends}"
            for name, command in commands.items():
                ninja.rule(name, command, depfile="$out.d", deps="gcc", description="compile $out")
            ninja.rule(f"link{kind}", f"{nvcc()} -shared -cudart static $in -o $out", description="link $out")
        else:
            options += " ".join(["", "-DBCLIP_JPEG", *JPEG_INCLUDE]) * JPEG
            ninja.rule(
                f"link{kind}",
                f"{compiler} -shared -pthread $in {JPEG_LINK * JPEG} -ldl -o $out",
                description="link $out",
            )
        ninja.rule(
            f"cxx{kind}", f"{compiler} {options} {depends}", depfile="$out.d", deps="gcc", description="compile $out"
        )
        built = []
        for source in sorted(map(Path, extension.sources), key=build_order):
            rule = "nvcc" if source.suffix == ".cu" else f"cxx{kind}"
            if is_hopper(source) and isinstance(HOPPER, Cutlass):
                rule = "nvcc_hopper"
            name = f"{kind}/{source.relative_to('csrc').with_suffix('')}"
            for isa in ISAS if source.stem.endswith("_isa") else [""]:
                variables = {"isa": f"-DBCLIP_ISA={isa}"} if isa else None
                built += ninja.build(
                    f"{name}{'.' * bool(isa)}{isa}.o", rule, str(source.resolve()), variables=variables
                )
        ninja.build(f"{extension.name}.so", f"link{kind}", built)


PURE = why_pure()
if PURE and os.environ.get("BCLIP_CUDA") == "1":
    sys.exit(f"BCLIP_CUDA=1, but compiled modules cannot be built: {PURE}")
HOPPER = cutlass()
sources = sorted(path for path in map(str, Path("csrc/cpu").rglob("*.cpp")) if JPEG or "/image/" not in path)
headers = sorted(str(path) for path in Path("csrc").rglob("*.*h"))
modules = [] if PURE else [Extension("bclip_fast._cpu", sources, depends=headers)]
if not PURE and nvcc():
    # Only tests on x86-64 build the emulator.
    paths = [path for path in Path("csrc/cuda").rglob("*.c[pu]*") if path.suffix != ".cuh"]
    cuda_sources = sorted(str(path) for path in paths if "emulator" not in path.parts)
    modules.append(Extension("bclip_fast._cuda", cuda_sources, depends=headers))
# The benchmarks are beside the package in the source tree, and inside it after the installation, for `bclip bench`.
# setuptools before 77 knows no licence expressions, and pip install --no-build-isolation takes what is installed.
LICENSE = {"license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license": "MIT"}
setup(
    **LICENSE,
    packages=[
        *find_packages(include=["bclip_fast*"]),
        "bclip_fast.benchmarks",
        *(f"bclip_fast.benchmarks.{name}" for name in find_packages("benchmarks")),
    ],
    package_dir={"bclip_fast.benchmarks": "benchmarks"},
    ext_modules=modules,
    cmdclass={"build_ext": BuildWithNinja, "build_py": BuildPython},
)

# make quickstart: set everything up and run the main job.
# make test: set everything up, lint and run the tests, in at most 6 minutes of test time on 2 cores.
# make test-all: the same in random order, with the tests marked long (full products of options, many kills).
# make test-avx2, make test-portable, make test-arm64: test the operators as on simpler processors.
# make test-pure: test the package without compiled modules, as on macOS, on Windows and without a compiler.
# make dist: the sdist and the wheel without compiled modules. make wheels: wheels with them, in Docker.
# make docs: build the documentation as a site, build/docs/html. It needs neither torch nor a compiler.
# make readme: write README's numbers and figure, and the notebook of examples/, from benchmarks/results.
# make gpu: build, measure and test the kernels on a machine with a GPU, in the Python installed there, in 9 minutes.
# make gpu-rehearsal: run the same steps without a GPU, with emulated kernels and tiny sizes, in 2 to 3 minutes.
#
# Variables: PYTHON (python3), TORCH, TORCHVISION and CUTLASS (the requirements installed first), ARGS (passed to bclip
# quickstart, to pytest or to benchmarks.gpu), OUT (folder of the results of make gpu).
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
CUTLASS ?= nvidia-cutlass==4.2.0.0
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*.* csrc/*/*/*.*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compile while packages download, and lint while tests run.
MAKEFLAGS += -j2

.PHONY: quickstart test test-all test-pure lint pytest pytest-all docs readme bench dist wheels gpu gpu-rehearsal clean

# Without a GPU, only the tests need the CUDA module, which takes minutes to compile.
quickstart: export BCLIP_CUDA := $(or $(BCLIP_CUDA),$(if $(wildcard /dev/nvidiactl /dev/dxg),,0))
quickstart: $(VENV)/objects.done $(VENV)/quickstart.done
	$(BIN)/bclip quickstart $(ARGS)

test: lint pytest
test-all: lint pytest-all

# One process more than cores, because many tests wait for other processes. A file runs in one process, so its fixtures
# are made once. Files with slow tests go first (tests/conftest.py).
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder

pytest: $(VENV)/objects.done $(VENV)/dev.done
	$(PYTEST) -p no:randomly -m "not long" $(ARGS)

# pytest-randomly shuffles the order and prints the seed. ARGS="-p randomly -p no:xdist --randomly-seed=N" repeats it.
pytest-all: $(VENV)/objects.done $(VENV)/dev.done
	$(PYTEST) $(ARGS)

lint: $(VENV)/objects.done $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/check_prose.py --summary

# The tools are in a folder of their own, because the site needs nothing else. Warnings are errors.
DOCS := build/docs
DOCS_BIN := $(DOCS)/venv/bin

docs: $(DOCS)/venv/docs.done
	$(DOCS_BIN)/python -m docs.generate site $(DOCS)/source
	$(DOCS_BIN)/python -m sphinx -q -W --keep-going -c docs $(DOCS)/source $(DOCS)/html
	@echo "open $(DOCS)/html/index.html"

readme: $(DOCS)/venv/docs.done
	$(DOCS_BIN)/python -m docs.generate readme

# The requirements of the extra docs, which are one line of pyproject.toml, without the package.
$(DOCS)/venv/docs.done: pyproject.toml
	$(PYTHON) -m venv $(DOCS)/venv
	$(DOCS_BIN)/pip install -q $$(sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ',"')
	@touch $@

bench: $(VENV)/dev.done
	$(BIN)/bclip bench all

# The tests of what the package does without compiled modules, on the backends that it then has.
PURE_TESTS = tests/loss tests/data tests/model tests/eval tests/pretrained tests/search tests/io tests/ingest \
	$(addprefix tests/train/test_,train.py step.py precision.py grad_cache.py resume.py finetune.py)

# An editable installation adds a finder, which would find the tree's compiled modules. sitecustomize.py removes it.
test-pure: $(VENV)/objects.done $(VENV)/dev.done
	rm -rf build/lib build/pure
	BCLIP_COMPILED=0 $(BIN)/pip install -q --no-build-isolation --no-deps --target build/pure .
	echo "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]" > build/pure/sitecustomize.py
	OMP_NUM_THREADS=1 PYTHONPATH=build/pure $(BIN)/pytest -n $$(($$(nproc) + 1)) --dist loadfile -p no:randomly -m "not long" \
	  $(PURE_TESTS) $(ARGS)

dist: $(VENV)/venv.done
	$(BIN)/pip install -q build
	BCLIP_COMPILED=0 $(BIN)/python -m build -o dist .

# pyproject.toml has the settings.
wheels: $(VENV)/venv.done
	$(BIN)/pip install -q cibuildwheel
	$(BIN)/cibuildwheel --output-dir dist

# OUT names the folder of the logs and results (build/gpu). ARGS=--dry-run lists the steps and what each needs.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

gpu-rehearsal: $(VENV)/objects.done $(VENV)/dev.done
	$(BIN)/python -m benchmarks.gpu --rehearse $(ARGS)

clean:
	rm -rf $(VENV) build bclip_fast.egg-info bclip_fast/*.so

$(VENV)/venv.done:
	@$(SYSTEM_PACKAGES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip "setuptools>=77" "pybind11>=2.13" "ninja>=1.11"
	@touch $@

# The headers for the CUDA kernels of Hopper, where nvcc builds them. Their package requires ones that only its tools need.
$(VENV)/cutlass.done: $(VENV)/venv.done
	@case "$$BCLIP_CUDA:$${BCLIP_CUTLASS:-auto}" in 0:* | *:0 | *:*/*) exit ;; esac; \
	if PATH="$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin" command -v nvcc >/dev/null; then \
	  $(BIN)/pip install -q --no-deps "$(CUTLASS)" && touch $@; \
	fi

# Compile into build/. pip's build of the package finds the objects there, or waits for them.
$(VENV)/objects.done: $(VENV)/venv.done $(SOURCES) | $(VENV)/cutlass.done
	$(BIN)/python setup.py -q build_ext
	@touch $@

# Install torch first and separately: another package's requirement could pull a different build of it.
$(VENV)/torch.done: $(VENV)/venv.done | $(VENV)/cutlass.done
	$(BIN)/pip install -q "$(TORCH)" numpy
	@touch $@

# setuptools warns of every editable installation that a folder could hide the package.
INSTALL_EDITABLE = PYTHONWARNINGS=ignore:::setuptools.command.editable_wheel $(BIN)/pip install -q -e

$(VENV)/quickstart.done: $(VENV)/torch.done $(SOURCES)
	$(INSTALL_EDITABLE) ".[quickstart]"
	@touch $@

# Tests compare with open_clip. It requires torchvision, whose wheel requires another build of torch. The comparison needs
# only torchvision's Python files, so install without dependencies. transformers brings the rest of open_clip's imports.
$(VENV)/dev.done: $(VENV)/torch.done $(SOURCES)
	$(INSTALL_EDITABLE) ".[dev]"
	$(BIN)/pip install -q --no-deps open_clip_torch timm "$(TORCHVISION)"
	@touch $@

# Installs the system packages that the shell variable `missing` names, if make runs as root with apt-get.
# Otherwise make names them and stops.
define INSTALL_MISSING
if [ -n "$$missing" ]; then \
  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$missing; \
  else \
    echo "These system packages are missing:$$missing"; \
    echo "On Debian or Ubuntu, ask an administrator to run: apt-get install$$missing"; \
    exit 1; \
  fi; \
fi
endef

# Packages that pip cannot install.
define SYSTEM_PACKAGES
missing=""; \
$(PYTHON) -c "import venv, ensurepip" 2>/dev/null || missing="$$missing python3-venv"; \
if [ "$$(uname)" = Linux ] && [ "$$BCLIP_COMPILED" != 0 ]; then \
test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || missing="$$missing python3-dev"; \
command -v g++ >/dev/null || missing="$$missing g++"; \
printf '#include <stdio.h>\n#include <jpeglib.h>\n' | gcc -xc -fsyntax-only - 2>/dev/null || missing="$$missing libjpeg-dev"; \
fi; \
$(INSTALL_MISSING)
endef

# Tests for other instruction sets. `make test` runs on the best one of this processor.
# They leave out tests that do not depend on the processor: GPU kernels under emulation, registration, compilation.
OPERATOR_TESTS = $(filter-out %_cuda.py %triton.py,$(wildcard tests/ops/test_*.py))
TEST_OPERATORS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --dist worksteal \
	-p no:randomly -m "not long" -k "not compil and not registration" $(OPERATOR_TESTS) $(ARGS)

.PHONY: test-avx2 test-portable test-arm64 arm64-packages

test-avx2: $(VENV)/objects.done $(VENV)/dev.done
	BCLIP_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(TEST_OPERATORS)

# torch without its vector kernels, and our kernels compiled for any processor.
test-portable: $(VENV)/objects.done $(VENV)/dev.done
	BCLIP_CPU_ISA=plain ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(TEST_OPERATORS)

# The kernels, cross-compiled and emulated, without Python or torch.
test-arm64: arm64-packages
	$(MAKE) -C tests/portable CXX=aarch64-linux-gnu-g++ \
	  RUN="$$(command -v qemu-aarch64-static || command -v qemu-aarch64) -L /usr/aarch64-linux-gnu"

arm64-packages:
	@$(ARM64_PACKAGES)

define ARM64_PACKAGES
missing=""; \
command -v aarch64-linux-gnu-g++ >/dev/null || missing="$$missing g++-aarch64-linux-gnu"; \
command -v qemu-aarch64-static >/dev/null || command -v qemu-aarch64 >/dev/null || missing="$$missing qemu-user-static"; \
$(INSTALL_MISSING)
endef

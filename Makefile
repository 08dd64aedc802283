# make quickstart: sets everything up and runs the main job.
# make test: sets everything up, lints and runs the tests, in at most 6 minutes of test time on 2 cores.
# make test-all: the same in random order and with the tests marked long: full products of options, many kills.
# make test-avx2, test-portable, test-arm64: the operators' tests as on lesser processors.
# make gpu: builds, tests and measures the kernels on a machine with a GPU, in what Python is there; under 9 minutes.
# Variables: PYTHON (python3), TORCH (the requirement installed first), ARGS (passed to bclip quickstart, or to pytest).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*.* csrc/*/*/*.*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What is compiled and what is downloaded, what is checked and what is tested, at the same time.
MAKEFLAGS += -j2

.PHONY: quickstart test test-all lint pytest pytest-all bench gpu clean

quickstart: $(VENV)/objects.done $(VENV)/quickstart.done
	$(BIN)/bclip quickstart $(ARGS)

test: lint pytest
test-all: lint pytest-all

# One process more than cores, since many tests wait for others. A file runs in one process, which makes its fixtures
# once; files with slow tests go first (tests/conftest.py).
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder

pytest: $(VENV)/objects.done $(VENV)/dev.done
	$(PYTEST) -p no:randomly -m "not long" $(ARGS)

# pytest-randomly shuffles the order and prints the seed; ARGS="-p randomly -p no:xdist --randomly-seed=N" repeats it.
pytest-all: $(VENV)/objects.done $(VENV)/dev.done
	$(PYTEST) $(ARGS)

lint: $(VENV)/objects.done $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/dev.done
	$(BIN)/bclip bench all

gpu:
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build bclip_fast.egg-info bclip_fast/*.so

$(VENV)/venv.done:
	@$(SYSTEM_PACKAGES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip "setuptools>=77" "pybind11>=2.13" "ninja>=1.11"
	@touch $@

# Into build/, where pip's own build of the package finds the objects, or waits for them.
$(VENV)/objects.done: $(VENV)/venv.done $(SOURCES)
	$(BIN)/python setup.py -q build_ext
	@touch $@

# Torch first, by itself: another package's range could pull a different build of it.
$(VENV)/torch.done: $(VENV)/venv.done
	$(BIN)/pip install -q "$(TORCH)" numpy
	@touch $@

$(VENV)/quickstart.done: $(VENV)/torch.done $(SOURCES)
	$(BIN)/pip install -q -e ".[quickstart]"
	@touch $@

# open_clip is a peer that tests compare with: it asks for torchvision, whose wheel wants another torch build and which
# neither we nor the comparison need more of than its Python files. What else it imports is there for transformers.
$(VENV)/dev.done: $(VENV)/torch.done $(SOURCES)
	$(BIN)/pip install -q -e ".[dev]"
	$(BIN)/pip install -q --no-deps open_clip_torch timm torchvision==0.28.0
	@touch $@

# What pip can't install. As root under apt it is installed; otherwise it is named, and make stops.
define SYSTEM_PACKAGES
missing=""; \
$(PYTHON) -c "import venv, ensurepip" 2>/dev/null || missing="$$missing python3-venv"; \
test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || missing="$$missing python3-dev"; \
command -v g++ >/dev/null || missing="$$missing g++"; \
printf '#include <stdio.h>\n#include <jpeglib.h>\n' | gcc -xc -fsyntax-only - 2>/dev/null || missing="$$missing libjpeg-dev"; \
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

# Processors that have less than this one: `make test` runs on the best that is here.
# Left out are tests that no processor changes: GPU kernels under an emulator or interpreter, registration, compilation.
OPERATOR_TESTS = $(filter-out %_cuda.py %triton.py,$(wildcard tests/ops/test_*.py))
TEST_OPERATORS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --dist worksteal \
	-p no:randomly -m "not long" -k "not compil and not registration" $(OPERATOR_TESTS) $(ARGS)

.PHONY: test-avx2 test-portable test-arm64 arm64-packages

test-avx2: $(VENV)/objects.done $(VENV)/dev.done
	BCLIP_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(TEST_OPERATORS)

# torch without vector kernels of its own, and our kernels as a compiler makes them for any processor.
test-portable: $(VENV)/objects.done $(VENV)/dev.done
	BCLIP_CPU_ISA=plain ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(TEST_OPERATORS)

# The kernels, cross-compiled and emulated. Neither Python nor torch is involved.
test-arm64: arm64-packages
	$(MAKE) -C tests/portable CXX=aarch64-linux-gnu-g++ \
	  RUN="$$(command -v qemu-aarch64-static || command -v qemu-aarch64) -L /usr/aarch64-linux-gnu"

arm64-packages:
	@$(ARM64_PACKAGES)

define ARM64_PACKAGES
missing=""; \
command -v aarch64-linux-gnu-g++ >/dev/null || missing="$$missing g++-aarch64-linux-gnu"; \
command -v qemu-aarch64-static >/dev/null || command -v qemu-aarch64 >/dev/null || missing="$$missing qemu-user-static"; \
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

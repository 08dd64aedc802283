# make quickstart: sets everything up and runs the main job.
# make test: sets everything up, lints and runs the tests, in at most 6 minutes of test time on 2 cores.
# make test-all: the same in random order and with the tests marked long: full products of options, many kills.
# make gpu: builds, tests and measures the kernels on a machine with a GPU, in what Python is there; under 9 minutes.
# Variables: PYTHON (python3), TORCH (the requirement installed first), ARGS (passed to bclip quickstart, or to pytest).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)
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

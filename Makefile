# SPDX-License-Identifier: MIT
# make demo   train a Kimi K2 in miniature and sample from it (some minutes on two cores)
# make test   every test: C++, CUDA kernels run on the host, sanitizers, Python
# make lint   ruff, mypy, clang-format
# make bench  the benchmarks, short
# Each does its own set-up in .venv and build/. PYTHON chooses the interpreter (3.11 or later), TORCH
# the torch to install (TORCH=torch takes the newest), KIMI_OPS_CUDA=off leaves the kernels for GPUs out.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/python -m pip install --quiet
BUILD = build/python-$(shell $(BIN)/python -c "import sys; print(sys.implementation.cache_tag)")

.PHONY: demo test test-native test-python lint bench clean

demo: .venv/demo.ready
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/kimi-ops demo

test: test-native test-python

test-native: .venv/test.ready
	KIMI_OPS_TESTS=ON $(BIN)/python setup.py --quiet build_ext --inplace
	ctest --test-dir $(BUILD) --output-on-failure -j2
	cmake --preset asan > /dev/null
	cmake --build --preset asan
	ctest --preset asan -j2

test-python: test-native
	$(BIN)/python -m pytest --durations=10

lint: .venv/test.ready
	ruff check .
	ruff format --check .
	mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' '*.c' | xargs clang-format --dry-run -Werror

bench: .venv/test.ready
	$(BIN)/python -m benchmarks --quick

clean:
	rm -rf build python/kimi_ops/*.so python/kimi_ops/include

.venv/torch.ready:
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f'make: PYTHON: expected Python 3.11 or later, got {v[0]}.{v[1]}; set PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	touch $@

# The build tools live in .venv, so that later builds are incremental (no isolated environment).
.venv/demo.ready: .venv/torch.ready pyproject.toml
	$(PIP) "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13"
	$(PIP) --no-build-isolation --editable ".[plot]"
	touch $@

.venv/test.ready: .venv/demo.ready
	$(PIP) --no-build-isolation --editable ".[plot,test,lint]"
	touch $@

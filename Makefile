# SPDX-License-Identifier: MIT
# make demo   train a Kimi K2 in miniature and sample from it (some minutes on two cores)
# make test   every test: C++, Python, CUDA kernels run on the host, sanitizers
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
BUILD_EXT := $(BIN)/python setup.py --quiet build_ext --inplace
part = @printf '\n== %s, begun at %s\n' '$(1)' "$$(date +%T)"

.PHONY: demo test test-native test-python test-sanitized lint bench clean

demo: .venv/demo.ready
	$(BUILD_EXT)
	$(BIN)/kimi-ops demo

test: test-native test-python test-sanitized
	$(call part,all tests passed)

test-native: .venv/test.ready
	$(call part,build)
	KIMI_OPS_TESTS=PYTHON $(BUILD_EXT)
	$(call part,C API)
	ctest --test-dir $(BUILD) --output-on-failure -j2

# Threads that wait sleep: a worker a processor and as many threads in each would spin otherwise.
test-python: test-native
	$(call part,Python)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadgroup --durations=10

# The kernels on the host run here alone: what they find does not depend on the optimisation.
test-sanitized: .venv/test.ready
	$(call part,build with ASan and UBSan)
	cmake --preset asan > /dev/null
	cmake --build --preset asan
	$(call part,C API and CUDA kernels on the host under ASan and UBSan)
	ctest --preset asan -j2

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

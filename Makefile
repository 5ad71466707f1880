# Two commands for users: `make demo` and `make test`. The rest is for those who work on seqkern.
#
#   make demo TORCH="torch==2.13.0"     choose the torch build (default: any >= 2.10)
#   make test PYTHON=python3.12         choose the interpreter .venv is made with

PYTHON ?= python3
TORCH ?= torch>=2.10
VENV ?= .venv
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Warnings of a compiler newer than ours must not break a user's build; CI sets ON.
WERROR ?= OFF
# nvcc builds for these when `make cuda` compiles all kernels without needing a GPU.
CUDA_ARCHITECTURES ?= 80;90a

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PY := python tests benchmarks build_backend tools
export PATH := $(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

.PHONY: demo test quick test-gpu check lint fix isa build emulator cuda bench clean

demo: $(VENV)/.built
	$(BIN)/seqkern demo $(DEMO_ARGS)

test: $(VENV)/.built emulator
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The CPU kernels of every instruction set this machine has; the plain run tests the best one.
isa: $(VENV)/.built
	SEQKERN_FORCE_ISA=baseline $(BIN)/python -m pytest tests/ops -k cpu $(PYTEST_ARGS)
	$(BIN)/python tools/check_isa_symbols.py build

quick: $(VENV)/.built emulator
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks

# Everything a change has to pass; `make fix` formats.
check: lint test isa cuda

lint: $(VENV)/.dev
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/mypy --strict benchmarks

fix: $(VENV)/.dev
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP)

# ---------------------------------------------------------------- environment and build

# A torch that the interpreter already has is used, not downloaded again.
$(VENV)/.made:
	@$(PYTHON) build_backend/make_venv.py $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.requires: pyproject.toml $(VENV)/.torch
	$(BIN)/python build_backend/requires.py > $(VENV)/build-requires.txt
	$(PIP) install -r $(VENV)/build-requires.txt
	@touch $@

SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc -type f)

$(VENV)/.built: $(SOURCES) $(VENV)/.requires
	$(PIP) install --no-build-isolation -e ".[test]" -C cmake.define.SEQKERN_WERROR=$(WERROR)
	@touch $@

$(VENV)/.dev: $(VENV)/.built
	$(PIP) install --no-build-isolation -e ".[dev]" -C cmake.define.SEQKERN_WERROR=$(WERROR)
	@touch $@

build: $(VENV)/.built

# The CUDA sources compiled for the host (tests/emulator): test-only, never in a wheel.
emulator: $(VENV)/.requires
	@cmake -S . -B build/emulator -G Ninja -DCMAKE_BUILD_TYPE=Release -DSEQKERN_EMULATOR=ON \
	   -DSEQKERN_TESTS=ON -DSEQKERN_WERROR=$(WERROR) -DSEQKERN_CUDA=OFF -DPython_EXECUTABLE=$(BIN)/python > build/emulator.log 2>&1 || { cat build/emulator.log; exit 1; }
	@cmake --build build/emulator --target seqkern_emu seqkern_cpu_tests

clean:
	rm -rf build dist

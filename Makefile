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

NVCC := $(or $(shell command -v nvcc),$(wildcard $(CUDA_HOME)/bin/nvcc))
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PYTHON_CODE := python tests benchmarks examples build_backend tools
export PATH := $(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

.PRECIOUS: $(VENV)/.requires-%
.PHONY: demo test quick fuzz test-gpu gpu-session check check-install wheels check-oldest check-compilers arm64 lint fix isa poison poisoned sanitize sanitized build \
        emulator ptx cuda without-nvcc bench clean

demo: $(VENV)/.built
	$(BIN)/seqkern demo $(DEMO_ARGS)

test: $(VENV)/.built $(VENV)/.requires-test emulator
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The CPU kernels of every instruction set this machine has but the one that the plain run tests.
OTHER_ISAS = $(shell $(BIN)/python -c "from seqkern._C import cpu_isa, cpu_isas; print(*(set(cpu_isas()) - {cpu_isa()}))")
# Those of the AVX-512 family share all kernels but these.
isa_tests = $(if $(findstring avx512,$(1)),cpu and (lstm or gru or rnn or attention or linear_cross),cpu)
isa: $(VENV)/.built $(VENV)/.requires-test
	set -e; $(foreach isa,$(OTHER_ISAS),SEQKERN_FORCE_ISA=$(isa) $(BIN)/python -m pytest tests/ops \
	   -k "$(call isa_tests,$(isa))" $(PYTEST_ARGS);)
	$(BIN)/python tools/check_isa_symbols.py build

# Tests of the kernels in this build; of the CUDA kernels' plans the emulator's own files are about.
CPU_TESTS = not emu and not cuda and not resident and not exchange

# The CPU kernels over memory that holds NaN and large values where nothing was written: in an environment
# and a build of their own.
poison:
	$(MAKE) VENV=.venv-poison POISON=ON poisoned
poisoned: $(VENV)/.built $(VENV)/.requires-test
	SEQKERN_TEST_FILL=1 $(BIN)/python -m pytest tests/ops tests/nn -k "$(CPU_TESTS)" $(PYTEST_ARGS)

# The same under AddressSanitizer and UBSan, whose runtime has to be in the process before torch, as has
# libstdc++, whose exceptions it watches. (Its checks make g++ warn of variables that are set.)
sanitize:
	$(MAKE) VENV=.venv-sanitize SANITIZE=ON WERROR=OFF sanitized
sanitized: $(VENV)/.built $(VENV)/.requires-test
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	   $(BIN)/python -m pytest tests/ops tests/nn --capture=sys -k "$(CPU_TESTS) and not compile" $(PYTEST_ARGS)

# Random calls of ops and of torch's modules under `accelerate`, other ones each time; in a run of the tests they
# are few and the same. A failure is shown as the smallest call that fails. SEQKERN_FORCE_ISA chooses the kernels.
EXAMPLES ?= 2000
fuzz: $(VENV)/.built $(VENV)/.requires-test emulator
	SEQKERN_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/fuzz $(PYTEST_ARGS)

quick: $(VENV)/.built $(VENV)/.requires-test emulator
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks

# Everything a change has to pass; `make fix` formats.
check: lint test isa $(if $(NVCC),cuda ptx,without-nvcc) check-install check-oldest check-compilers

lint: $(VENV)/.built $(VENV)/.requires-dev
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/mypy --strict benchmarks

check-install:
	TORCH="$(TORCH)" PYTHON="$(PYTHON)" tools/check_install.sh

# Wheels for other machines, one per interpreter, in dist/: `make wheels PYTHONS="python3.11 python3.13"`.
PYTHONS ?= $(PYTHON)
wheels: $(VENV)/.requires
	tools/wheels.sh $(BIN)/python $(PYTHONS)

# The torch layer against the headers of the oldest torch that pyproject.toml allows.
check-oldest: $(VENV)/.requires
	tools/check_oldest_torch.sh $(BIN)/python

# The sources by g++ 11 and clang, where they are installed.
check-compilers: $(VENV)/.built
	$(BIN)/python tools/check_compilers.py $(firstword $(wildcard build/cp*))

# Built for 64-bit ARM and tested in an emulator of that processor: some minutes (all of tests/ops takes hours).
ARM64_TESTS ?= $(addprefix tests/ops/test_,$(addsuffix .py,lstm linear_step attention_step attention_tiles cross_entropy softmax sample)) \
               -k "cpu and not compile and not opcheck and not gradgradcheck"
arm64: $(VENV)/.requires
	tools/check_arm64.sh $(BIN)/python $(ARM64_TESTS) $(PYTEST_ARGS)

fix: $(VENV)/.built $(VENV)/.requires-dev
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)
	$(BIN)/clang-format -i $(CPP)

# ---------------------------------------------------------------- environment and build

# A torch that the interpreter already has is used, not downloaded again. (pip takes settings of a build from
# 22.1 on; Ubuntu 22.04 has 22.0.)
$(VENV)/.made:
	@$(PYTHON) build_backend/make_venv.py $(VENV)
	@$(PIP) install -q "pip>=22.1"
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	$(PIP) install "$(TORCH)"
	@touch $@

# pyproject.toml's own lists; ours is then installed without looking at dependencies again.
$(VENV)/.requires: pyproject.toml $(VENV)/.torch
	$(BIN)/python build_backend/requires.py build run plot > $(VENV)/requires.txt
	$(PIP) install -r $(VENV)/requires.txt
	@touch $@

$(VENV)/.requires-%: pyproject.toml $(VENV)/.torch
	$(BIN)/python build_backend/requires.py $* > $(VENV)/requires-$*.txt
	$(PIP) install -r $(VENV)/requires-$*.txt
	@touch $@

SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc cmake -type f)

$(VENV)/.built: $(SOURCES) $(VENV)/.requires
	$(PIP) install --no-build-isolation --no-deps -e . --config-settings=cmake.define.SEQKERN_WERROR=$(WERROR) \
	   $(if $(POISON),--config-settings=cmake.define.SEQKERN_POISON=ON --config-settings=build-dir=build/poison) \
	   $(if $(SANITIZE),--config-settings=cmake.define.SEQKERN_SANITIZE=ON --config-settings=build-dir=build/sanitize)
	@touch $@

build: $(VENV)/.built

# The CUDA sources compiled for the host (tests/emulator): test-only, never in a wheel.
emulator: $(VENV)/.requires
	@mkdir -p build
	@cmake -S . -B build/emulator -G Ninja -DCMAKE_BUILD_TYPE=Release -DSEQKERN_EMULATOR=ON \
	   -DSEQKERN_TESTS=ON -DSEQKERN_WERROR=$(WERROR) -DSEQKERN_CUDA=OFF -DPython_EXECUTABLE=$(BIN)/python > build/emulator.log 2>&1 || { cat build/emulator.log; exit 1; }
	@cmake --build build/emulator --target seqkern_emu seqkern_cpu_tests ptx_harness

# Every CUDA kernel through the real compiler, warnings as errors, and a table of what each takes. Needs
# nvcc, but neither a GPU nor a CUDA build of torch.
cuda: $(VENV)/.requires
	@cmake -S . -B build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DSEQKERN_CUDA=ON -DSEQKERN_WERROR=ON \
	   -DSEQKERN_KERNEL_TABLE=ON "-DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)" \
	   -DPython_EXECUTABLE=$(BIN)/python
	@cmake --build build/cuda --target seqkern_cuda
	@$(BIN)/python tools/kernel_table.py show build/cuda

# The kernels as nvcc compiled them, in the host emulator: their PTX, instruction by instruction.
PTX_ARCHITECTURE ?= 90a
ptx: emulator $(VENV)/.built $(VENV)/.requires-test
	@cmake -S . -B build/emulator -DSEQKERN_PTX=ON -DSEQKERN_PTX_ARCHITECTURE=$(PTX_ARCHITECTURE) > build/emulator.log 2>&1 || { cat build/emulator.log; exit 1; }
	@cmake --build build/emulator --target seqkern_ptx
	SEQKERN_EMU_LIB=$(CURDIR)/build/emulator/libseqkern_ptx.so $(BIN)/python -m pytest -m "not slow" -k "emu and not cuda" $(PYTEST_ARGS)

without-nvcc:
	@echo "no nvcc: the CUDA kernels were NOT compiled (they ran in the emulator only)"

# On a machine with a GPU and a CUDA build of torch. torch's caching allocator is off under the sanitizer,
# which could otherwise not tell one tensor from the next.
SANITIZED := tests/ops -k "cuda and (matches_torch or class_probabilities or strided)"
test-gpu: $(VENV)/.built $(VENV)/.requires-test
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make test-gpu: torch sees no CUDA device')"
	$(BIN)/python -m pytest --ignore tests/emulator -k cuda $(PYTEST_ARGS)
	@if command -v compute-sanitizer > /dev/null; then \
	   for tool in memcheck racecheck; do \
	     PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	       $(BIN)/python -m pytest -x $(SANITIZED) || exit 1; \
	   done; \
	 else echo "no compute-sanitizer: memory and races were NOT checked on the GPU"; fi

# The same and the benchmarks beside their peers, unattended: results in one folder. GPU_MINUTES=14 for
# something of everything in that time; GPU_STAGES="build test" or "bench" for a part.
gpu-session:
	$(PYTHON) tools/gpu_session.py $(GPU_STAGES) --out benchmarks/results/gpu-session $(if $(GPU_MINUTES),--minutes $(GPU_MINUTES))

clean:
	rm -rf build dist

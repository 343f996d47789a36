# make help: what there is. One virtual environment serves all targets; each adds the extras it needs.

PYTHON ?= python3
VENV ?= .venv
ITERATIONS ?= 70000
# More arguments for pytest or the benchmarks, as in: make test ARGS="-k sinusoid"
ARGS ?=
# Processes that tests run in, each with one thread unless a test asks for more
WORKERS ?= auto
IN_WORKERS := -n $(WORKERS) --dist worksteal

BIN := $(VENV)/bin
DEMO := runs/demo
SANITIZED := $(VENV)-sanitized
RACES := $(VENV)-threads
SANITIZE_TESTS := tests/test_cpu.py tests/test_cpu_norms.py tests/test_cpu_images.py tests/test_cpu_images_edges.py \
    tests/test_cpu_family.py tests/test_cpu_rules.py tests/test_cpu_data.py tests/test_operations_cpu.py \
    tests/test_step_params.py tests/test_adapt.py tests/test_rates.py tests/test_meta_gradient.py
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_TESTS := $(addprefix tests/test_,$(addsuffix .py,gpu triton triton_layers attend matmul operations_triton losses_triton \
    graphs compiled_caller gpu_graphs triton_trust captured gpu_images conv_triton norm_triton triton_images triton_family))
# An installation is editable, so it is repeated only when the metadata or the C++ changes.
INSTALLED_FROM := pyproject.toml constraints.txt $(shell find csrc -type f)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two installations into one environment would disturb each other
.PHONY: help demo test sanitize sanitize-threads kernels bench gpu gpu-sanitize lint docs docs-serve format clean check-python

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Variables: PYTHON=$(PYTHON) (3.11 to 3.13), VENV=$(VENV), ITERATIONS=$(ITERATIONS) (demo), ARGS (test, bench)"

# One thread: the network is too small to gain by more, and a busy machine slows them down a lot.
demo: $(VENV)/.installed-train ## Train the sinusoid, less than half a minute, then evaluate it: table, and plots in runs/demo
	$(BIN)/maml-fast train sinusoid --iterations $(ITERATIONS) --inner-lr 0.001 --threads 1 \
	    --output $(DEMO) --overwrite
	$(BIN)/maml-fast evaluate $(DEMO)/checkpoint.safetensors --shots 5 10 --plot-dir $(DEMO) \
	    --json $(DEMO)/evaluation.json

test: $(VENV)/.installed-test ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_WORKERS) $(ARGS)

# The C++ backend's tests on an extension built with the sanitizers, in an environment that borrows the packages of VENV.
# Leaks are not looked for: the interpreter and torch leave much behind.
# Those of threads fork, which under the sanitizers must not happen in a worker.
PYTEST := -m pytest -q -p no:cacheprovider --capture=sys
SANITIZE = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
    MAML_FAST_TEST_BACKENDS=reference,cpu ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(SANITIZED)/bin/python $(PYTEST)
sanitize: $(SANITIZED)/.installed ## Run the C++ backend's tests with the address and undefined-behaviour sanitizers
	$(SANITIZE) tests/test_cpu_threads.py $(ARGS)
	OMP_NUM_THREADS=1 $(SANITIZE) $(IN_WORKERS) $(SANITIZE_TESTS) $(ARGS)

# This processor's lowest and highest instruction set: what code takes from them are the length of a vector, and whether
# registers are many. All lie between these two.
SETS = $$($(BIN)/python -c 'from maml_fast import cpu_features; sets = list(cpu_features.engines()); \
    print(sets[0], sets[-1], sep=";")')

# The engine's own threads: those of torch's OpenMP wait for each other in ways that the sanitizer does not see, so torch
# itself has one. Where the kernel puts memory at random in more than 28 bits, the sanitizer does not start: setarch asks it
# not to, where that is allowed.
IN_PLACE = $$(setarch "$$(uname -m)" -R true 2>/dev/null && echo setarch "$$(uname -m)" -R)
sanitize-threads: $(RACES)/.installed ## Run the C++ backend's tests of threads with the thread sanitizer
	OMP_NUM_THREADS=1 LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so)" \
	    TSAN_OPTIONS="halt_on_error=1" \
	    $(IN_PLACE) $(RACES)/bin/python $(PYTEST) tests/test_cpu_races.py $(ARGS)

# For threads one is enough: what they share is the same in all.
$(SANITIZED)/.installed: BUILD = MAML_FAST_SANITIZE=address,undefined MAML_FAST_INSTRUCTION_SETS="$(SETS)"
$(RACES)/.installed: BUILD := MAML_FAST_SANITIZE=thread MAML_FAST_INSTRUCTION_SETS=baseline
$(SANITIZED)/.installed $(RACES)/.installed: $(INSTALLED_FROM) $(VENV)/.installed-test
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	    "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/borrowed.pth"
	MAML_FAST_CPU=ON $(BUILD) $(@D)/bin/python -m pip install \
	    --disable-pip-version-check --no-deps --config-settings install.strip=false --editable .
	@touch $@

# Compiled for three GPUs, of which none need be here; spills beyond those recorded, products that are not what was meant, and
# too much shared memory are failures.
kernels: $(VENV)/.installed-test ## Compile all Triton kernels for sm_90, sm_80 and gfx942 and look at their code
	$(BIN)/python -m tests.compiled --target sm_90 --target sm_80 --target gfx942 $(ARGS)

bench: $(VENV)/.installed-bench ## Run the benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

# Nine minutes at most, of which the benchmarks take what the tests leave. Nothing is installed or fetched: the environment is
# taken if it is there, else PYTHON with what it has (pytest, rich, matplotlib, hypothesis; pytest-xdist to be quicker).
gpu: ## On a machine with a GPU: run the tests of what runs there, then the benchmarks with the peers
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "torch finds no GPU here")'
	@start=$$(date +%s); workers=$$($(GPU_PYTHON) -c 'import xdist' 2>/dev/null && echo "-n 8"); failed=0; \
	$(GPU_PYTHON) -m pytest -q -p no:cacheprovider $$workers $(GPU_TESTS) || failed=1; \
	$(GPU_PYTHON) -m benchmarks --device cuda --minutes $$(( (530 - $$(date +%s) + start) / 60 )) $(ARGS) || failed=1; \
	exit $$failed

gpu-sanitize: ## On a machine with a GPU: run tests of the kernels under compute-sanitizer, five minutes at most
	$(GPU_PYTHON) -m tests.compute_sanitizer $(ARGS)

lint: $(VENV)/.installed-dev ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Of the environment that lint uses, so that neither builds the C++ anew for the other.
docs: $(VENV)/.installed-dev ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

docs-serve: $(VENV)/.installed-dev ## Show the documentation while it is written
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

format: $(VENV)/.installed-dev ## Format the code and apply the safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove what was built and cached, and install anew next time; keeps runs/ and the environment
	rm -rf build dist site .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks $(VENV)/.installed-*
	find maml_fast kernels tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed-%: $(INSTALLED_FROM) | $(BIN)/pip check-python
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	@touch $@

WANTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
VERSION := import sys; print("%d.%d" % sys.version_info[:2])

# pip is the last thing that venv writes: an environment without it is unfinished.
$(BIN)/pip:
	@$(PYTHON) -c '$(WANTED)' || { echo "PYTHON=$(PYTHON) is not a Python 3.11, 3.12 or 3.13. Name one:" \
	    "make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A PYTHON that was asked for must not give way, unsaid, to the one of an older environment.
check-python: | $(BIN)/pip
ifneq ($(origin PYTHON),file)
	@asked=$$($(PYTHON) -c '$(VERSION)') || { echo "PYTHON=$(PYTHON) does not run" >&2; exit 1; }; \
	found=$$($(BIN)/python -c '$(VERSION)'); [ "$$asked" = "$$found" ] || { \
	    echo "PYTHON=$(PYTHON) is Python $$asked, but the environment $(VENV) has Python $$found." \
	    "Remove $(VENV), or name another: VENV=.venv-$$asked" >&2; exit 1; }
endif

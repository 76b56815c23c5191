# Everything runs in its own virtual environment, made on first use.
#   make demo    set up and let the bundled model tell a story and find a fact (offline)
#   make test    set up and run the tests, in two processes
#   make test-live    compare with PyTorch, transformers, PEFT and TRL, and try the page in Chromium: installs all but that
#   make llama-cpp    install llama.cpp and vocabularies of Phi-4's (by npm) in .llama-cpp, for tests that compare with them
#   make test-long    the tests that take too long for every day, alone; the result goes into tests/long.json
#   make check   lint, format and types as well
#   make docs    the documentation, in site/; a warning is an error
#   make outputs    where the bundled model has changed: what pages, their picture and the notebooks show of it, and, behind make
#                   llama-cpp, what llama.cpp makes of it, for the tests
#   make dist    the sdist, and the wheel that is made from it, in dist/; the wheel runs alone in an empty environment
#   make bench   the benchmarks, side by side with mlx-lm and, for parity, with PyTorch (TORCH=... says which)
# On Linux MLX needs a backend: BACKEND=cpu (default) or BACKEND=cuda.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch
# A thread a process: two processes share the cores, and PyTorch's threads wait for each other by turning in circles.
# Bytecode is kept, whatever the shell says: the tests start this package in some three hundred processes.
PYTEST = OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal
ifeq ($(shell uname -s),Linux)
BACKEND ?= cpu
endif
comma := ,

.PHONY: demo test test-live llama-cpp test-long check docs outputs dist bench clean

demo: $(VENV)/.package
	@echo 'The bundled model has 5 million parameters. It was trained for little stories and for finding facts; it is not Phi-3.'
	$(BIN)/phi3-mlx generate -p "Tell me a story about a duck and a frog."
	@echo 'Now a sentence hidden in a text that is far longer than its LongRoPE boundary of 512 tokens:'
	echo "What is the secret word of the owl?" | $(BIN)/phi3-mlx generate -f notebooks/secrets.txt -f - --stats

test: $(VENV)/.test
	$(PYTEST)

test-live: $(VENV)/.live
	$(PYTEST) -m live

# Prebuilt, for this machine alone; without --ignore-scripts npm would run its installer.
LLAMA_CPP := 3.21.1
LLAMA_CPP_BUILD := $(if $(filter Darwin,$(shell uname -s)),mac-arm64-metal,linux-$(if $(filter x86_64,$(shell uname -m)),x64,arm64))
llama-cpp:
	npm install --prefix .llama-cpp --no-audit --no-fund --ignore-scripts --omit=optional \
		node-llama-cpp@$(LLAMA_CPP) @node-llama-cpp/$(LLAMA_CPP_BUILD)@$(LLAMA_CPP) js-tiktoken@1.0.21

test-long: $(VENV)/.live
	PHI3_MLX_TEST_LONG=1 $(PYTEST) -m long

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

outputs: $(VENV)/.test
	$(BIN)/python -m bench readme
	$(BIN)/python -m bench.terminal
	$(BIN)/python -m bench.notebooks
	if [ -d .llama-cpp ]; then $(BIN)/python tests/make_golden_llama.py && $(BIN)/python tests/llama_steering.py; fi

# Not --quiet: it would keep warnings from --strict.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check build
	rm -rf dist
	$(BIN)/python -m build .
	PYTHON=$(BIN)/python .ci/alone dist/*.whl

bench: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m bench --all

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.$(if $(BACKEND),[$(BACKEND)])'
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test$(if $(BACKEND),$(comma)$(BACKEND))]'
	touch $@

$(VENV)/.live: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) 'transformers>=5.20' 'peft>=0.15' 'trl>=1.16' 'playwright>=1.49'
	touch $@

$(VENV)/.docs: $(VENV)/.package
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs$(if $(BACKEND),$(comma)$(BACKEND))]'
	touch $@

clean:
	rm -rf $(VENV) dist build site

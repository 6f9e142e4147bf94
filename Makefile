# `make demo` and `make test` each set up all they need; the second time they start at once.
#
#   PYTHON=python3.11         the interpreter the virtual environment is made from
#   TORCH="torch==2.13.0"     where this does not give a CPU build: TORCH="torch==2.13.0+cpu --index-url URL"
#   TEST_ARGS, DEMO_ARGS, BENCH_ARGS      passed on, for example: make test TEST_ARGS="tests/ops -x"; the tests
#                             run in two processes, with TEST_ARGS="-n 0" in one
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c .ci/constraints.txt
STAMP := $(VENV)/.done
CSRC := setup.py $(shell find csrc -type f -name '*.cpp' -o -type f -name '*.h' -o -type f -name '*.inl')
CLANG_FORMATTED := -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh'
CUDA := $(shell find csrc -type f -name '*.cu' -o -type f -name '*.cuh' -o -type f -name '*.h')
FIND_NVCC := $(PY) -c 'import sys; from peft_engine import doctor; sys.exit(doctor.find_nvcc() is None)'
CUDA_EXTRA := $(PY) -c 'import tomllib as t; \
  print(*t.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["cuda"])'

# Models and data lie in .cache/; nothing asks a hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DELETE_ON_ERROR:
.PHONY: help setup data demo test bench resources lint format clean

help:
	@echo "make demo    fine-tune a real model with QLoRA and show what it gained (3 to 12 minutes on 2 cores)"
	@echo "make test    run the tests"
	@echo "make bench   measure against torch, bitsandbytes and PEFT; results in bench/results/"
	@echo "make resources  compile every GPU kernel and write bench/results/resources.csv anew (no GPU needed)"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make format  apply ruff's and clang-format's formatting"
	@echo "make setup   only set up: virtual environment in $(VENV), pinned packages, compiled library"
	@echo "make clean   remove what was built (downloads in .cache/ and adapters of your own in out/ stay)"

setup: $(STAMP)-native

data: $(STAMP)-native
	@$(PY) examples/prepare.py

demo: data
	@$(PY) examples/demo.py $(DEMO_ARGS)

test: data $(STAMP)-cuda
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

bench: data
	$(PY) -m bench.runner $(BENCH_ARGS)

resources: $(STAMP)-cuda
	$(PY) -m bench.resources

lint: $(STAMP)-lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	find csrc -type f \( $(CLANG_FORMATTED) \) -print0 \
	  | xargs -0 $(VENV)/bin/clang-format --dry-run -Werror

format: $(STAMP)-lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc -type f \( $(CLANG_FORMATTED) \) -print0 | xargs -0 $(VENV)/bin/clang-format -i

$(STAMP)-torch:
	@echo "==> virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"peft-engine needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; run: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "no virtual environment: on Debian run 'apt install python3-venv'" >&2; exit 1; }
	@echo "==> torch, first and by itself (a looser request fetches gigabytes of CUDA)"
	$(PIP) $(TORCH)
	@touch $@

$(STAMP)-packages: $(STAMP)-torch pyproject.toml .ci/constraints.txt
	@echo "==> pinned packages"
	$(PIP) "setuptools>=77" wheel
	$(PIP) --no-build-isolation -e ".[test,peers,gpu]"
	@touch $@

# The editable install compiles as well; this is for a change of csrc/ after it.
$(STAMP)-native: $(STAMP)-packages $(CSRC)
	@echo "==> compiled library (csrc/)"
	@if [ -n "$$(find $(CSRC) -newer peft_engine/_native.so 2>&1)" ]; then $(PY) setup.py -q build_ext --inplace; fi
	@touch $@

# The tests need nvcc, not a GPU. Where none is installed, PyPI's (the extra `cuda`); where that cannot be had, the
# tests say what they skip.
$(STAMP)-cuda: $(STAMP)-native $(CUDA)
	@echo "==> CUDA kernels (csrc/cuda/)"
	@if $(FIND_NVCC) || $(PIP) "$$($(CUDA_EXTRA))"; then \
	  if [ -n "$$(find setup.py $(CUDA) -newer peft_engine/_cuda.so 2>&1)" ]; then \
	    $(PY) setup.py -q build_ext --inplace; fi; touch $@; \
	else echo "no CUDA compiler: the tests of the CUDA kernels will be skipped" >&2; fi

$(STAMP)-lint: $(STAMP)-packages
	@echo "==> linters"
	$(PIP) ruff mypy clang-format
	@touch $@

clean:
	rm -rf $(VENV) build dist out/demo out/bench *.egg-info peft_engine/_native.so peft_engine/_cuda.so

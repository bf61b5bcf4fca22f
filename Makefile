# TORCH_INDEX: a package index with the torch build of your choice, for instance
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
BENCH ?=
SERVE ?=
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: setup demo serve test check bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV): about 3 GB, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(INDEX) --constraint constraints.txt torch
	$(BIN)/pip install --quiet $(INDEX) --constraint constraints.txt --editable '.[data,plots,minilm,tensorboard,bench,ray,serve]'
	$(BIN)/pip install --quiet $(INDEX) --constraint constraints.txt $(shell $(PYTHON) -c "import tomllib;print(*(f\"'{d}'\" for d in tomllib.load(open('pyproject.toml','rb'))['dependency-groups']['dev']))")
	touch $@

setup: $(VENV)/.installed  ## create .venv with everything

demo: setup  ## train three tasks on one base and answer with all of them
	$(BIN)/bitfit demo

serve: setup  ## the demo's three tasks (trained the first time: minutes) over HTTP; SERVE="--port 9000"
	test -f bitfit-demo/sentiment.bitfit.safetensors || $(BIN)/bitfit demo --keep bitfit-demo
	$(BIN)/bitfit serve --tasks bitfit-demo $(SERVE)

test: setup  ## the tests in two processes, without network, GPU or long runs
	$(BIN)/python -m pytest -n 2

check: setup  ## style, types, direction of the imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_package.py -k "imports or cycle"

bench: setup  ## training speed beside stock parts (minutes); BENCH="--data glue_data" for real lengths
	$(BIN)/bitfit bench train $(BENCH)

clean:
	rm -rf $(VENV)

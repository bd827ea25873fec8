# One word each. `make demo` and `make test` work on a fresh clone with nothing else installed by hand.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Flower phones home and installs packages at run time unless told not to; every process we start says so.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export SEQUESTER_DATA ?= $(abspath ../shared/data)

.PHONY: demo test check nightly bench bench-quick lint types walls unit proto constraints clean
.DEFAULT_GOAL := check

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[site,server,simulate,dev]"
	touch $@

demo: $(VENV)/.made   ## a whole study across real processes: four hospitals, one coordinator, one report
	$(BIN)/python deploy/demo/demo.py

test: $(VENV)/.made lint types walls   ## what CI runs: everything but nightly, at most 20 minutes on two cores
	$(BIN)/python -m pytest -q -n 2 -m "not nightly and not system"
	$(BIN)/python -m pytest -m "system and not nightly"

check: $(VENV)/.made lint types walls unit   ## lint, types, walls, unit tests: at most two minutes

lint: $(VENV)/.made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.made
	$(BIN)/mypy

walls: $(VENV)/.made
	$(BIN)/lint-imports

unit: $(VENV)/.made
	$(BIN)/python -m pytest -q -n 2 -m "not nightly and not system and not slow"

nightly: $(VENV)/.made   ## mutation of every check, the full kill matrix, the large state search, long fuzzing
	$(BIN)/python -m pytest -m nightly --timeout=7200
	$(BIN)/python tests/mutate.py

bench: $(VENV)/.made   ## ratios, side by side, in one run; never an assertion on absolute time
	PYTHONPATH=tests $(BIN)/python -m bench

bench-quick: $(VENV)/.made   ## the same with small cells, at most three minutes
	PYTHONPATH=tests $(BIN)/python -m bench --quick

proto: $(VENV)/.made   ## regenerate exchange_pb2.py after a change of exchange.proto
	$(BIN)/python -m grpc_tools.protoc --proto_path=protocols/sequester/protocols --python_out=protocols/sequester/protocols --pyi_out=protocols/sequester/protocols exchange.proto

constraints: $(VENV)/.made   ## write what is installed now as the one lock that demo and test use
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' > constraints.txt

clean:
	rm -rf $(VENV) demo-out example-out bench-out .mypy_cache .ruff_cache .pytest_cache

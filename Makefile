# Every target sets itself up from a fresh clone. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
WHEEL := build/wheel

.PHONY: demo test lint test-slow soak bench lock proto clean

demo: $(VENV)/.installed
	$(BIN)/raymoe demo

# two tests at once; a file's tests stay together, as they share clusters
test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib build/bdist* dist $(WHEEL)
	$(PIP) wheel . --no-deps --no-build-isolation --wheel-dir dist
	$(PIP) install --no-deps --target $(WHEEL) dist/*.whl
	cd $(WHEEL) && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --no-cache --config $(CURDIR)/pyproject.toml
	$(BIN)/basedpyright --pythonpath $(BIN)/python $(WHEEL)/raymoe

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu"
	$(BIN)/python -m pytest -m "hypothesis and not slow and not gpu" --hypothesis-profile explore

# RAYMOE_SOAK_S seconds (900), RAYMOE_TEST_SEED another schedule
soak: $(VENV)/.installed-dev
	RAYMOE_SOAK_RESULT=benchmarks/results/elastic_soak.md $(BIN)/python -m pytest -s -m soak tests/actors/elastic

bench: $(VENV)/.installed-dev
	$(BIN)/python -m raymoe.benchmarks.first_light

# torch first and pinned: where pip finds a CPU build of it, that one is taken
$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint requirements.lock pip setuptools torch
	$(PIP) install --constraint requirements.lock --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --constraint requirements.lock --no-build-isolation --editable .[dev]
	touch $@

# writes down what a fresh environment resolved to
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==$(shell sed -n 's/^torch==//p' requirements.lock) triton==$(shell sed -n 's/^triton==//p' requirements.lock)
	build/lock/bin/pip install --quiet --editable .[dev]
	(echo "# Pins for Python 3.11 to 3.13, used as constraints: make lock writes this file."; \
	 build/lock/bin/pip freeze --all --exclude raymoe | sed 's/+cpu$$//') > requirements.lock

# the Python of the gRPC interface; the versions are those of requirements.lock
proto:
	rm -rf build/proto && $(PYTHON) -m venv build/proto
	build/proto/bin/pip install --quiet grpcio-tools==$(shell sed -n 's/^grpcio==//p' requirements.lock) --constraint requirements.lock
	build/proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. raymoe/serving/generation.proto

clean:
	rm -rf build dist runs $(VENV)

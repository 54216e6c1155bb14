# The two commands: `make reproduce` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export DVC_NO_ANALYTICS := 1

.PHONY: reproduce prefect prefect-worker test test-fast test-all lint format clean-state help

help:
	@echo "make reproduce   from real images to an exported one-step generator (less than ten minutes on two cores)"
	@echo "make prefect     a Prefect server with the deployments of prefect.yaml, and a worker"
	@echo "make test        the test suite (about fifteen minutes on two cores)"
	@echo "make test-fast   without processes, pipelines and servers of more than a few seconds"
	@echo "make test-all    with what takes minutes and seldom breaks, Triton's server among it"
	@echo "make lint        ruff and mypy"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ddops needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,prefect]'
	@touch $@

reproduce: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro
	@echo
	@echo "report        $(CURDIR)/reports/index.html"
	@echo "sample grid   $(CURDIR)/reports/grids/dd2_1step.png"
	@echo "ONNX model    $(CURDIR)/artifacts/onnx/model.onnx"

prefect: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ddops prefect

prefect-worker: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m ddops.flows.worker

# Triton's server comes with a wheel that needs numpy<2: an environment of its own, for one test.
.venv-triton/.ready:
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet nvidia-pytriton==0.7.0 'onnxruntime>=1.22,<2'
	@touch $@

# Tests of one xdist_group run one after the other in one process, the largest groups first: pipelines in one, Prefect's
# servers in another, which waits more than it computes; all others wherever there is room.
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadgroup

test: $(READY)
	$(PYTEST) -m 'not rare'

test-fast: $(READY)
	$(PYTEST) -m 'not slow and not pipeline and not prefect and not rare'

test-all: $(READY) .venv-triton/.ready
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean-state:
	rm -rf .ddops

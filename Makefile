# The two commands: `make reproduce` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export DVC_NO_ANALYTICS := 1

.PHONY: reproduce prefect prefect-worker test test-fast lint format clean-state help

help:
	@echo "make reproduce   from real images to an exported one-step generator (ten to fifteen minutes on two cores)"
	@echo "make prefect     a Prefect server with the deployments of prefect.yaml, and a worker"
	@echo "make test        the whole test suite"
	@echo "make test-fast   without the runs of the whole pipeline and of Prefect's server"
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

# A process a core for what runs in its own process; one at a time for what starts pipelines and servers and times them.
test: test-fast .venv-triton/.ready
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -m 'pipeline or prefect'

test-fast: $(READY) .venv-triton/.ready
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not pipeline and not prefect' --numprocesses auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean-state:
	rm -rf .ddops

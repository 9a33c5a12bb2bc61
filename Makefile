# Two commands need nothing but git, make and Python 3.11-3.13: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/fashion-mnist
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help demo demo-s3 test test-faults rehearsal check format docs venv clean-demo

help:
	@echo "make demo    install, train an encoder on real images, evaluate it, show where the pictures are"
	@echo "make demo-s3 the same from an S3 server on this machine that is killed for a while in the middle"
	@echo "make test    install, run the tests"
	@echo "make test-faults   whole runs that are killed, hung, cut off and refused, and the guide's commands: half an hour"
	@echo "make rehearsal     several hosts as network namespaces, as root: 8 minutes"
	@echo "make docs    the documentation site, into site/"
	@echo "make check   format, lint, types, import direction, spelling"

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt setup.py simclr_ray/views/native.c
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13), "needs Python 3.11 to 3.13; try make PYTHON=python3.11 ..."'
	@echo "installing into $(VENV): a few GB, some minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: venv
	@$(BIN)/simclr-ray pretrain jobs/fashion_mnist.yaml --set run.folder=$(RUN)
	@$(BIN)/simclr-ray evaluate $(RUN)

demo-s3: venv
	@$(BIN)/python -m benchmarks.demo_s3

test: venv
	@OMP_NUM_THREADS=1 RAY_AUTH_MODE=disabled $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-faults: venv
	@OMP_NUM_THREADS=1 RAY_AUTH_MODE=disabled $(BIN)/python -m pytest -q -m slow --durations=0

rehearsal: venv
	@$(BIN)/python -m benchmarks.rehearsal --part losses --output "$${TMPDIR:-/tmp}/rehearsal.json"

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@$(BIN)/python docs/make_reference.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean-demo:
	rm -rf $(RUN)

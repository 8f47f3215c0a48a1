# `make demo` and `make test` do all their own set-up in .venv.
# TORCH picks the build, e.g. make test TORCH=torch==2.13.0; PYTHON the interpreter (3.11 or newer).
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv

.PHONY: demo test lint lowest

demo: $(VENV)/installed
	$(VENV)/bin/accelerate launch --num_processes 1 training/train_vsdm.py \
		--dataset_name spiral-8y --standardize --output_dir outputs/spiral-8y --overwrite_output_dir

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# the tests with the lowest versions that pyproject.toml allows
lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet uv
	VIRTUAL_ENV=$(VENV)-lowest $(VENV)-lowest/bin/uv pip install --resolution lowest-direct --editable ".[test]"
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist worksteal

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

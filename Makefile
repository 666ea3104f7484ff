# make demo: install into .venv and run the bundled model. make test: the whole suite.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# What a demo imports is compiled as it is imported, where that may be kept; all that is installed takes 4 s more.
LAZILY := $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)

.PHONY: demo test lint format bench clean
.DELETE_ON_ERROR:

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: make PYTHON=/path/to/python3.11 demo" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Without a C++ compiler there are no kernels, and torch runs the model.
$(VENV)/.user: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(PIP) $(LAZILY) --editable '.[serve]'
	$(BIN)/python -c 'import sys; from maestrale.native_backend.kernels import missing; sys.exit(bool(missing()))' || \
		$(PIP) --editable '.[torch,serve]'
	touch $@

$(VENV)/.developer: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[torch,serve,train,plot,dev]'
	touch $@ $(VENV)/.user

demo: $(VENV)/.user
	$(BIN)/maestrale demo

# Two processes take file after file; what is marked `alone` runs when they are done (CONTRIBUTING.md).
test: $(VENV)/.developer
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not alone"
	$(BIN)/python -m pytest -m alone

lint: $(VENV)/.developer
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

format: $(VENV)/.developer
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Side by side with llama.cpp, OpenVINO, vLLM, ONNX Runtime, CTranslate2 and transformers, each in an environment of its
# own, on random checkpoints of three shapes: about 35 GB on disk, three hours on two cores. It goes on where it stopped.
bench: $(VENV)/.developer
	-$(BIN)/python bench/rivals/environments.py
	$(BIN)/python bench/compare_rivals.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache

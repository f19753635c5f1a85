# Everything happens in .venv; a first call of any target makes it.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-long lint gate bench bench-scaling bench-gpu docs clean
.DEFAULT_GOAL := install

install: $(STAMP)  ## the environment: .venv with mmad and the development tools

$(STAMP): pyproject.toml constraints.txt tools/environment.sh mmad_cli/_version.py
	bash tools/environment.sh $(VENV)
	touch $@

demo: $(STAMP)  ## M3DM with the built-in backbones on the default synthetic dataset: table on screen, run under runs/
	$(BIN)/mmad evaluate --method m3dm --backbones builtin --save-maps

test: $(STAMP)  ## the whole test suite, on all cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-long: $(STAMP)  ## minutes more: 200 steps of each built-in network against the logged losses
	MMAD_LONG_TESTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/pretraining -k test_200_steps

lint: $(STAMP)  ## style, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gate: $(STAMP)  ## our own numbers on a small synthetic dataset against ci/btf-fpfh.json
	bash ci/gate.sh

bench: $(STAMP)  ## our speed against the published form, measured in one run (9 minutes on 2 quiet cores); bench.json
	$(BIN)/python -m benchmarks --json bench.json

bench-scaling: $(STAMP)  ## how cost grows with rows, dimensions, samples, workers; plots in docs/assets
	$(BIN)/python -m benchmarks.scaling --json scaling.json --plot docs/assets

bench-gpu: $(STAMP)  ## figures of a GPU; ends with 2 where there is none
	$(BIN)/python -m benchmarks.gpu

docs: $(STAMP)  ## generated pages (command-line reference, JSON Schema of a run), then the site under site/
	$(BIN)/python tools/generate_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:  ## remove the environment and caches, not runs and not the store
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist site

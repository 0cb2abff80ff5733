# Everything starts from a fresh clone with Python and make alone:  make workbook  or  make test
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help workbook test docs lab readme lock clean programs

PYTHON ?= python3
MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)
READY := .venv/.ready
UV := .venv/bin/uv

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

workbook: $(READY) programs  ## train what is missing, run the notebooks, write _workbook/index.html
	@.venv/bin/crossmodal workbook --preset quick

test: $(READY) programs  ## package in step, notebooks clean, notebooks run, tests pass
	@.venv/bin/python tests/suite.py

docs: $(READY)  ## write this book as a site that opens from a folder: _site/index.html (needs npm)
	@.venv/bin/python docs/build.py

lab: $(READY)  ## open the notebooks in JupyterLab
	@.venv/bin/jupyter lab nbs

readme: $(READY)  ## write README.md from nbs/index.ipynb
	@.venv/bin/jupyter nbconvert --to markdown --no-input --log-level ERROR --output-dir . --output README nbs/index.ipynb

clean:  ## remove all that can be made again, .venv too; runs/ and data stay
	@rm -rf .venv _workbook _proc _docs _site docs/node_modules build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +

# torch and torchvision are held to a pair that is known to load together. Versions already locked are kept unless
# `make lock UPGRADE=--upgrade`. uv remembers what setup.py said until setup.py is newer, and settings.ini is all it says.
lock: | $(UV)  ## pin the requirements of settings.ini again, for every platform
	@touch setup.py
	@$(UV) pip compile setup.py --extra dev --constraint <(printf '%s\n' torch==2.14.1 torchvision==0.29.1) \
	    --universal --python-version $(MIN_PYTHON) --no-annotate --quiet $(UPGRADE) --output-file requirements.lock \
	    --custom-compile-command 'make lock    (from settings.ini, for every platform and Python >= $(MIN_PYTHON))'

# What is left out without them is said at the start, and again by whatever is left out.
programs:
	@say() { command -v $$1 >/dev/null && echo "$$1: found" || echo "$$1: ABSENT, so no $$2"; }; \
	say java "METEOR, SPICE or Penn Treebank tokens for caption metrics"; \
	say espeak-ng "words spoken by a machine"

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN_PYTHON)".split("."))))' || { \
	    echo "crossmodal needs Python $(MIN_PYTHON) or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	    echo "Name another one: make PYTHON=python3.12 test" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -qq --disable-pip-version-check --force-reinstall --constraint requirements.lock uv

# uv does not read pip's configuration, so an index that is configured there is handed over, with pip's rule for more
# than one index: the best version of all. Every version is pinned, so this changes where a file comes from, not which;
# but where two indexes hold different files of one version, uv takes the first index's and pip the best file. An index
# that was added later is there for what the earlier ones lack, so the order is turned round.
pip-says = $$(.venv/bin/pip config list | sed -nE "s/^(:env:|global|install)\.$(1)='(.*)'/\2/p" | sed -n '1{s/\\n/ /g;p;}')

# .unfinished is there while packages are being written. If it is found, the last time was cut short and any package
# may be half there: all are written again (from uv's cache, so this takes seconds). Their bytecode is compiled at once:
# else every process does it anew where Python may not write it.
$(READY): requirements.lock settings.ini setup.py | $(UV)
	@echo "Installing the packages of requirements.lock into .venv (the first time on Linux: 3.5 GB, most of it CUDA)"
	@set -o pipefail; index="$(call pip-says,index-url)" more="$(call pip-says,extra-index-url)"; \
	[ -z "$$index" ] || export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$index}"; \
	[ -z "$$more" ] || export UV_INDEX="$${UV_INDEX:-$$(printf '%s\n' $$more | tac | xargs)}" UV_INDEX_STRATEGY=unsafe-best-match; \
	again=; [ ! -e .venv/.unfinished ] || again=--reinstall; \
	rm -f $@; touch .venv/.unfinished; \
	$(UV) pip install --python .venv/bin/python --compile-bytecode $$again --requirements requirements.lock 2>&1 \
	    | grep --line-buffered -v '^ [-+~] '
	@$(UV) pip install --python .venv/bin/python --quiet --no-deps --no-build-isolation --editable .
	@mv .venv/.unfinished $@

# Needs Python 3.11 or newer and make. Every target makes what it needs, .venv included.
#   make demo PYTHON=python3.12                                  another Python
#   make demo PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'
# On Linux, PyPI's torch is the CUDA build (several GB); the second line takes the small CPU build.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := $(CURDIR)/.venv/bin
READY := .venv/.installed
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DEFAULT_GOAL := help
.PHONY: help demo test test-chapters test-quick test-slow test-all lab export refresh readme docs clean

help:           ## show this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(READY)  ## run the whole pipeline on the tiny preset (minutes on 2 cores) and print the results
	$(BIN)/llava-med run tiny

test: $(READY)  ## run every chapter from top to bottom, and the quick tests
	@log=$$(mktemp); OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 2> $$log; chapters=$$?; cat $$log; \
	failed=$$(grep -o '[^/[:space:]]*\.ipynb$$' $$log | sort -u | tr '\n' ' '); rm $$log; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -m 'not slow' -n 2 --dist loadfile; quick=$$?; \
	[ $$chapters -eq 0 ] || echo "Chapters that fail (their messages are the first above): $$failed"; \
	[ $$chapters -eq 0 ] && [ $$quick -eq 0 ]

test-chapters: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2

test-quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -m 'not slow' -n 2 --dist loadfile

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -m slow -n 2 --dist loadfile

test-all: test test-slow  ## the same, and the slow tests: the pipeline end to end

lab: $(READY)   ## open the first notebook in JupyterLab
	-@$(BIN)/jupyter labextension disable '@jupyterlab/apputils-extension:announcements' 2>/dev/null
	$(BIN)/jupyter lab $$([ "$$(id -u)" != 0 ] || echo --allow-root) --notebook-dir=. nbs/start.ipynb

export: $(READY) ## write llava_med/ from the notebooks, after cleaning them
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

refresh: demo   ## bring the demo's results into nbs/pipeline/, outputs/example/, the home page and README.md
	$(BIN)/llava-med refresh tiny
	$(BIN)/llava-med readme

readme: $(READY) ## run the home page and nbs/pages/, and make README.md of the first
	$(BIN)/llava-med readme

docs: $(READY)  ## make the book of all notebooks, _docs/index.html; nothing is run
	@$(BIN)/python -c 'import sys; from llava_med.lab.book import book_command; sys.exit(book_command())'

clean:          ## remove caches and the scratch run; runs and .venv stay
	rm -rf outputs/scratch build _proc _docs .pytest_cache *.egg-info
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print | xargs rm -rf

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)'; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo 'The venv module is missing: install it (Debian, Ubuntu: apt install python3-venv).'; exit 1; }

$(READY): settings.ini constraints.txt setup.py pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt torch==2.13.0 -e '.[dev]'
	@touch $@

# make train: from nothing to a small GPT-2 that speaks. make test: the suite. Both make .venv by themselves.
PYTHON ?= python3
PRESET ?= tiny
ARGS ?=
BIN := .venv/bin

ifneq ($(filter $(PRESET),tiny mini),)
DATA ?= data/stdlib
endif

.PHONY: setup train test test-all lint bench clean

setup: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: setup
ifeq ($(DATA),data/stdlib)
	$(BIN)/gpt2 prepare stdlib --out data/stdlib --tokenizer bytes --val-fraction 0.2
endif
	$(BIN)/gpt2 train $(PRESET) $(if $(DATA),--data $(DATA)) $(ARGS)

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-all: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m ""

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m pytest bench -s

clean:
	rm -rf .venv *.egg-info

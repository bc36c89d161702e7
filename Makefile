PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow torture bench bench-scale docs docs-site lint wheel dist compat clean

.venv/installed: pyproject.toml constraints.txt dcpstore/__init__.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev]'
	$(BIN)/python -m compileall -q dcpstore  # as pip does for all that it does not link
	touch $@

demo: .venv/installed  ## Train on 2 ranks, go on on 1 and 4, and prove it; about two minutes.
	$(BIN)/python examples/demo.py demo

test: .venv/installed  ## Every test but the slow ones.
	$(BIN)/pytest -q -n 3 --dist worksteal -m 'not slow'

slow: .venv/installed  ## The tests that take long, or gigabytes.
	$(BIN)/pytest -q -m slow

torture: .venv/installed  ## Every kind of fault, at very many points: a table.
	$(BIN)/python -m tests.torture --long

bench: .venv/installed  ## Measure everything beside its peers: one table, in a quarter of an hour.
	mkdir -p build
	$(BIN)/python -m benchmarks --json build/bench.json

bench-scale: .venv/installed  ## Measure what grows: one table, in half an hour.
	mkdir -p build
	$(BIN)/python -m benchmarks.growth --json build/bench-scale.json

docs: .venv/installed  ## Write the pages that follow from the code.
	DCPSTORE_WRITE_DOCS=1 $(BIN)/pytest -q tests/test_house.py tests/test_docs.py tests/test_site.py tests/history/test_sql_page.py tests/parallel/test_page.py tests/dcp/test_page.py tests/encoding/test_page.py tests/cli/test_docs.py -k 'documented or page'

docs-site: .venv/installed  ## Build the documentation site into build/site; a warning is an error.
	$(BIN)/python docs/site/build.py

lint: .venv/installed  ## Formatting, lint rules and strict types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: .venv/installed  ## Build the packages, and use the wheel without the checkout.
	.ci/wheel

dist: .venv/installed  ## The same, and leave both packages in dist/.
	rm -rf dist
	.ci/wheel dist

# The releases that constraints.txt pins are kept, but for torch and what goes with one of torch.
compat: COMPAT = build/compat-$(TORCH)
compat: TESTS ?= tests
compat:  ## Run every test but the slow ones on another release of torch: make compat TORCH=2.8.0
	@test -n "$(TORCH)" || { echo "name the release: make compat TORCH=2.8.0" >&2; exit 2; }
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	grep -vE '^(torch|torchao)==' constraints.txt > $(COMPAT)/constraints.txt
	$(COMPAT)/bin/pip install --quiet --disable-pip-version-check -c $(COMPAT)/constraints.txt torch==$(TORCH) -e '.[tests]'
	$(COMPAT)/bin/pytest -q -n 3 --dist worksteal -m 'not slow' $(TESTS)

clean:
	rm -rf .venv build dist

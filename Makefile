# Two commands from a fresh clone: `make quickstart` (train on a real task) and `make test` (everything CI runs).
PYTHON ?= python3
BIN := .venv/bin
export CI ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test docs clean

quickstart: .venv/installed
	$(BIN)/python examples/quickstart.py

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

docs: .venv/installed  # site/index.html
	$(BIN)/python docs/hooks.py  # docs/configuration.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# torch first and with its dependencies: a plain `torch` would bring another build. The rest is pinned completely, so
# nothing is resolved; vLLM's CPU build needs this, since its declared dependencies exist for CUDA only.
.venv/installed: requirements/cpu.txt setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv outputs site

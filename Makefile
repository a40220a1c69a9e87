# From a fresh clone; each command makes .venv with pinned CPU packages first, where it is missing.
#   make quickstart   trains a small model on a real task, in five to eight minutes
#   make check        format, lint, and the tests of the pure floors: under 30 seconds
#   make test         everything CI runs: about 15 minutes on two cores
#   make docs         the pages as HTML in site/
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore
export CI ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart check test docs chromium clean

quickstart: .venv/installed
	@$(BIN)/python examples/quickstart.py

# The style tests run ruff, its format included. The others import neither torch nor TRL, which takes longer than they do.
PURE := style scores advantages growth methods turns benchmarks
check: .venv/installed
	@$(BIN)/python -m pytest -q $(PURE:%=tests/test_%.py)

test: .venv/installed chromium
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

docs: .venv/installed  # site/index.html
	$(BIN)/python docs/hooks.py  # docs/configuration.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# torch first and with its dependencies: a plain `torch` would bring another build. The rest is pinned completely, so
# nothing is resolved; vLLM's CPU build needs this, since its declared dependencies exist for CUDA only.
.venv/installed: requirements/cpu.txt setup.cfg
	@echo "Installing pinned packages into .venv; this happens once and takes a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(INSTALL) torch==2.13.0
	@$(BIN)/python -c "import torch; torch.version.cuda and print('pip took the CUDA build of PyTorch: make quickstart works with it; for make test point pip at the wheels for CPUs, see pytorch.org, and delete .venv')"
	@$(INSTALL) --no-deps -r requirements/cpu.txt
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# The page of the viewer is tested in a real browser, driven by Playwright, which does not bring its own.
CHROMIUM := /usr/bin/chromium
chromium:
	@test -x $(CHROMIUM) || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium) >/dev/null || { echo "The tests of the viewer need Chromium at $(CHROMIUM), and it cannot be installed here: apt-get needs root, Debian and its package mirror. Install the package chromium, then run make test again."; exit 1; }

clean:
	rm -rf .venv outputs site

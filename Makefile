# The first of these that is a Python 3.11 or 3.12; override with `make PYTHON=...`.
CANDIDATES := python3.12 python3.11 python3 python
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test test-all lint bench docs

demo: .venv/installed
	.venv/bin/python main.py --config=configs/compact_digits.py --workdir=runs/compact_digits

# A worker that dies ends the run: pytest-xdist can wait for ever for the one in its place.
# Python keeps what it compiled, whatever the environment says: each worker would compile all again.
PYTEST = PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
test: .venv/installed-dev
	$(PYTEST)

# And the larger sizes, every pair of methods exported, and cases whose parts other cases have.
test-all: .venv/installed-dev
	$(PYTEST) -m "slow or not slow"

# Every figure of the README's section on speed, in about 20 minutes of one core. With a Python that
# has torch for the peers: make bench TORCH=/path/to/python
bench: .venv/installed-dev
	.venv/bin/python -m experiments.bench all $(if $(TORCH),--torch $(TORCH))
	.venv/bin/python -m experiments.bench tables
	.venv/bin/python -m experiments.bench goals

lint: .venv/installed-dev
	.venv/bin/ruff check .

# The pages, in site/index.html; a warning is an error.
docs: .venv/installed-docs
	.venv/bin/python -m sphinx -q -E -W --keep-going docs site

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

# The pins, then the checkout itself: .venv/bin/vitcompact is the command.
INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.venv/installed: requirements.txt pyproject.toml | .venv/bin/python
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps -e .
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements-docs.txt requirements-export.txt requirements.txt pyproject.toml | .venv/bin/python
	$(INSTALL) -r requirements-dev.txt
	$(INSTALL) --no-deps -r requirements-export.txt
	$(INSTALL) --no-deps -e .
	@touch $@ .venv/installed

.venv/installed-docs: requirements-docs.txt .venv/installed
	$(INSTALL) -r requirements-docs.txt
	@touch $@

# The first of these that is a Python 3.11 or 3.12; override with `make PYTHON=...`.
CANDIDATES := python3.12 python3.11 python3 python
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test lint

demo: .venv/installed
	.venv/bin/python main.py --config=configs/digits.py --workdir=runs/digits

test: .venv/installed-dev
	.venv/bin/python -m pytest -n 2 --dist loadfile

lint: .venv/installed-dev
	.venv/bin/ruff check .

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ .venv/installed

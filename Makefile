# make test                                              lint, types and all tests
# make test-oldest                                       test the package on the oldest supported versions
# make train [ENV=...] [STEPS=...] [SEED=...] [OUT=...]  train, evaluate, plot and film; see examples/train.py
# make docs                                              build the documentation site into build/docs
#
# All set up what they need. They use an active virtual environment, or the one of PYTHON. Otherwise they make one in VENV,
# .venv by default.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
WORKERS ?= 2
# Rendering without a display.
ifeq ($(shell uname),Linux)
    export MUJOCO_GL ?= egl
endif

in_venv := $(shell $(PYTHON) -c 'import sys; print(int(sys.prefix != sys.base_prefix))' 2> /dev/null)
ifeq ($(if $(VENV),0,$(in_venv)),1)
    python := $(PYTHON)
    get_pip := $(PYTHON) -m ensurepip
    prefix := $(shell $(PYTHON) -c 'import sys; print(sys.prefix)')
else
    VENV ?= .venv
    python := $(VENV)/bin/python
    get_pip := $(PYTHON) -m venv $(VENV)
    prefix := $(VENV)
endif
stamp := $(prefix)/sb3-mrq-is-installed

# Tests of the package that use Stable-Baselines3 or gymnasium. Environments, examples and rl-zoo3 need newer versions.
OLDEST_VENV ?= .venv-oldest
oldest_tests := $(addprefix tests/test_, $(addsuffix .py, action_spaces bad_input buffer citizenship package policies run \
	save_load schedule spaces))
oldest_stamp := $(OLDEST_VENV)/sb3-mrq-is-installed

.PHONY: test test-oldest lint type pytest docs format train setup system clean

test: lint type pytest

lint: setup
	$(python) -m ruff check
	$(python) -m ruff format --check

type: setup
	$(python) -m mypy

# Two workers share two cores, hence one thread each. tests/conftest.py says which tests stay on one worker.
pytest: setup
	OMP_NUM_THREADS=1 $(python) -m pytest -n $(WORKERS) --dist loadscope --durations=30

test-oldest: $(oldest_stamp)
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(oldest_tests)

$(oldest_stamp): pyproject.toml .ci/constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install -c .ci/constraints-oldest.txt -e . pytest pytest-xdist scipy
	touch $@

# A broken link or a page outside of the navigation is an error. `python -m http.server -d build/docs` shows the site.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --config-file .mkdocs.yml

format: setup
	$(python) -m ruff check --fix
	$(python) -m ruff format

train: setup
	$(python) examples/train.py $(if $(ENV),--env $(ENV)) $(if $(STEPS),--steps $(STEPS)) \
		$(if $(SEED),--seed $(SEED)) $(if $(OUT),--out $(OUT))

setup: $(stamp)

$(stamp): pyproject.toml .ci/constraints.txt
	@$(MAKE) --no-print-directory system
	$(python) -m pip --version 2> /dev/null || $(get_pip)
	$(python) -m pip install -c .ci/constraints.txt -e ".[all]"
	touch $@

# Debian packages that a bare machine lacks: for virtual environments, for MuJoCo's off-screen rendering, and for torch.compile.
# Without them the rest may still work.
system:
	@packages=; \
	$(PYTHON) -c 'import ensurepip' 2> /dev/null || packages+=" python3-venv"; \
	$(PYTHON) -c 'import ctypes; ctypes.CDLL("libEGL.so.1"); ctypes.CDLL("libGL.so.1")' 2> /dev/null \
		|| packages+=" libegl1 libgl1 libgl1-mesa-dri"; \
	command -v g++ > /dev/null || packages+=" g++"; \
	$(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2> /dev/null \
		|| packages+=" python3-dev"; \
	[ -n "$$packages" ] || exit 0; \
	sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	if command -v apt-get > /dev/null && $$sudo true 2> /dev/null; then \
		$$sudo apt-get update && $$sudo apt-get install --yes --no-install-recommends $$packages; \
	else \
		echo "These packages are missing. Install them, as apt-get or root is not available here:$$packages"; \
	fi

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

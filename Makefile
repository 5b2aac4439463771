# make demo   install, generate data, train, evaluate, draw pictures    make check  what CI runs: lint, types, tests
# make test   the test suite                                           make gpu    all measurements on a card
# make quick  the fast tests (no training, no server), in under a minute
# make ablate-smoke   a study in three minutes: its data, two short runs, the report
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin

# Each test file runs in one process, so that its fixtures are made once. The slow files start first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick lint check gpu ablate-smoke
demo: .venv/ready
	$(BIN)/python tools/make_shapes.py --output data/shapes
	$(BIN)/python tools/train.py configs/shapes.yaml --resume
	$(BIN)/python tools/eval.py configs/shapes.yaml
	$(BIN)/python tools/plot.py configs/shapes.yaml --score 0.45

test: .venv/ready
	$(PYTEST)

quick: .venv/ready
	$(PYTEST) -m 'not slow'

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@! grep -rnE 'torch\.load\(' --include='*.py' retina tools benchmarks tests | grep -v 'weights_only=True' \
		|| { echo 'torch.load without weights_only=True runs code from files'; exit 1; }

check: lint test

ablate-smoke: .venv/ready
	$(BIN)/python tools/ablate.py configs/ablations/smoke.yaml --workers 2

gpu:
	bash benchmarks/gpu.sh

# One pip call takes torch and torchvision from the same index: builds from different indexes do not load together.
.venv/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give it as PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c $(CONSTRAINTS)
	touch $@

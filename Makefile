# Every target works alone on a fresh clone: it makes .venv and installs what it needs.

PYTHON ?= python3
BIN := .venv/bin
MNIF := $(BIN)/mnif

# `make demo` fits this in ten to fifteen minutes on two cores; CI shrinks it.
RUN ?= runs/demo
FIT_STEPS ?= 5000
PRIOR_STEPS ?= 1000
SAMPLES ?= 1000

.PHONY: demo test lint package install clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev,rtx]"
	touch $@

demo: install
	$(MNIF) fit --data twemoji --output_dir $(RUN) --random_flip --random_colours --max_train_steps $(FIT_STEPS)
	$(MNIF) prior --run $(RUN) --max_train_steps $(PRIOR_STEPS)
	$(MNIF) sample --model $(RUN)/model --num_samples 64 --output_dir $(RUN)/pictures
	$(MNIF) export --model $(RUN)/model --output_dir $(RUN)/bundle
	$(MNIF) eval --model $(RUN)/model --reference twemoji --num_samples $(SAMPLES) --output_dir $(RUN)/eval
	$(MNIF) report --run $(RUN)

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What users install: source distribution and wheel, and the wheel alone in an environment of its own, elsewhere.
package: install
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	PYTHON=$(PYTHON) bash scripts/try_wheel.sh dist/*.whl

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis

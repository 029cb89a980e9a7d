# Every target works alone on a fresh clone: it makes .venv and installs what it needs.

PYTHON ?= python3
BIN := .venv/bin
MNIF := $(BIN)/mnif

# `make demo` fits this in about ten minutes on two cores; CI shrinks it. The emoji:
#   make demo RUN=runs/emoji DATA=twemoji FIT_FLAGS="--random_flip --random_colours" FIT_STEPS=5000 \
#       PRIOR_FLAGS="--preset edge --augment" PRIOR_STEPS=2500
RUN ?= runs/demo
DATA ?= avatars
FIT_FLAGS ?= --resolution 64 --latent_noise 0.1
FIT_STEPS ?= 2500
PRIOR_FLAGS ?= --preset edge --dropout 0 --learning_rate 2e-3
PRIOR_STEPS ?= 4000
SAMPLES ?= 1000

.PHONY: demo test lint docs package install clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev,rtx]"
	touch $@

demo: install
	$(MNIF) fit --data $(DATA) --output_dir $(RUN) $(FIT_FLAGS) --max_train_steps $(FIT_STEPS)
	$(MNIF) prior --run $(RUN) $(PRIOR_FLAGS) --max_train_steps $(PRIOR_STEPS)
	$(MNIF) sample --model $(RUN)/model --num_samples 64 --output_dir $(RUN)/pictures
	$(MNIF) export --model $(RUN)/model --output_dir $(RUN)/bundle
	$(MNIF) eval --model $(RUN)/model --reference $(DATA) --num_samples $(SAMPLES) --output_dir $(RUN)/eval
	$(MNIF) report --run $(RUN)

test: install
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site of docs/, in site/; a dead link or a warning ends it. Look at it: .venv/bin/mkdocs serve
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# What users install: source distribution and wheel, and the wheel alone in an environment of its own, elsewhere.
package: install
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	PYTHON=$(PYTHON) bash scripts/try_wheel.sh dist/*.whl

clean:
	rm -rf .venv runs site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis

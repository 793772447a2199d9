# Everything runs in .venv, which these targets make themselves:
#   make quickstart [ARGS=--smoke]    fuse a real teacher into a real target
#   make quickstart-xtok [ARGS=...]   the same across tokenizers
#   make test [WORKERS=2]             ruff, mypy and the whole test suite, that many test files at a time
#   make test-fast [ARGS=-x]          the fast tests of one process; CONTRIBUTING.md says what is left out
#   make test-full [ARGS=-x]          long matrices that `make test` leaves out, such as kill -9 in every stage of every recipe
#   make test-slurm [ARGS=-x]         runs and events of a cluster on a real Slurm of two pretend nodes; takes long
#   make gpu-check [ARGS=--quick]     checks and measures everything on one GPU in ten minutes; without one, what can be
#   make test-te                      Transformer Engine's layers and FP8 on the CPU, in .venv-te: tests, then figures
# PYTHON picks the interpreter (3.10 or later) that .venv is made from.

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart quickstart-xtok gpu-check test test-fast test-full test-slurm test-te lint assets setup

quickstart: setup
	$(BIN)/python -m fusemega.recipes.quickstart $(ARGS)

quickstart-xtok: setup
	$(BIN)/python -m fusemega.recipes.quickstart_xtok $(ARGS)

# Its own exit status is 1 where anything is wrong. Weights and texts that cannot be fetched are "not measured".
gpu-check: setup
	-$(BIN)/python -m fusemega.fixtures
	$(BIN)/python benchmarks/gpu/check.py $(ARGS)

# Tests whose assets cannot be fetched skip, and say which ones.
test: lint
	-$(BIN)/python -m fusemega.fixtures
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# No launches, no training, no whole commands, no real weights.
FAST := tests/test_config.py tests/test_examples.py tests/test_extending.py tests/files tests/text tests/fusion/test_fusion.py \
	tests/fusion/test_cross_tokenizer.py tests/losses tests/logits tests/store tests/hf tests/pipeline tests/report tests/cli/test_main.py \
	tests/cli/test_reference.py tests/models/test_rules.py tests/models/test_stages.py tests/models/test_llama.py \
	tests/merge/test_vocabulary.py tests/merge/test_rounding.py tests/merge/test_folders.py tests/align/test_maps.py \
	tests/align/test_positions.py tests/align/test_projection.py tests/align/test_mined.py tests/align/test_vocabulary.py

test-fast: setup
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(FAST) --ignore tests/text/test_qwen3.py $(ARGS)

test-full: setup
	-$(BIN)/python -m fusemega.fixtures
	$(BIN)/python -m pytest -m full $(ARGS)

# Needs root, and apt-get install slurmctld slurmd slurm-client munge.
test-slurm: setup
	-$(BIN)/python -m fusemega.fixtures
	$(BIN)/python -m pytest -m "slurm_full or not slurm_full" tests/slurm $(ARGS)

test-te: setup
	$(BIN)/python -m tests.te.environment
	FUSEMEGA_IN_VENV_TE=1 OMP_NUM_THREADS=1 .venv-te/bin/python -m pytest -p no:cacheprovider tests/te/inside $(ARGS)
	.venv-te/bin/python benchmarks/fp8_reference.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

assets: setup
	$(BIN)/python -m fusemega.fixtures

setup: .venv/.installed

# torch first, alone and pinned. Any other resolution (a range, a newer release, a dependency that asks for torch before
# the pin is seen) may take a CUDA build with several GB of libraries. Where 2.13.0 itself is offered as a CPU build
# (2.13.0+cpu, from an index named in PIP_EXTRA_INDEX_URL or a folder in PIP_FIND_LINKS), that one is taken.
.venv/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet -c constraints.txt torch==2.13.0 numpy
	touch $@

.venv/.installed: .venv/.torch setup.py
	$(PIP) install --quiet -c constraints.txt -e '.[gguf,dev]'
	touch $@

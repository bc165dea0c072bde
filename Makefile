# The commands of this repository. `make help` lists them; what they run is all there is to them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# cuda on a machine with an NVIDIA GPU, else cpu.
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

BIN := .venv/bin
UV := $(BIN)/uv pip
# uv does not read pip's settings: give it the user's mirror and wheel folder.
pip_setting = $(shell $(PYTHON) -m pip config get global.$(1) 2>/dev/null)
ifneq ($(or $(PIP_INDEX_URL),$(call pip_setting,index-url)),)
export UV_DEFAULT_INDEX ?= $(or $(PIP_INDEX_URL),$(call pip_setting,index-url))
endif
ifneq ($(or $(PIP_FIND_LINKS),$(call pip_setting,find-links)),)
export UV_FIND_LINKS ?= $(or $(PIP_FIND_LINKS),$(call pip_setting,find-links))
endif
export VIRTUAL_ENV := $(CURDIR)/.venv
# Importing vLLM takes twice as long from sources, and a server is several processes.
export UV_COMPILE_BYTECODE ?= 1

INSTALLED := .venv/installed-$(EXTRA)
TESTED := .venv/installed-test
BENCHED := .venv/installed-bench
CLUSTERED := .venv/installed-cluster

.PHONY: install install-cluster serve cluster test test-clients test-cluster lint bench bench-cluster lock rehearse audit help

install: $(INSTALLED) ## Make .venv and install the service (EXTRA=cpu or cuda)

install-cluster: $(CLUSTERED) ## Install what `cluster` needs besides, and start nothing

serve: $(INSTALLED) ## Serve a model (MODEL=name or file, PORT=6006, ARGS="--set key=value ...")
	@$(BIN)/python -m service serve $(MODEL) $(if $(PORT),--port $(PORT)) $(ARGS)

cluster: $(CLUSTERED) ## Serve several models or replicas on Ray Serve (FILE=cluster.yaml)
	@$(BIN)/python -m service cluster $(FILE) $(ARGS)

APART := tests/test_clients.py tests/test_cluster.py
test: $(TESTED) ## Run the tests (ARGS="-k name")
	$(BIN)/pytest --numprocesses 2 --dist loadfile $(APART:%=--ignore %) $(ARGS)

test-clients: $(TESTED) ## Run docs/clients.md, with the clients of PyPI and npm
	$(BIN)/pytest tests/test_clients.py $(ARGS)

test-cluster: $(TESTED) ## Run the tests of the cluster, as root, with nothing beside them
	$(BIN)/pytest tests/test_cluster.py $(ARGS)

lint: $(TESTED) ## Check style, types, and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

bench: $(BENCHED) ## Measure it beside the tutorial's server and vLLM (MODEL=name, ARGS="--rounds 3")
	$(BIN)/python -m benchmarks.run $(if $(MODEL),--model $(MODEL)) $(ARGS)

bench-cluster: $(TESTED) ## Measure a cluster and its faults (ARGS="--kills 3")
	unshare --net $(SHELL) -c 'ip link set lo up && exec $(BIN)/python -m benchmarks.cluster $(ARGS)'

COMPILE := $(BIN)/uv pip compile --quiet --upgrade --no-header --no-annotate pyproject.toml
CPU := --extra cpu --excludes requirements/cpu-excludes.txt
lock: $(TESTED) ## Pin the newest versions that fit pyproject.toml in requirements/
	$(COMPILE) $(CPU) -o requirements/cpu.txt
	$(COMPILE) $(CPU) -c requirements/cpu.txt --extra test -o requirements/test.txt
	$(COMPILE) $(CPU) -c requirements/cpu.txt --extra bench -o requirements/bench.txt
	$(COMPILE) $(CPU) -c requirements/cpu.txt --extra cluster -o requirements/cluster.txt
	$(COMPILE) --extra clients -o requirements/clients.txt
	env -u UV_FIND_LINKS $(COMPILE) --extra cuda -o requirements/cuda.txt

rehearse: ## Say what another version of vLLM would break here (VLLM=0.33.0 or a wheel)
	$(BIN)/python -m testing.rehearse $(or $(VLLM),$(error give the version: make rehearse VLLM=0.33.0))

audit: $(INSTALLED) ## Write sbom.json of what is installed, and report known vulnerabilities
	$(BIN)/uv tool run --quiet --from cyclonedx-bom cyclonedx-py environment .venv -o sbom.json
	$(BIN)/uv tool run --quiet pip-audit --no-deps --disable-pip -r requirements/$(EXTRA).txt

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

$(BIN)/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.8

# torch's CPU build is not on PyPI: from the user's wheel folder or mirror, else from PyTorch's index.
$(INSTALLED): requirements/$(EXTRA).txt pyproject.toml | $(BIN)/uv
	rm -f .venv/installed-*
	@echo "Installing into .venv; it takes a few minutes ..."
	$(UV) sync --quiet requirements/$(EXTRA).txt 2>/dev/null \
		|| $(UV) sync --torch-backend $(EXTRA:cuda=auto) requirements/$(EXTRA).txt
	$(UV) install --quiet --no-deps -e .
	touch $@

$(TESTED): $(INSTALLED) requirements/test.txt
	$(UV) install --quiet -c requirements/test.txt -e '.[test]'
	touch $@ $(CLUSTERED) # the extra `test` has `cluster`

$(BENCHED): $(INSTALLED) requirements/bench.txt
	$(UV) install --quiet -c requirements/bench.txt -e '.[bench]'
	touch $@

$(CLUSTERED): $(INSTALLED) requirements/cluster.txt
	$(UV) install --quiet -c requirements/cluster.txt -e '.[cluster]'
	touch $@
